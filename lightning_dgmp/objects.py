"""Objects of the user's classes, and their attributes."""

from __future__ import annotations

import dataclasses
from enum import Enum
from types import ModuleType
from typing import Any

from torch import Tensor, nn

__all__ = ["attributes_of", "has_attributes", "is_object_of_user", "is_of_user", "set_attributes"]

_NOT_OF_USER = {
    "builtins", "lightning", "lightning_dgmp", "lightning_fabric", "logging", "numpy", "pytorch_lightning", "threading",
    "torch", "torchmetrics", "transformers",
}  # fmt: skip


def is_object_of_user(value: Any) -> bool:
    """Whether ``value`` is an object of a class of the user, with attributes."""
    if (
        isinstance(value, (nn.Module, type, ModuleType, Tensor))
        or callable(value)
        or not isinstance(getattr(value, "__dict__", None), dict)
    ):
        return False
    return is_of_user(type(value).__module__)


def is_of_user(module_name: str) -> bool:
    """Whether code in a module is the user's, and not that of a library that this project knows."""
    return module_name.partition(".")[0] not in _NOT_OF_USER


def has_attributes(value: Any) -> bool:
    """Whether ``value`` is a dataclass or an object of a class of the user, which may be callable too."""
    if isinstance(value, (nn.Module, type, ModuleType, Tensor, Enum)):
        return False
    if dataclasses.is_dataclass(value):
        return True
    return isinstance(getattr(value, "__dict__", None), dict) and is_of_user(type(value).__module__)


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
