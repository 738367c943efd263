"""Clipping by the norm of all gradients, of which a process has those of its stage alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dgmp.host import LightningModule, MisconfigurationException, is_overridden

__all__ = ["after_clipping", "clipping_by_total_norm", "clips_by_norm"]


def clips_by_norm(module: LightningModule) -> bool:
    """Whether gradients are, or may be, clipped by norm."""
    trainer = module.trainer
    by_norm = str(trainer.gradient_clip_algorithm or "norm").lower().endswith("norm")
    return bool(trainer.gradient_clip_val and by_norm) or is_overridden("configure_gradient_clipping", module)


@contextmanager
def clipping_by_total_norm(parts: Sequence[tuple[Sequence[nn.Parameter], Callable[[], Tensor]]]) -> Iterator[None]:
    """Let ``torch.nn.utils.clip_grad_norm_``, which Lightning calls and users may, take the norm of all stages.

    Args:
        parts: For each stage of this process its parameters, and what tells the norm of all gradients.
    """
    original = torch.nn.utils.clip_grad_norm_

    def clip_grad_norm_(
        parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0, *args: Any, **kwargs: Any
    ) -> Tensor:
        given = {id(p) for p in ([parameters] if isinstance(parameters, Tensor) else parameters)}
        if norm_type != 2.0:
            raise MisconfigurationException(
                "`strategy='delayed_mp'` clips by the 2-norm of all gradients, or by value, but `norm_type="
                f"{norm_type}`. Use `norm_type=2`."
            )
        norm = torch.zeros(())
        for own, total_norm in parts:
            trained = [p for p in own if p.grad is not None]
            if not all(id(p) in given for p in trained):
                raise MisconfigurationException(
                    "`strategy='delayed_mp'` clips by the norm of all gradients, which stages tell each other, but"
                    " `clip_grad_norm_` was called for some of the parameters. Pass it all that have gradients, as"
                    " `self.parameters()`."
                )
            norm = total_norm()
            torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
        return norm

    torch.nn.utils.clip_grad_norm_ = clip_grad_norm_  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.utils.clip_grad_norm_ = original


@contextmanager
def after_clipping(module: LightningModule, then: Callable[[], None]) -> Iterator[None]:
    """Call ``then()`` when Lightning or the user's hook has clipped the gradients, also if there is nothing to do."""
    original = module.configure_gradient_clipping

    def configure_gradient_clipping(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        then()

    module.__dict__["configure_gradient_clipping"] = configure_gradient_clipping
    try:
        yield
    finally:
        del module.__dict__["configure_gradient_clipping"]
