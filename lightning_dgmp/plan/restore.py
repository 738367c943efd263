"""Runs of user code that leave nothing behind in modules and random number generators."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["attributes_saved", "is_plain", "untouched"]


@contextmanager
def untouched(root: nn.Module, device: torch.device) -> Iterator[None]:
    """Put the attributes and buffers of all modules, and the random state, back to what they were."""
    restore = attributes_saved(root)
    python_state = random.getstate()
    numpy_state = _numpy_random().get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        restore()
        random.setstate(python_state)
        _numpy_random().set_state(numpy_state)


def attributes_saved(root: nn.Module) -> Callable[[], None]:
    """A function that puts the attributes and buffers of ``root`` and its submodules back to what they are now."""
    saved = [_save(module.__dict__) for module in root.modules()]

    def restore() -> None:
        for one in saved:
            one()

    return restore


def _numpy_random() -> Any:
    import numpy

    return numpy.random


def _save(attributes: dict[str, Any], depth: int = 0) -> Callable[[], None]:
    """A function that restores the items of ``attributes``: two levels of containers, also in the user's objects."""
    undo: list[Callable[[], object]] = [_save_container(attributes)]
    for value in attributes.values():
        if isinstance(value, (dict, list, set, deque)):
            undo.append(_save_container(value))
            undo.extend(_save_tensor(item) for item in (value.values() if isinstance(value, dict) else value)
                        if is_plain(item))  # fmt: skip
        elif is_plain(value):
            undo.append(_save_tensor(value))
        elif isinstance(value, torch.Generator):
            undo.append(partial(value.set_state, value.get_state()))
        elif depth == 0 and _is_of_the_user(value):
            undo.append(_save(vars(value), depth + 1))

    def restore() -> None:
        for step in undo:
            step()

    return restore


def is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def _is_of_the_user(value: Any) -> bool:
    if (
        isinstance(value, (nn.Module, type, ModuleType))
        or callable(value)
        or not isinstance(getattr(value, "__dict__", None), dict)
    ):
        return False
    return type(value).__module__.partition(".")[0] not in ("lightning", "pytorch_lightning", "torch", "torchmetrics")


def _save_container(container: Any) -> Callable[[], None]:
    kept = container.copy()

    def restore() -> None:
        container.clear()
        container.extend(kept) if isinstance(container, (list, deque)) else container.update(kept)

    return restore


def _save_tensor(tensor: Tensor) -> Callable[[], None]:
    version, kept = tensor._version, tensor.detach().clone()

    def restore() -> None:
        if tensor._version != version:
            with torch.no_grad():
                tensor.copy_(kept)

    return restore
