"""Parcels: containers with objects of any class, on their way to another process."""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_dgmp.ghost import check_sent, realised
from lightning_dgmp.host import Trainer

__all__ = ["Parcel", "can_be_pickled", "pack", "unpack"]


class Parcel(NamedTuple):
    """A pickled object, and the tensors in it, which travel as others do."""

    data: bytes
    tensors: list[Tensor]


def can_be_pickled(value: Any) -> bool:
    """Whether ``value`` can be sent as it is."""
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True


def pack(value: Any, known: Mapping[int, str]) -> Parcel:
    """A parcel with ``value``, in which names stand for modules whose ``id`` is ``known``.

    Raises:
        Exception: Of any kind, if something in it cannot be pickled, has no value, or is a trainer, or a module but
            no metric.
    """
    file = io.BytesIO()
    pickler = _Pickler(file, known)
    pickler.dump(value)
    check_sent(pickler.tensors)
    return Parcel(file.getvalue(), pickler.tensors)


def unpack(parcel: Parcel, before: Any, known: Mapping[str, nn.Module]) -> Any:
    """What was packed, with the ``known`` modules of this process.

    A ``defaultdict`` whose factory could not be sent gets that of its like in ``before``.
    """
    value = _Unpickler(io.BytesIO(parcel.data), parcel.tensors, known).load()
    _give_factories(value, before)
    return value


class _Pickler(pickle.Pickler):
    def __init__(self, file: Any, known: Mapping[int, str]) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._known = known

    def persistent_id(self, obj: Any) -> int | str | None:
        if isinstance(obj, nn.Module):
            return self._known.get(id(obj))
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(realised(obj))
        return len(self.tensors) - 1

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (nn.Module, Trainer)) and not isinstance(obj, (Metric, MetricCollection)):
            raise pickle.PicklingError(f"it holds a {type(obj).__name__}")
        if isinstance(obj, defaultdict) and not can_be_pickled(obj.default_factory):
            return type(obj), (_unsent,), None, None, iter(obj.items())
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, tensors: list[Tensor], known: Mapping[str, nn.Module]) -> None:
        super().__init__(file)
        self._tensors, self._known = tensors, known

    def persistent_load(self, pid: int | str) -> Tensor | nn.Module:
        return self._tensors[pid] if isinstance(pid, int) else self._known[pid]


def _unsent() -> Any:
    raise RuntimeError(
        "The factory of a `defaultdict` that a step has filled must be known on all stages, but one that cannot be"
        " pickled came from the last stage: use a function of a module instead of a lambda, or make the `defaultdict`"
        " in `__init__`."
    )


def _give_factories(value: Any, before: Any) -> None:
    if isinstance(value, defaultdict) and value.default_factory is _unsent and isinstance(before, defaultdict):
        value.default_factory = before.default_factory
    if isinstance(value, dict):
        known = before if isinstance(before, dict) else {}
        factory = getattr(value, "default_factory", None)
        for key, item in value.items():
            if isinstance(item, dict):
                _give_factories(item, known[key] if key in known else factory and factory())
