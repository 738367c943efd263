"""Clipping by the norm of all gradients, of which a process has those of its stage alone.

``torch.nn.utils.clip_grad_norm_``, which Lightning calls and users may under any name, measures and scales by two
private functions of its module, which are exchanged while a pipeline trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.optim import Optimizer

from lightning_dgmp.host import LightningModule, MisconfigurationException, is_overridden

__all__ = ["Part", "after_clipping", "clip_by_total_norm", "clips_by_norm", "updated_by"]


class Part(NamedTuple):
    """A stage, as far as clipping is concerned.

    Attributes:
        parameters: Those that the optimizer updates.
        total_norm: Tells the norm of the gradients of all stages, as far as this one knows it.
        note: Is told by what the gradients were multiplied.
    """

    parameters: Sequence[nn.Parameter]
    total_norm: Callable[[], Tensor]
    note: Callable[[Tensor], None]


def clips_by_norm(module: LightningModule) -> bool:
    """Whether gradients are, or may be, clipped by norm."""
    trainer = module.trainer
    by_norm = str(trainer.gradient_clip_algorithm or "norm").lower().endswith("norm")
    hooks = "configure_gradient_clipping", "on_before_optimizer_step", "on_after_backward", "optimizer_step"
    return bool(trainer.gradient_clip_val and by_norm) or any(is_overridden(hook, module) for hook in hooks)


def updated_by(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those of ``parameters`` that ``optimizers`` update."""
    updated = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return [parameter for parameter in parameters if parameter in updated]


def clip_by_total_norm(
    parts: Callable[[], Sequence[Part]], gradients: Callable[[], Iterable[Tensor]]
) -> Callable[[], None]:
    """Let ``torch.nn.utils.clip_grad_norm_`` take the norm of all stages, from now on.

    Args:
        parts: The stages of this process now; none: the norm is not known.
        gradients: Those that it concerns; what is called with others does what it always does.

    Returns:
        What undoes it.
    """
    norms: list[Tensor] = []

    def get_total_norm(
        tensors: Iterable[Tensor], norm_type: float = 2.0, error_if_nonfinite: bool = False, *args: Any
    ) -> Tensor:
        tensors, known = list(tensors), parts()
        given = {id(grad) for grad in tensors}
        if not any(id(grad) in given for grad in gradients()):
            return measure(tensors, norm_type, error_if_nonfinite, *args)
        if not known:
            raise MisconfigurationException(
                "`strategy='delayed_mp'` clips by the norm of all gradients, which stages tell each other if they know"
                " that it is wanted. Clip by `Trainer(gradient_clip_val=...)`, or in the LightningModule's hook"
                " `configure_gradient_clipping`."
            )
        if norm_type != 2.0:
            raise MisconfigurationException(
                "`strategy='delayed_mp'` clips by the 2-norm of all gradients, or by value, but `norm_type="
                f"{norm_type}`. Use `norm_type=2`."
            )
        norms.clear()
        for part in known:
            if not all(id(p.grad) in given for p in part.parameters if p.grad is not None):
                raise MisconfigurationException(
                    "`strategy='delayed_mp'` clips by the norm of all gradients, which stages tell each other, but"
                    " `clip_grad_norm_` was called for some of the parameters. Pass it all that have gradients, as"
                    " `self.parameters()`."
                )
            norms.append(part.total_norm())
            if error_if_nonfinite and not norms[-1].isfinite():
                raise RuntimeError("The norm of all gradients is not finite, so they cannot be clipped.")
        return norms[-1]

    def clip_grads_with_norm_(parameters: Any, max_norm: float, total_norm: Tensor, *args: Any) -> None:
        if not any(total_norm is norm for norm in norms):
            scale(parameters, max_norm, total_norm, *args)
            return
        for part, norm in zip(parts(), norms):
            scale([p for p in part.parameters if p.grad is not None], max_norm, norm, *args)
            part.note((float(max_norm) / (norm + 1e-6)).clamp(max=1.0))

    measure, scale = clip_grad._get_total_norm, clip_grad._clip_grads_with_norm_
    clip_grad._get_total_norm, clip_grad._clip_grads_with_norm_ = get_total_norm, clip_grads_with_norm_  # type: ignore[assignment]

    def undo() -> None:
        clip_grad._get_total_norm, clip_grad._clip_grads_with_norm_ = measure, scale

    return undo


@contextmanager
def after_clipping(module: LightningModule, then: Callable[[], None]) -> Iterator[None]:
    """Call ``then()`` when Lightning or the user's hook has clipped the gradients, also if there is nothing to do."""
    own, original = module.__dict__.get("configure_gradient_clipping"), module.configure_gradient_clipping

    def configure_gradient_clipping(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        then()

    module.__dict__["configure_gradient_clipping"] = configure_gradient_clipping
    try:
        yield
    finally:
        del module.__dict__["configure_gradient_clipping"]
        if own is not None:
            module.__dict__["configure_gradient_clipping"] = own
