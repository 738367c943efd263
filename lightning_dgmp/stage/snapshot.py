"""Versions of a stage's parameters: what a delayed backward differentiates with respect to."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
from torch import Tensor, nn

__all__ = ["as_leaf", "take_snapshot"]


def take_snapshot(parameters: Mapping[str, nn.Parameter], have_trained: Set[str] = frozenset()) -> dict[str, Tensor]:
    """Copies of the trainable ``parameters``, connected to them by autograd.

    A graph built on the copies keeps today's values whatever the optimizer does to the parameters, and its backward
    still accumulates into them, through their own ``AccumulateGrad`` nodes, so hooks on those fire. Frozen parameters
    are not copied: one that is unfrozen later changes when this version of it is not needed any more. But gradients of
    those that ``have_trained``, by name, may still be on their way.
    """

    def copied(name: str, parameter: nn.Parameter) -> Tensor:
        if parameter.requires_grad:
            return parameter.clone()
        return parameter.detach().clone() if name in have_trained else parameter.detach()

    with torch.enable_grad():
        return {name: copied(name, parameter) for name, parameter in parameters.items()}


def as_leaf(weight: Tensor) -> Tensor:
    """``weight`` with a ``.grad`` of its own, so that hooks on the parameter see nothing of it."""
    return weight.detach().requires_grad_(weight.requires_grad)
