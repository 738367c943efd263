"""Checkpoints of which each process writes its part."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from lightning_dgmp.checkpoint import WeightShards
from lightning_dgmp.world import World
from tests.integration.test_checkpoints import fit_and_save
from tests.pool import Failure, WorkerPool
from tests.training import assert_equal


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


@pytest.mark.parametrize("virtual", [False, True])
def test_the_folder_has_what_the_file_has(pool: WorkerPool, tmp_path: Path, virtual: bool) -> None:
    processes = 1 if virtual else 3
    pool.run(fit_and_save, processes, str(tmp_path / "file"), {"num_stages": 3, "virtual": virtual}, processes)
    pool.run(fit_sharded, processes, str(tmp_path / "folder"), 3, virtual)
    for path in (tmp_path / "folder").iterdir():
        assert path.is_dir()
        consolidated = tmp_path / "consolidated.ckpt"
        module = "lightning.pytorch.utilities.consolidate_checkpoint"
        subprocess.run([sys.executable, "-m", module, str(path), "--output_file", str(consolidated)], check=True)
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


def test_a_missing_shard(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(fit_sharded, 2, str(tmp_path), 2, limit_train_batches=10)
    path = next(tmp_path.iterdir())
    (path / "__1_0.distcp").unlink()
    for result in pool.try_run(fit_sharded, 2, str(tmp_path / "on"), 2, ckpt_path=str(path)):
        assert isinstance(result, Failure)
        assert f"`{path}` has no `__1_0.distcp`" in result.message
