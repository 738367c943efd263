"""Calls whose arguments hold nothing that must be waited for, and what such a call has changed in them."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Container, MutableMapping
from typing import Any

import numpy
from torch import Tensor

from lightning_dgmp.ghost import Ghost
from lightning_dgmp.nests import map_leaves, with_items
from lightning_dgmp.objects import attributes_of, has_attributes, set_attributes
from lightning_dgmp.operations import GhostMode

__all__ = ["Isolation"]


class Isolation:
    """Copies of the containers of a call, with unbound ghosts in the place of bound ones, and the way back.

    Objects with attributes stay the same; they hold copies until :meth:`end`.

    Attributes:
        real: The tensors and arrays with values that have been met.
    """

    def __init__(self, mode: GhostMode) -> None:
        self._mode = mode
        self._containers: list[tuple[Any, Any]] = []
        self._objects: list[tuple[Any, dict[str, Any]]] = []
        self._changed: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
        self._copies: dict[int, Any] = {}
        self._originals: dict[int, Any] = {}
        self.real: list[Any] = []

    def copy(self, nest: Any) -> Any:
        if id(nest) in self._copies:
            return self._copies[id(nest)]
        if isinstance(nest, (list, deque, MutableMapping)):
            copied = self._noted(nest, copy.copy(nest))
            for key, value in list(nest.items() if isinstance(nest, MutableMapping) else enumerate(nest)):
                copied[key] = self.copy(value)
            self._containers.append((nest, copied))
            return copied
        if isinstance(nest, tuple):
            items = [self.copy(item) for item in nest]
            if all(a is b for a, b in zip(items, nest)):
                return nest
            return self._noted(nest, with_items(nest, items))
        if has_attributes(nest):
            attributes = attributes_of(self._noted(nest, nest))
            self._objects.append((nest, attributes))
            set_attributes(nest, {name: self.copy(value) for name, value in attributes.items()})
            return nest
        rebuilt = map_leaves(self._unbound, nest)
        return nest if rebuilt is nest else self._noted(nest, rebuilt)

    def _noted(self, original: Any, copied: Any) -> Any:
        self._copies[id(original)], self._originals[id(copied)] = copied, original
        return copied

    def _unbound(self, leaf: Any) -> Any:
        if isinstance(leaf, numpy.ndarray) or (isinstance(leaf, Tensor) and not isinstance(leaf, Ghost)):
            self.real.append(leaf)
        if not isinstance(leaf, Ghost):
            return leaf
        return self._noted(leaf, self._mode.again(leaf, leaf.origin, leaf.stage) if leaf.bound else leaf)

    def end(self) -> None:
        """Give the objects their own attributes back."""
        self._changed = [(item, before, attributes_of(item)) for item, before in self._objects]
        for item, before in self._objects:
            set_attributes(item, before)

    def original(self, nest: Any) -> Any:
        """``nest`` with the original containers and tensors in the place of their copies."""
        if id(nest) in self._originals:
            return self._originals[id(nest)]
        if isinstance(nest, tuple):
            items = [self.original(item) for item in nest]
            if all(a is b for a, b in zip(items, nest)):
                return nest
            return with_items(nest, items)
        if isinstance(nest, (list, deque, MutableMapping)):
            for key, value in list(nest.items() if isinstance(nest, MutableMapping) else enumerate(nest)):
                nest[key] = self.original(value)
            return nest
        if has_attributes(nest):  # made in the call
            attributes = attributes_of(self._noted(nest, nest))
            set_attributes(nest, {name: self.original(value) for name, value in attributes.items()})
            return nest
        return map_leaves(lambda leaf: self._originals.get(id(leaf), leaf), nest)

    def is_in(self, out: Any, known: Container[int]) -> bool:
        """Whether ``out`` holds an object, a container that was passed in, or a ghost of one not in ``known``."""
        if isinstance(out, Ghost):
            return id(out) in self._originals and id(out) not in known
        if isinstance(out, MutableMapping):
            items: Any = out.values()
        elif has_attributes(out):
            if not dataclasses.is_dataclass(out):
                return True
            items = attributes_of(out).values()
        else:
            items = out if isinstance(out, (list, tuple, deque)) else ()
        return id(out) in self._originals or any(self.is_in(item, known) for item in items)

    def write_back(self) -> bool:
        """Make the changes to the copies in the originals too.

        Returns:
            Whether there are any.
        """
        is_changed = False
        for item, before, after in self._changed:
            attributes = {name: self.original(value) for name, value in after.items()}
            if attributes.keys() != before.keys() or any(attributes[name] is not before[name] for name in attributes):
                set_attributes(item, attributes)
                is_changed = True
        for container, copied in self._containers:
            if isinstance(container, MutableMapping):
                content = {key: self.original(value) for key, value in copied.items()}
                if content.keys() != container.keys() or any(content[key] is not container[key] for key in content):
                    for key in set(container) - set(content):
                        del container[key]
                    for key, value in content.items():
                        container[key] = value
                    is_changed = True
            else:
                items = [self.original(item) for item in copied]
                if len(items) != len(container) or any(a is not b for a, b in zip(items, container)):
                    container.clear()
                    container.extend(items)
                    is_changed = True
        return is_changed
