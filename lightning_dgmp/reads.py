"""What reads values of tensors, so that code may go another way, or shapes may follow, than with other values."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dgmp.ghost import Ghost
from lightning_dgmp.nests import tensors_in

if TYPE_CHECKING:
    from lightning_dgmp.operations import GhostMode

__all__ = ["READS", "answer_to_check", "is_mask", "noting_reads"]

#: The names of functions and methods that give Python a value.
READS = frozenset(
    """
    item tolist numpy __array__ __bool__ __float__ __int__ __index__ __complex__ __format__ __contains__ __str__
    backward equal allclose is_nonzero data_ptr untyped_storage storage __dlpack__ apply_ map_ map2_
    """.split()  # noqa: SIM905
)
#: Functions of torch that ask whether arguments are valid, and what they hope for.
_CHECKS = {
    ("torch.distributions.distribution", "__init__"): True,
    ("torch.distributions.distribution", "_validate_sample"): True,
    ("torch.distributions.constraints", "check"): True,
    ("torch.distributions.continuous_bernoulli", "__init__"): True,
    ("torch.distributions.geometric", "__init__"): True,
    ("torch.nn.functional", "gaussian_nll_loss"): False,
}
_BETWEEN = ("lightning_dgmp.", "torch._dynamo.", "torch._compile")  # modules whose frames lie before that of the asker
_DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _NotingReads(TorchFunctionMode):
    def __init__(self, mode: GhostMode) -> None:
        self._ghosts = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, mode = kwargs or {}, self._ghosts
        if getattr(func, "__name__", "") in READS:  # of a ghost nothing is read; but for checks, this is its end
            mode.has_read_values |= not isinstance(args[0], Ghost) or args[0].bound
        out = func(*args, **kwargs)
        if mode.stale and any(mode.is_stale(tensor) for tensor in tensors_in((args, kwargs))):
            mode.stale += [tensor for tensor in tensors_in(out) if not isinstance(tensor, Ghost)]
        return out


class _NotingShapes(TorchDispatchMode):
    """Sees operations whose results have shapes, or are numbers, that depend on values."""

    def __init__(self, mode: GhostMode) -> None:
        super().__init__()
        self._ghosts = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor:
            self._ghosts.has_read_values |= any(is_mask(index) for index in args[1])
        elif func is torch.ops.aten._pack_padded_sequence.default or not _DEPENDS_ON_VALUES.isdisjoint(func.tags):
            self._ghosts.has_read_values = True
        return func(*args, **(kwargs or {}))


@contextmanager
def noting_reads(mode: GhostMode) -> Iterator[None]:
    """Note in ``mode.has_read_values`` whether values of real tensors decide what code does, or shapes.

    Also note in ``mode.stale`` what is made of tensors that only their owner changes.
    """
    with _NotingReads(mode), _NotingShapes(mode):
        yield


def answer_to_check() -> bool | None:
    """What a check of torch hopes for that wants a truth value now; ``None`` if something else wants it.

    Where the values are, they are checked.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (module := frame.f_globals.get("__name__", "")).startswith(_BETWEEN):
        frame = frame.f_back
    return None if frame is None else _CHECKS.get((module, frame.f_code.co_name))


def is_mask(index: Any) -> bool:
    """Whether an index selects by its values."""
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
