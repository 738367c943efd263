"""Checkpoints that no process ever holds as a whole: folders of torch.distributed.checkpoint, in Lightning's format.

The folder holds one file of tensors a process and ``meta.pt`` with everything else, as those that Lightning's
``ModelParallelStrategy`` writes; ``python -m lightning.pytorch.utilities.consolidate_checkpoint`` makes an ordinary
checkpoint of it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from lightning_dgmp.later import later

__all__ = ["is_sharded", "load_sharded", "put_in_place", "read_tensors", "save_sharded"]

_META = "meta.pt"


def save_sharded(
    checkpoint: dict[str, Any], path: Path, group: Any, is_global_zero: bool, wait_for_all: Callable[[str], None]
) -> None:
    """Write what this process has of ``checkpoint``; a kill at any moment leaves what was there before.

    All processes must call it. Where the file system cannot exchange folders, as some of networks, a kill at the very
    end may leave what was there before at ``path.old``, where :func:`load_sharded` finds it.

    Args:
        checkpoint: As Lightning makes it, with this process's part of ``"state_dict"`` and, by the names of parameters,
            of ``"optimizer_states"``.
        path: The folder, on a file system that all processes share.
        group: A process group of all of them, of the host.
        is_global_zero: Whether this is rank 0.
        wait_for_all: Waits until all processes are there.
    """
    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    state = {"model": checkpoint["state_dict"]}
    state.update({f"optimizer_{i}": _by_text(part) for i, part in enumerate(checkpoint.get("optimizer_states", []))})
    partial = Path(f"{path}.part")
    if is_global_zero:
        _remove(partial)
        partial.mkdir(parents=True)
    wait_for_all("the start of a sharded checkpoint")
    dcp.save(state, checkpoint_id=partial, process_group=group)
    if is_global_zero:
        torch.save(rest, partial / _META)
        put_in_place(partial, path)
    wait_for_all("the end of a sharded checkpoint")


def put_in_place(partial: Path, path: Path) -> None:
    """Let ``path`` be what ``partial`` is, a file or a folder in the place of either; at once if that is possible."""
    old = Path(f"{path}.old")
    if not path.is_dir() and not partial.is_dir():
        os.replace(partial, path)
    elif not _exchange(partial, path):
        if path.exists():
            _remove(old)
            os.rename(path, old)
        os.rename(partial, path)
    _remove(old)
    _remove(partial)


def is_sharded(path: Path) -> bool:
    """Whether there is a sharded checkpoint at ``path``."""
    return _folder(path).is_dir()


def load_sharded(
    path: Path, is_later: Callable[[str], bool] = lambda key: False, weights_only: bool | None = None
) -> dict[str, Any]:
    """An ordinary Lightning checkpoint with all that is in the folder ``path``.

    Args:
        path: The folder.
        is_later: Tells of which tensors to take the shape alone, for :func:`~lightning_dgmp.later.read_all`.
        weights_only: As for :func:`torch.load`.

    Raises:
        FileNotFoundError: If a file is missing.
    """
    path = _folder(path)
    state: dict[str, Any] = {}
    reader = dcp.FileSystemReader(path)
    try:
        extra = torch.load(path / _META, map_location="cpu", weights_only=bool(weights_only))
        metadata = reader.read_metadata()
        files = {info.relative_path for info in metadata.storage_data.values()}
    except FileNotFoundError as error:
        raise FileNotFoundError(_incomplete(path, Path(error.filename).name)) from None
    for name in sorted(files):
        if not (path / name).is_file():
            raise FileNotFoundError(_incomplete(path, name))
    tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    others = {key for key in tensors if is_later(key)}
    _read_into(state, path, metadata.state_dict_metadata.keys() - others)
    read = partial(read_tensors, path)
    for key in metadata.state_dict_metadata:  # in their order
        if key in others:
            value = later(tensors[key].size, tensors[key].properties.dtype, read, key)
            set_element(state, metadata.planner_data[key], value)
    optimizers = sorted((key for key in state if key.startswith("optimizer_")), key=lambda key: int(key[10:]))
    states = [{"state": {}, **state[key]} for key in optimizers]  # which is left out if it is empty
    return {**extra, "state_dict": state["model"], "optimizer_states": states}


def read_tensors(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Some of the tensors in a folder of torch.distributed.checkpoint, by the names that they have there."""
    state: dict[str, Any] = {}
    _read_into(state, path, set(keys))
    return flatten_state_dict(state)[0]


def _read_into(state: dict[str, Any], path: Path, keys: Set[str]) -> None:
    planner = _EmptyStateDictLoadPlanner(keys=keys)
    _load_state_dict(state, storage_reader=dcp.FileSystemReader(path), planner=planner, no_dist=True)


def _by_text(optimizer_state: dict[str, Any]) -> dict[str, Any]:
    """With texts in the place of numbers, which torch.distributed.checkpoint takes for places in lists."""
    groups = [{**group, "params": [str(key) for key in group["params"]]} for group in optimizer_state["param_groups"]]
    state = {str(key): value for key, value in optimizer_state["state"].items()}
    return {**optimizer_state, "state": state, "param_groups": groups}


def _incomplete(path: Path, name: str) -> str:
    return (
        f"A sharded checkpoint must have all of its files, but `{path}` has no `{name}`. Copy the folder again, or"
        " resume from an earlier checkpoint."
    )


def _folder(path: Path) -> Path:
    old = Path(f"{path}.old")
    return old if old.is_dir() and not path.exists() else path


def _exchange(one: Path, other: Path) -> bool:
    """Swap two files or folders at once, and say whether that was possible; on Linux it is, on most file systems."""
    if sys.platform != "linux":
        return False
    function = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    return function is not None and function(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
