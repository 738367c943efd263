"""Checkpoints of which each process writes its part."""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint import FileSystemWriter

from lightning_dgmp import DelayedMPStrategy
from lightning_dgmp.checkpoint import WeightShards
from lightning_dgmp.sharded import is_sharded, load_sharded, put_in_place
from lightning_dgmp.world import World
from tests import models
from tests.integration.test_checkpoints import fit_and_save
from tests.pool import Failure, WorkerPool, exit_codes
from tests.scripts import run
from tests.training import assert_equal, fit


def fit_sharded(folder: str, num_stages: int, virtual: bool = False, **kwargs: Any) -> Any:
    strategy = {"num_stages": num_stages, "virtual": virtual, "save_distributed_checkpoint": True}
    return fit_and_save(folder, strategy, 1 if virtual else num_stages, **kwargs)


def fit_without_collecting(folder: str, num_stages: int) -> Any:
    """Ends by an error, before the weights are collected at the end of training."""
    with (
        patch.object(World, "gather", side_effect=AssertionError("gathers")),
        patch.object(WeightShards, "assemble", side_effect=AssertionError("assembles")),
    ):
        return fit_sharded(folder, num_stages)


def test_nothing_is_collected(pool: WorkerPool, tmp_path: Path) -> None:
    results = pool.try_run(fit_without_collecting, 2, str(tmp_path), 2)
    assert all(isinstance(result, Failure) for result in results)
    assert len(list(tmp_path.iterdir())) == 3


class SavesByRank(Callback):
    """Saves to a path of its own in each process."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.save_checkpoint(f"{self.folder}/{trainer.global_rank}")


def fit_saving_by_rank(folder: str) -> None:
    strategy = {"num_stages": 2, "save_distributed_checkpoint": True}
    fit(models.MLP, models.vectors, strategy, 2, callbacks=[SavesByRank(folder)])


def test_a_folder_is_never_split(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(fit_saving_by_rank, 2, str(tmp_path))
    assert os.listdir(tmp_path) == ["0"]
    assert load_sharded(tmp_path / "0", weights_only=True)["state_dict"].keys() == models.MLP().state_dict().keys()


@pytest.mark.parametrize("virtual", [False, True])
def test_the_folder_has_what_the_file_has(pool: WorkerPool, tmp_path: Path, virtual: bool) -> None:
    processes = 1 if virtual else 3
    pool.run(fit_and_save, processes, str(tmp_path / "file"), {"num_stages": 3, "virtual": virtual}, processes)
    pool.run(fit_sharded, processes, str(tmp_path / "folder"), 3, virtual)
    paths = sorted((tmp_path / "folder").iterdir())
    assert all(path.is_dir() for path in paths)
    for path in paths[:1]:  # each costs the start of a process
        consolidated = tmp_path / "consolidated.ckpt"
        module = "lightning.pytorch.utilities.consolidate_checkpoint"
        done = run([sys.executable, "-m", module, str(path), "--output_file", str(consolidated)])
        assert done.returncode == 0, done.stderr
        ours = torch.load(consolidated, weights_only=False)
        theirs = torch.load(tmp_path / "file" / path.name, weights_only=True)
        torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=0)
        order = [name for group in ours["optimizer_states"][0]["param_groups"] for name in group["params"]]
        states = ours["optimizer_states"][0]["state"], theirs["optimizer_states"][0]["state"]
        assert states[0].keys() == {order[i] for i in states[1]}
        for i, state in states[1].items():
            torch.testing.assert_close(states[0][order[i]], state, rtol=0, atol=0)
        assert ours.keys() == theirs.keys()
        consolidated.unlink()


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 1)])
def test_going_on_with_another_number_of_stages(pool: WorkerPool, tmp_path: Path, before: int, after: int) -> None:
    pool.run(fit_sharded, before, str(tmp_path), before, limit_train_batches=10)
    path = next(tmp_path.iterdir())
    arguments = {"max_epochs": 2, "limit_train_batches": 10, "ckpt_path": str(path)}
    resumed = pool.run(fit_sharded, after, str(tmp_path / "on"), after, **arguments)[0]
    assert resumed.global_step == 20
    expected = pool.run(fit_sharded, 1, str(tmp_path / "virtual"), after, True, **arguments)[0]
    assert_equal(resumed, expected, 1e-5)


def save_and_die(rank: int, port: int, folder: str, where: str) -> None:
    """Save once, then be killed in the middle of saving again."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_RANK=str(rank), NODE_RANK="0"
    )
    module, strategy = models.MLP(), DelayedMPStrategy(2, save_distributed_checkpoint=True)
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, max_steps=2,
                      enable_checkpointing=False, enable_progress_bar=False)  # fmt: skip
    trainer.fit(module, models.vectors())
    trainer.save_checkpoint(f"{folder}/last.ckpt")
    torch.nn.init.constant_(module.inp.weight, 9.0)
    torch.nn.init.constant_(module.out.weight, 9.0)

    def die(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def rename(source: Any, target: Any, do: Any = os.rename) -> None:
        die() if str(source).endswith(".part") else do(source, target)

    with ExitStack() as patches:
        if where == "write" and rank == 1:
            patches.enter_context(patch.object(FileSystemWriter, "write_data", die))
        if where == "rename":  # the second of the two that are needed where folders cannot be exchanged
            patches.enter_context(patch("lightning_dgmp.sharded._exchange", return_value=False))
            patches.enter_context(patch("os.rename", rename))
        trainer.save_checkpoint(f"{folder}/last.ckpt")


@pytest.mark.parametrize("where", ["write", "rename"])
def test_a_kill_leaves_the_previous_checkpoint(tmp_path: Path, where: str) -> None:
    codes = exit_codes(save_and_die, 2, str(tmp_path), where)
    assert -signal.SIGKILL in codes
    assert None not in codes
    path = tmp_path / "last.ckpt"
    assert path.exists() == (where == "write")
    assert is_sharded(path)
    checkpoint = load_sharded(path)
    assert checkpoint["global_step"] == 2
    state = checkpoint["state_dict"]
    assert state.keys() == models.MLP().state_dict().keys()
    assert not any((state[f"{name}.weight"] == 9.0).any() for name in ("inp", "out"))


def test_the_previous_checkpoint_is_found_and_followed_by_the_next(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(fit_sharded, 2, str(tmp_path / "one"), 2, limit_train_batches=10)
    path = next((tmp_path / "one").iterdir())
    os.rename(path, f"{path}.old")
    arguments = {"max_epochs": 2, "limit_train_batches": 10, "ckpt_path": str(path)}
    assert pool.run(fit_sharded, 2, str(tmp_path / "two"), 2, **arguments)[0].global_step == 20
    pool.run(fit_sharded, 2, str(tmp_path / "one"), 2, limit_train_batches=10)
    assert [entry.name for entry in (tmp_path / "one").iterdir()] == [path.name]


def test_a_missing_shard(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(fit_sharded, 2, str(tmp_path), 2, limit_train_batches=10)
    path = next(tmp_path.iterdir())
    (path / "__1_0.distcp").unlink()
    for result in pool.try_run(fit_sharded, 2, str(tmp_path / "on"), 2, ckpt_path=str(path)):
        assert isinstance(result, Failure)
        assert f"`{path}` has no `__1_0.distcp`" in result.message


def test_a_folder_of_another_model(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(fit_sharded, 2, str(tmp_path), 2, limit_train_batches=10)
    path = next(tmp_path.iterdir())
    before = {file: file.read_bytes() for file in path.iterdir()}
    strategy = {"num_stages": 2, "save_distributed_checkpoint": True}
    args: dict[str, Any] = {"callbacks": [ModelCheckpoint(tmp_path, filename=path.stem)], "enable_checkpointing": True}
    for result in pool.try_run(fit, 2, models.LanguageModel, models.ragged_tokens, strategy, 2,
                               ckpt_path=str(path), **args):  # fmt: skip
        assert isinstance(result, Failure)
        assert re.search("(?s)loading state_dict for LanguageModel.*Missing key.*Unexpected key", result.message)
    assert {file: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "meta.pt"])
def test_a_damaged_file(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    pool.run(fit_sharded, 2, str(tmp_path), 2, limit_train_batches=10)
    path = next(tmp_path.iterdir())
    (path / name).write_bytes((path / name).read_bytes()[:-100])
    for result in pool.try_run(fit_sharded, 2, str(tmp_path / "on"), 2, ckpt_path=str(path)):
        assert isinstance(result, Failure)
        assert f"The checkpoint `{path}` cannot be read" in result.message


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("folder_first", [True, False])
def test_a_file_and_a_folder_take_each_others_place(tmp_path: Path, folder_first: bool, exchanges: bool) -> None:
    folder, file, path = tmp_path / "folder", tmp_path / "file", tmp_path / "last.ckpt"
    folder.mkdir()
    (folder / "meta.pt").write_text("a folder")
    file.write_text("a file")
    os.rename(folder if folder_first else file, path)
    with nullcontext() if exchanges else patch("lightning_dgmp.sharded._exchange", return_value=False):
        put_in_place(file if folder_first else folder, path)
    assert path.is_dir() != folder_first
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["last.ckpt"]
