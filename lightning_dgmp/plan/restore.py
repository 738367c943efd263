"""Runs of user code that leave nothing behind in modules and generators, or see them as they once were."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from lightning_dgmp.ghost import Ghost
from lightning_dgmp.nests import has_same_bytes, is_same, marks
from lightning_dgmp.objects import MAX_ITEMS, is_object_of_user

__all__ = [
    "attributes_of_now",
    "attributes_saved",
    "generators_in",
    "get_state",
    "is_plain",
    "set_state",
    "untouched",
]

_Generator = (torch.Generator, numpy.random.Generator, numpy.random.RandomState, random.Random)


@contextmanager
def untouched(root: nn.Module, device: torch.device) -> Iterator[None]:
    """Put the attributes and buffers of all modules, and the random state, back to what they were."""
    restore = attributes_saved(root)
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        restore()
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)


def attributes_saved(*roots: Any) -> Callable[[], None]:
    """A function that puts the attributes and buffers of modules and objects of the user back to what they are now.

    Submodules count, containers at any depth, and objects in these; tensors and arrays get their values back in place.
    """
    containers = [(container, container.copy()) for container in _containers(roots)]
    undo = [_save_item(item) for _, kept in containers for item in _items(kept)]

    def restore() -> None:
        for container, kept in containers:
            _fill(container, kept)
        for step in undo:
            if step is not None:
                step()

    return restore


def attributes_of_now(*roots: Any) -> Callable[[], AbstractContextManager[None]]:
    """A function that lets modules and objects have the attributes and buffers of now for a while, later."""
    moment = [(c, _copied(c)) for c in _containers(roots) if len(c) <= MAX_ITEMS]
    generators = [(item, get_state(item)) for c, _ in moment for item in _items(c) if isinstance(item, _Generator)]

    @contextmanager
    def held() -> Iterator[None]:
        later = [(container, container.copy()) for container, _ in moment]
        later_states = [(generator, get_state(generator)) for generator, _ in generators]
        for container, kept in moment:
            _fill(container, kept)
        for generator, state in generators:
            set_state(generator, state)
        try:
            yield
        finally:
            for container, kept in later:
                _fill(container, kept)
            for generator, state in later_states:
                set_state(generator, state)

    return held


def _containers(roots: Iterable[Any]) -> Iterator[Any]:
    """The dicts, lists, sets and deques in the attributes of ``roots``, the attributes themselves first.

    Modules and objects count too that only containers and objects hold.
    """
    seen: set[int] = set()
    waiting: list[Any] = list(roots)
    while waiting:
        item = waiting.pop()
        if isinstance(item, tuple):
            waiting.extend(item)
            continue
        if not isinstance(item, (dict, list, set, deque)):
            if not (isinstance(item, nn.Module) or is_object_of_user(item)):
                continue
            item = vars(item)
        if id(item) not in seen:
            seen.add(id(item))
            yield item
            if len(item) <= MAX_ITEMS:
                waiting.extend(_items(item))


def _items(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


def _fill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, (list, deque)) else container.update(content)


def _copied(container: Any) -> Any:
    """A copy of a container with copies of the tensors and arrays in it."""
    copy = container.copy()
    if isinstance(copy, dict):
        copy.update({key: _copied_item(item) for key, item in copy.items()})
    elif isinstance(copy, (list, deque)):
        for i, item in enumerate(copy):
            copy[i] = _copied_item(item)
    return copy


def _copied_item(item: Any) -> Any:
    if is_plain(item):
        return item.detach().clone() if not item.requires_grad else item
    return item.copy() if isinstance(item, numpy.ndarray) else item


def _save_item(item: Any) -> Callable[[], None] | None:
    if is_plain(item) and not isinstance(item, Ghost):
        return _save_tensor(item)
    if isinstance(item, _Generator):
        state = get_state(item)
        return lambda: set_state(item, state)
    if isinstance(item, numpy.ndarray) and item.flags.writeable:
        kept = item.copy()
        return lambda: numpy.copyto(item, kept)
    return None


def _save_tensor(tensor: Tensor) -> Callable[[], None]:
    before, kept = marks(tensor, max_compared=0), tensor.detach().clone()
    alias = tensor.data if type(tensor) is Tensor else tensor

    def restore() -> None:
        if alias is not tensor:
            tensor.data = alias  # instead of what has been assigned to it
        is_kept = has_same_bytes(alias, kept)  # writes through `.data` have no version
        if not (is_same(before, tensor) if is_kept is None else is_kept):
            with torch.no_grad(), torch.inference_mode(alias.is_inference()):
                alias.copy_(kept)

    return restore


def generators_in(root: nn.Module) -> list[Any]:
    """The random generators in the attributes of ``root`` and its modules, each once."""
    kept = [container for container in _containers([root]) if len(container) <= MAX_ITEMS]
    found = {id(item): item for container in kept for item in _items(container) if isinstance(item, _Generator)}
    return list(found.values())


def get_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, numpy.random.Generator):
        return generator.bit_generator.state
    return generator.get_state() if isinstance(generator, numpy.random.RandomState) else generator.getstate()


def set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, numpy.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def is_plain(value: Any) -> bool:
    """Whether ``value`` is a tensor that is not a parameter."""
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
