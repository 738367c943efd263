"""Versions of a stage's parameters and buffers: what a delayed backward differentiates with, and with respect to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["as_leaf", "buffers_kept", "take_snapshot"]


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


@contextmanager
def buffers_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let a graph that is built meanwhile keep the values of buffers of ``modules``, whatever is done to them later.

    Aliases stand in their places meanwhile. Where a graph needs the memory of one afterwards, it keeps that, and the
    buffer, which stays the same tensor, goes on in a copy; nothing else is copied. A buffer whose memory other tensors
    share is left alone, and so are statistics that training does not differentiate.
    """
    aliases: dict[Tensor, Tensor] = {}
    for module in modules:
        if isinstance(module, _NormBase) and module.training:
            continue
        for name, buffer in module._buffers.items():
            if buffer in aliases:  # in several places
                module._buffers[name] = aliases[buffer]
            elif type(buffer) is Tensor and not buffer.requires_grad and _num_users(buffer) == _ALONE:
                module._buffers[name] = aliases[buffer] = buffer.data
    try:
        yield
    finally:
        originals = {id(alias): buffer for buffer, alias in aliases.items()}
        for module in modules:
            for name, now in module._buffers.items():
                module._buffers[name] = originals.get(id(now), now)
        now = None
        aliases.clear()
        for buffer in originals.values():
            if _num_users(buffer) != _ALONE:
                buffer.data = buffer.clone()


def _num_users(tensor: Tensor) -> int:
    """How many tensors share the memory of a tensor, or more by a constant; 0 for those without a memory."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else 0


_ALONE = _num_users(torch.empty(()))
