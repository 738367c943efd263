"""Versions of a stage's parameters: what a delayed backward differentiates with respect to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["drop_storage", "restore_storage", "take_snapshot"]


def take_snapshot(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of the trainable ``parameters``, connected to them by autograd.

    A graph built on the copies keeps today's values whatever the optimizer does to the parameters, and its backward
    still accumulates into them, through their own ``AccumulateGrad`` nodes, so hooks on those fire. Frozen parameters
    are not copied: one that is unfrozen later changes when this version of it is not needed any more.
    """
    with torch.enable_grad():
        return {name: p.clone() if p.requires_grad else p.detach() for name, p in parameters.items()}


def drop_storage(parameter: nn.Parameter) -> None:
    """Make ``parameter`` a *shadow*: the shape, dtype and device stay, the values go (one element of storage).

    What reads a shadow gets NaN, which is seen, and not zeros, which are not.
    """
    value = float("nan") if parameter.dtype.is_floating_point or parameter.dtype.is_complex else 0
    nothing = torch.full((), value, dtype=parameter.dtype, device=parameter.device)
    parameter.data = nothing.expand(parameter.shape)
    parameter.grad = None


def restore_storage(parameter: nn.Parameter) -> None:
    """Give a shadow storage again; its values are undefined."""
    parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
