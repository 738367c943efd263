"""Weights in files of any of the usual kinds, of which each process reads what it needs."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_dgmp.later import later
from lightning_dgmp.sharded import read_tensors

__all__ = ["mismatch", "named_for", "open_weights"]

_INDEX = "model.safetensors.index.json"  # as Hugging Face writes it
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def open_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in ``path`` by their names there, for :func:`~lightning_dgmp.later.read_all`.

    Args:
        path: A ``.safetensors`` file, a folder of them, a folder of torch.distributed.checkpoint, or a file of
            Lightning or of ``torch.save``, of which tensors and plain values are read.

    Raises:
        FileNotFoundError: If there is nothing of that kind.
    """
    if (path / ".metadata").is_file():
        return _in_shards(path)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if (path / _INDEX).is_file():
            files = sorted({path / name for name in json.loads((path / _INDEX).read_text())["weight_map"].values()})
        if files:
            return {name: tensor for file in files for name, tensor in _in_safetensors(file).items()}
    elif path.suffix == ".safetensors":
        return _in_safetensors(path)
    elif path.is_file():
        found = torch.load(path, "cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
        return {k: v for k, v in found.get("state_dict", found).items() if isinstance(v, Tensor)}
    raise FileNotFoundError(
        f"`load_weights` must be a file with weights, a folder with `*.safetensors` or one of"
        f" torch.distributed.checkpoint, but there is none at `{path}`."
    )


def _in_shards(path: Path) -> dict[str, Tensor]:
    metadata = dcp.FileSystemReader(path).read_metadata()
    places = metadata.planner_data or {}
    tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    of_model = {k for k in tensors if places.get(k, ("",))[0] == "model"}  # beside optimizers
    read = partial(read_tensors, path)
    return {
        key.removeprefix("model.") if of_model else key: later(info.size, info.properties.dtype, read, key)
        for key, info in tensors.items()
        if key in of_model or not of_model
    }


def _in_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open  # only who has such files needs it

    def read(keys: Sequence[str]) -> dict[str, Tensor]:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in keys}

    with safe_open(path, framework="pt") as file:
        views = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {
            key: later(view.get_shape(), _DTYPES.get(view.get_dtype(), torch.float32), read, key)
            for key, view in views.items()
        }


def named_for(module: nn.Module, weights: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The weights by the names that they have in ``module``, if they are its own or those of a module in it.

    Returns:
        What comes before the names, and the weights.
    """
    known = {name for name, _ in _tensors(module)}
    prefixes = [f"{path}." if path else "" for path, _ in module.named_modules()]
    best = max(prefixes, key=lambda prefix: sum(prefix + name in known for name in weights))
    return best, {best + name: value for name, value in weights.items()}


def mismatch(module: nn.Module, prefix: str, weights: Mapping[str, Any]) -> list[str]:
    """What is wrong with weights for the part of ``module`` whose names begin with ``prefix``, in words."""
    tensors = dict(_tensors(module))
    had = {id(tensors[name]) for name in weights if name in tensors}  # tied ones need one name
    wrong = [f"`{n}` is missing" for n, t in tensors.items() if n.startswith(prefix) and id(t) not in had]
    wrong += [f"`{name}` is not in the module" for name in weights if name not in tensors]
    return wrong + [
        f"`{name}` is {tuple(value.shape)} there and {tuple(tensors[name].shape)} in the module"
        for name, value in weights.items()
        if name in tensors and value.shape != tensors[name].shape
    ]


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters and buffers that are saved, under each of their names."""
    parameters = list(module.named_parameters(remove_duplicate=False))
    saved = []
    for path, child in module.named_modules(remove_duplicate=False):
        names = child._buffers.keys() - child._non_persistent_buffers_set
        saved += [(f"{path}.{n}" if path else n, b) for n in names if (b := child._buffers[n]) is not None]
    return [*parameters, *saved]
