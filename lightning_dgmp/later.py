"""Tensors that are in files, and are read by the process that wants them, when it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_dgmp.nests import map_tensors, tensors_in

__all__ = ["later", "read_all"]


def later(
    size: Sequence[int], dtype: torch.dtype, read: Callable[[Sequence[str]], Mapping[str, Tensor]], key: str
) -> Tensor:
    """A tensor of this size without values, until :func:`read_all` reads it as ``read([key, ...])[key]``."""
    tensor: Any = torch.empty(size, dtype=dtype, device="meta")
    tensor.source = read, key
    return tensor  # type: ignore[no-any-return]


def read_all(nest: Any) -> Any:
    """``nest`` with the values of all that is in files, each of which is read once."""
    keys: dict[Any, list[str]] = {}
    for tensor in tensors_in(nest):
        if (source := getattr(tensor, "source", None)) is not None:
            keys.setdefault(source[0], []).append(source[1])
    found = {read: read(wanted) for read, wanted in keys.items()}

    def value(tensor: Tensor) -> Tensor:
        source = getattr(tensor, "source", None)
        return tensor if source is None else found[source[0]][source[1]]

    return map_tensors(value, nest)
