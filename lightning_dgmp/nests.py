"""Nests: the lists, dicts, dataclasses and the like in which calls take and return tensors."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections import UserDict, deque
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from lightning_dgmp.objects import attributes_of, has_attributes, set_attributes

__all__ = [
    "Form", "copied_tensors", "has_same_bytes", "is_dense", "is_same", "join", "leaves", "map_leaves", "map_tensors",
    "marks", "objects_in", "replace_leaves", "split", "tensors_in", "values_in", "with_items",
]  # fmt: skip

_LEAVES = (Tensor, type(None), int, float, str, bytes)  # the common ones, to be quick
_MAPPINGS = (dict, MutableMapping)  # abstract classes are slow
_MAX_ITEMS = 100  # of a container in an object; larger ones are data, as vocabularies, and not looked into
_MAX_COMPARED = 2**12  # elements of a tensor whose values are compared; marks are kept for a while


def map_leaves(fn: Callable[[Any], Any], obj: Any) -> Any:
    """Rebuild ``obj`` with ``fn`` applied to every leaf.

    Lists, tuples, deques, dicts, other mappings, dataclasses and slices are nests, everything else is a leaf.
    """
    if isinstance(obj, _LEAVES):
        return fn(obj)
    if isinstance(obj, deque):
        return deque((map_leaves(fn, item) for item in obj), obj.maxlen)
    if isinstance(obj, (list, tuple)):
        return with_items(obj, [map_leaves(fn, item) for item in obj])
    if type(obj) is dict:
        return {key: map_leaves(fn, value) for key, value in obj.items()}
    if isinstance(obj, slice):
        return slice(*(map_leaves(fn, part) for part in (obj.start, obj.stop, obj.step)))
    if isinstance(obj, _MAPPINGS):  # also the outputs of Hugging Face models, which are dataclasses besides
        if isinstance(obj, (dict, UserDict)):
            mapping: MutableMapping[Any, Any] = copy.copy(obj)
        else:  # a shallow copy may keep its items where the original does
            mapping = copy.deepcopy(obj, {id(leaf): leaf for leaf in leaves(obj)})
        for key, value in obj.items():
            mapping[key] = map_leaves(fn, value)
        return mapping
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        copied: Any = copy.copy(obj)
        for field in dataclasses.fields(obj):
            object.__setattr__(copied, field.name, map_leaves(fn, getattr(obj, field.name)))
        return copied
    return fn(obj)


def with_items(obj: Any, items: list[Any]) -> Any:
    """A list or tuple like ``obj`` of other ``items``; named tuples that check theirs cannot know what these are."""
    return tuple.__new__(type(obj), items) if hasattr(obj, "_fields") else type(obj)(items)


def replace_leaves(fn: Callable[[Any], Any], obj: Any, seen: set[int] | None = None) -> Any:
    """``obj`` with ``fn(leaf)`` in the place of each of :func:`values_in`.

    Its lists, mappings and objects stay the same objects, of which ``seen`` are those that have been met.
    """
    if isinstance(obj, _LEAVES):
        return fn(obj)
    if seen is not None and _is_large(obj):
        return obj
    if isinstance(obj, (list, deque, *_MAPPINGS)):
        for key, value in obj.items() if isinstance(obj, _MAPPINGS) else enumerate(obj):
            if (new := replace_leaves(fn, value, seen)) is not value:
                obj[key] = new
        return obj
    if isinstance(obj, tuple):
        items = [replace_leaves(fn, item, seen) for item in obj]
        if all(a is b for a, b in zip(items, obj)):
            return obj
        return with_items(obj, items)
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        for field in dataclasses.fields(obj):
            value = getattr(obj, field.name)
            if (new := replace_leaves(fn, value, seen)) is not value:
                object.__setattr__(obj, field.name, new)
        return obj
    if has_attributes(obj):
        seen = set() if seen is None else seen
        if id(obj) not in seen:
            seen.add(id(obj))
            attributes = attributes_of(obj)
            replaced = {name: replace_leaves(fn, value, seen) for name, value in attributes.items()}
            if any(replaced[name] is not value for name, value in attributes.items()):
                set_attributes(obj, replaced)
        return obj
    return map_leaves(fn, obj)


def _is_large(obj: Any) -> bool:
    return isinstance(obj, (list, tuple, deque, *_MAPPINGS)) and len(obj) > _MAX_ITEMS


def leaves(obj: Any) -> list[Any]:
    """All leaves of the nest ``obj``, in the order of :func:`map_leaves`."""
    found: list[Any] = []
    _collect(obj, found)
    return found


def _collect(obj: Any, found: list[Any]) -> None:
    if isinstance(obj, _LEAVES):
        found.append(obj)
    elif isinstance(obj, (list, tuple, deque)):
        for item in obj:
            _collect(item, found)
    elif isinstance(obj, _MAPPINGS):
        for item in obj.values():
            _collect(item, found)
    elif isinstance(obj, slice):
        _collect((obj.start, obj.stop, obj.step), found)
    elif dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        for field in dataclasses.fields(obj):
            _collect(getattr(obj, field.name), found)
    else:
        found.append(obj)


def objects_in(nest: Any) -> list[Any]:
    """The objects of the user's classes that are leaves of ``nest``."""
    return [leaf for leaf in leaves(nest) if has_attributes(leaf)]


def values_in(nest: Any) -> list[Any]:
    """The leaves of ``nest``, with those in the attributes of objects of the user's classes, of which each counts once.

    So a value has a number also in a graph or the like that modules take, change and return.
    """
    waiting = leaves(nest)
    if not any(map(has_attributes, waiting)):
        return waiting
    found: list[Any] = []
    seen: set[int] = set()
    waiting.reverse()
    while waiting:
        item = waiting.pop()
        if isinstance(item, (list, tuple, deque, *_MAPPINGS)):
            items = item.values() if isinstance(item, _MAPPINGS) else item
            waiting += [] if _is_large(item) else reversed(list(items))
        elif not has_attributes(item):
            found.append(item)
        elif id(item) not in seen:
            seen.add(id(item))
            waiting += reversed(attributes_of(item).values())
    return found


def map_tensors(fn: Callable[[Any], Any], obj: Any) -> Any:
    """Rebuild the nest ``obj`` with ``fn`` applied to every tensor."""
    return map_leaves(lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf, obj)


def copied_tensors(obj: Any) -> Any:
    """The nest ``obj`` with copies of its tensors."""
    return map_tensors(Tensor.clone, obj)


def tensors_in(obj: Any, kind: type = Tensor) -> list[Any]:
    """The tensors of type ``kind`` in a nest, in order."""
    return [leaf for leaf in leaves(obj) if isinstance(leaf, kind)]


def marks(value: Any, max_compared: float = _MAX_COMPARED) -> list[Any]:
    """What tells whether ``value`` is still the same, without keeping its tensors.

    Writes through ``.data`` show in the values alone, of which those of larger tensors are not looked at.
    """
    return [_keys(value), *(_mark(leaf, max_compared) for leaf in leaves(value))]


def is_same(before: list[Any] | None, value: Any) -> bool:
    """Whether ``value`` is as it was when its :func:`marks` were ``before``."""
    items = leaves(value)
    if before is None or len(before) != len(items) + 1 or before[0] != _keys(value):
        return False
    return all(map(_is_same_leaf, before[1:], items))


def _keys(value: Any) -> Any:
    """Those of the mappings in a nest."""
    if isinstance(value, _MAPPINGS):
        return [(key, _keys(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple, deque)) and not all(isinstance(item, _LEAVES) for item in value):
        return [_keys(item) for item in value]
    return None


class _TensorMark(NamedTuple):
    tensor: weakref.ref[Tensor]
    looks: tuple[int, int] | None
    content: Tensor | None


def _mark(leaf: Any, max_compared: float) -> Any:
    if isinstance(leaf, Tensor):
        is_compared = type(leaf) is Tensor and leaf.numel() <= max_compared
        return _TensorMark(weakref.ref(leaf), _looks(leaf), leaf.detach().clone() if is_compared else None)
    return leaf.copy() if isinstance(leaf, (numpy.ndarray, set)) else leaf


def _is_same_leaf(mark: Any, leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        if not isinstance(mark, _TensorMark) or mark.tensor() is not leaf or not mark.looks == _looks(leaf) is not None:
            return False
        return mark.content is None or has_same_bytes(leaf, mark.content) is not False
    if isinstance(leaf, (set, frozenset)):
        return type(mark) is type(leaf) and bool(mark == leaf)
    if not isinstance(leaf, (*_LEAVES, complex, numpy.ndarray, numpy.generic)):
        return mark is leaf
    return type(mark) is type(leaf) and bool(numpy.array_equal(mark, leaf))  # type: ignore[arg-type]


def _looks(tensor: Tensor) -> tuple[int, int] | None:
    """Its version, and where it is: another place can be assigned to ``.data``."""
    with torch._C.DisableTorchFunctionSubclass():  # to ask this is no operation
        if tensor.is_inference():
            return None
    has_place = type(tensor) is Tensor and tensor.layout == torch.strided
    return tensor._version, tensor.data_ptr() if has_place else 0


def has_same_bytes(tensor: Tensor, other: Tensor) -> bool | None:
    """Whether two tensors of a kind have the same values, NaNs too; ``None`` if their kind cannot be compared."""
    is_known = type(tensor) is Tensor and is_dense(tensor) and tensor.device.type != "meta"
    if not is_known or tensor.is_quantized or tensor.is_conj():
        return None
    return torch.equal(*(t.detach().contiguous().flatten().view(torch.uint8) for t in (tensor, other)))


class Form:
    """What stands for a tensor where the tensor itself travels beside the rest of its nest."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.device = tensor.device  # a `PackedSequence` looks at that of its items when it is unpickled
        is_full = tensor.layout == torch.strided and torch.ops.aten.is_non_overlapping_and_dense.default(tensor)
        self.stride = tensor.stride() if is_full and not tensor.is_contiguous() else None

    def lay_out(self, tensor: Tensor) -> Tensor:
        """The received ``tensor`` with the strides of the original."""
        if self.stride is None or tensor.stride() == self.stride:
            return tensor
        return torch.empty_strided(self.shape, self.stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def is_dense(leaf: Any) -> bool:
    """Whether a leaf is a tensor whose shape and type say how its values are laid out."""
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_nested


def split(nest: Any) -> tuple[Any, list[Tensor]]:
    """The nest with forms for its dense tensors, and these tensors."""
    form = map_leaves(lambda leaf: Form(leaf) if is_dense(leaf) else leaf, nest)
    return form, [leaf for leaf in leaves(nest) if is_dense(leaf)]


def join(form: Any, tensors: Sequence[Any]) -> Any:
    """The opposite of :func:`split`.

    Raises:
        ValueError: If there are not as many tensors as forms.
    """
    num_forms = sum(isinstance(leaf, Form) for leaf in leaves(form))
    if num_forms != len(tensors):
        raise ValueError(
            f"A nest must get a tensor for each of its {num_forms} places, but got {len(tensors)}. If a class of your"
            " own is in the nest, make its `items()` the same after pickling."
        )
    rest = iter(tensors)
    return map_leaves(lambda leaf: leaf.lay_out(next(rest)) if isinstance(leaf, Form) else leaf, form)
