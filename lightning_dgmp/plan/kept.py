"""What a forward keeps for its backward."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor

from lightning_dgmp.ghost import Ghost, looks_of
from lightning_dgmp.nests import map_tensors, tensors_in
from lightning_dgmp.operations import GhostMode

__all__ = ["Checkpoints", "Graph"]

_SMALL = 256  # elements of a real tensor whose values an operation may want
_MAX_RESULTS = 10_000
_LOG = logging.getLogger("torch._subclasses.fake_tensor")
_KEPT: dict[Any, list[_Kept]] = {}  # for all traces, so that nothing is found out twice


class _Kept(NamedTuple):
    """A memory that is kept: that of the n-th tensor that goes in or comes out, or one that nobody else sees."""

    place: int | None
    nbytes: int


class Graph:
    """Tells what autograd keeps of operations on ghosts: they run once more, on fakes, as parts of a graph.

    Args:
        mode: The family of the ghosts.
        numbers: Where numbers of memories come from that no ghost has.
    """

    def __init__(self, mode: GhostMode, numbers: itertools.count[int]) -> None:
        self._mode, self._numbers = mode, numbers
        self._real: dict[int, tuple[int, Tensor]] = {}  # their numbers; held, so that no other has their place

    def kept(
        self, func: Any, args: Any, kwargs: Mapping[str, Any], outputs: list[Ghost], changed: Ghost | None
    ) -> dict[int, int]:
        """The bytes of each memory, by its number, that the backward of an operation needs.

        Args:
            func: The operation.
            args: Its arguments.
            kwargs: The others.
            outputs: What it has returned.
            changed: The ghost that it has changed in place, if any.
        """
        tensors = list({id(tensor): tensor for tensor in tensors_in((args, kwargs))}.values())
        if not torch.is_grad_enabled() or not any(t.needs_grad for t in (*tensors, *outputs) if isinstance(t, Ghost)):
            return {}
        with torch._C.DisableTorchFunctionSubclass():
            autocast = [torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in ("cpu", "cuda")]
            key = func, changed is None, *autocast, looks_of(args), looks_of(dict(kwargs))
            kept = _KEPT.get(key)
            if kept is None:
                if len(_KEPT) >= _MAX_RESULTS:
                    _KEPT.clear()
                kept = _KEPT[key] = self._run(func, args, kwargs, tensors, changed)
            everything = [*tensors, *outputs]
            found: dict[int, int] = {}
            for place, nbytes in kept:
                if place is None:
                    found[next(self._numbers)] = nbytes
                elif place < len(everything):
                    number, size = self._memory(everything[place])
                    found[number] = max(size, found.get(number, 0))
            return found

    def _run(
        self, func: Any, args: Any, kwargs: Mapping[str, Any], tensors: list[Tensor], changed: Ghost | None
    ) -> list[_Kept]:
        places: dict[int, int] = {}
        seen: dict[int, Tensor] = {}

        def note(tensor: Tensor) -> Tensor:
            if tensor.layout == torch.strided:
                seen.setdefault(_storage(tensor), tensor)
            return tensor

        is_quiet, _LOG.disabled = _LOG.disabled, True
        try:
            with self._mode.fake_mode, torch.enable_grad():
                stand_ins = {id(tensor): _stand_in(tensor, tensor is changed) for tensor in tensors}
                for place, tensor in enumerate(tensors):
                    places.setdefault(_storage(stand_ins[id(tensor)]), place)
                inside = [map_tensors(lambda t: stand_ins[id(t)], nest) for nest in (args, dict(kwargs))]
                with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                    returned = func(*inside[0], **inside[1])
        except Exception:  # it does not run so: what goes in and comes out
            return [_Kept(place, 0) for place in range(len(tensors) + 1)]
        finally:
            _LOG.disabled = is_quiet
        for place, tensor in enumerate(tensors_in(returned)):
            places.setdefault(_storage(tensor), len(tensors) + place)
        return [_Kept(places.get(storage), tensor.untyped_storage().nbytes()) for storage, tensor in seen.items()]

    def _memory(self, tensor: Tensor) -> tuple[int, int]:
        """The number of the memory of a tensor, below zero for real ones, and its size in bytes."""
        if isinstance(tensor, Ghost):
            return tensor.storage_id, tensor.fake.untyped_storage().nbytes()
        number, _ = self._real.setdefault(_storage(tensor), (-next(self._numbers), tensor))
        return number, tensor.untyped_storage().nbytes()


def _stand_in(tensor: Tensor, is_changed: bool) -> Tensor:
    """A fake in a memory of its own, or a real tensor whose values may be wanted."""
    is_ghost = isinstance(tensor, Ghost)
    if not is_ghost and (tensor.layout != torch.strided or tensor.numel() < _SMALL):
        return tensor.detach()
    like = tensor.fake if isinstance(tensor, Ghost) else tensor
    fake = torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=like.device)
    if tensor.needs_grad if isinstance(tensor, Ghost) else tensor.requires_grad:
        fake.requires_grad_()
    return fake.clone() if is_changed else fake  # a leaf cannot be changed


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else id(tensor)


class Checkpoints:
    """Numbers the functions of activation checkpointing, which leave no other trace than their frames."""

    def __init__(self) -> None:
        self._frame: FrameType | None = None  # held, so that no later frame has its place
        self._count = -1

    def current(self) -> int | None:
        """The number of the outermost one that is running."""
        frame: FrameType | None = sys._getframe(1)
        outermost = None
        while frame is not None:
            if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
                outermost = frame
            frame = frame.f_back
        if outermost is None:
            self.forget()
            return None
        if outermost is not self._frame:
            self._frame = outermost
            self._count += 1
        return self._count

    def forget(self) -> None:
        self._frame = None
