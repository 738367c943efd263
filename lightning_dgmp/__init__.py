"""Pipeline model parallelism with delayed gradients for PyTorch Lightning.

Importing the package registers ``Trainer(strategy="delayed_mp")``.
"""

from typing import TYPE_CHECKING, Any

from lightning_dgmp.registration import register
from lightning_dgmp.version import __version__

if TYPE_CHECKING:
    from lightning_dgmp.monitor import DelayedMPMonitor
    from lightning_dgmp.plan import Plan, PlanError
    from lightning_dgmp.strategy import DelayedMPStrategy

__all__ = ["DelayedMPMonitor", "DelayedMPStrategy", "Plan", "PlanError", "__version__"]


def __getattr__(name: str) -> Any:  # late, because the strategy belongs to the Lightning that the project imports
    if name == "DelayedMPMonitor":
        from lightning_dgmp.monitor import DelayedMPMonitor

        return DelayedMPMonitor
    if name == "DelayedMPStrategy":
        from lightning_dgmp.strategy import DelayedMPStrategy

        return DelayedMPStrategy
    if name in __all__:
        from lightning_dgmp import plan

        return getattr(plan, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
