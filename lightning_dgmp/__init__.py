"""Pipeline model parallelism with delayed gradients for PyTorch Lightning.

Importing the package registers ``Trainer(strategy="delayed_mp")``.
"""

from lightning_dgmp.host import StrategyRegistry
from lightning_dgmp.plan import Plan, PlanError
from lightning_dgmp.strategy import DelayedMPStrategy
from lightning_dgmp.version import __version__

__all__ = ["DelayedMPStrategy", "Plan", "PlanError", "__version__"]


if "delayed_mp" not in StrategyRegistry:
    DelayedMPStrategy.register_strategies(StrategyRegistry)
