"""Objects of the user's classes, and their attributes."""

from __future__ import annotations

import dataclasses
from collections import deque
from enum import Enum
from functools import lru_cache
from types import ModuleType
from typing import Any

from torch import Tensor, nn

__all__ = [
    "MAX_ITEMS", "attributes_of", "has_attributes", "is_object_of_user", "is_of_user", "modules_beside",
    "set_attributes",
]  # fmt: skip

MAX_ITEMS = 10_000  #: Of a container; larger ones are data, and not looked into or copied.
_OF_MODULES = frozenset(vars(nn.Module()))
_CONTAINERS = (dict, list, tuple, deque)

_NOT_OF_USER = {
    "builtins", "lightning", "lightning_dgmp", "lightning_fabric", "logging", "numpy", "pytorch_lightning", "threading",
    "torch", "torchmetrics", "transformers",
}  # fmt: skip


def is_object_of_user(value: Any) -> bool:
    """Whether ``value`` is an object of a class of the user, with attributes, which may be callable too."""
    if isinstance(value, (nn.Module, type, ModuleType, Tensor)) or not isinstance(
        getattr(value, "__dict__", None), dict
    ):
        return False
    return is_of_user(type(value).__module__)


def modules_beside(root: nn.Module) -> dict[str, nn.Module]:
    """The modules that are no submodules of ``root``, but in containers and objects of the user in its attributes.

    Returns:
        They and their submodules, by where they are, as ``metrics['accuracy']``.
    """
    found: dict[str, nn.Module] = {}
    submodules, seen = set(map(id, root.modules())), set()
    waiting: list[tuple[str, Any]] = [("", root)]
    while waiting:
        path, item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, _CONTAINERS):
            items = list(item.items() if isinstance(item, dict) else enumerate(item)) if len(item) <= MAX_ITEMS else []
            waiting += [(f"{path}[{key!r}]", value) for key, value in items if _may_hold_modules(value)]
            continue
        attributes = vars(item)
        if isinstance(item, nn.Module):
            attributes = attributes | dict(item.named_children())
            if id(item) not in submodules:
                found[path] = item
        items = [(name, value) for name, value in attributes.items() if name not in _OF_MODULES]
        waiting += [(f"{path}.{name}" if path else name, value) for name, value in items if _may_hold_modules(value)]
    return found


def _may_hold_modules(value: Any) -> bool:
    return isinstance(value, (nn.Module, *_CONTAINERS)) or is_object_of_user(value)


def is_of_user(module_name: str) -> bool:
    """Whether code in a module is the user's, and not that of a library that this project knows."""
    return module_name.partition(".")[0] not in _NOT_OF_USER


def has_attributes(value: Any) -> bool:
    """Whether ``value`` is a dataclass or an object of a class of the user, which may be callable too."""
    return _have_attributes(type(value))  # type: ignore[arg-type]


@lru_cache(maxsize=1024)  # it is asked at every call of a module
def _have_attributes(kind: type) -> bool:
    if issubclass(kind, (nn.Module, type, ModuleType, Tensor, Enum)):
        return False
    return dataclasses.is_dataclass(kind) or (kind.__dictoffset__ != 0 and is_of_user(kind.__module__))


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of an object that :func:`has_attributes`."""
    if hasattr(value, "__dict__"):
        return dict(vars(value))
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def set_attributes(value: Any, attributes: dict[str, Any]) -> None:
    """Let ``value``, also if it is frozen, have ``attributes`` alone."""
    if hasattr(value, "__dict__"):
        vars(value).clear()
        vars(value).update(attributes)
    else:
        for name, item in attributes.items():
            object.__setattr__(value, name, item)
