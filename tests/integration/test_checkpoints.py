"""Checkpoints hold the whole model, in the user's order, and any strategy can go on from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests import models
from tests.pool import WorkerPool
from tests.training import assert_equal, fit


def fit_and_save(folder: str, strategy: Any, devices: int, **kwargs: Any) -> Any:
    callback = ModelCheckpoint(folder, every_n_train_steps=10, save_top_k=-1, filename="{step}")
    return fit(
        models.MLP,
        models.vectors,
        strategy,
        devices,
        module_args={"optimizer": "adamw"},
        enable_checkpointing=True,
        callbacks=[callback],
        **kwargs,
    )


def test_a_checkpoint_is_an_ordinary_one(pool: WorkerPool, tmp_path: Path) -> None:
    expected = pool.run(fit_and_save, 1, str(tmp_path / "virtual"), {"num_stages": 3, "virtual": True}, 1)[0]
    ours = pool.run(fit_and_save, 3, str(tmp_path / "processes"), {"num_stages": 3}, 3)[0]
    assert_equal(ours, expected, 1e-5)
    names = sorted(path.name for path in (tmp_path / "virtual").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "processes").iterdir())
    assert len(names) == 3
    for name in names:
        a = torch.load(tmp_path / "processes" / name, weights_only=True)
        b = torch.load(tmp_path / "virtual" / name, weights_only=True)
        assert a.keys() == b.keys()
        torch.testing.assert_close(a["state_dict"], b["state_dict"], rtol=1e-5, atol=1e-5)
        mine, theirs = a["optimizer_states"][0], b["optimizer_states"][0]
        assert mine["param_groups"] == theirs["param_groups"]
        assert mine["state"].keys() == theirs["state"].keys()
        for index, state in theirs["state"].items():
            torch.testing.assert_close(mine["state"][index], state, rtol=1e-4, atol=1e-6)
        assert a["lr_schedulers"] == b["lr_schedulers"]


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2)])
def test_going_on_with_another_number_of_stages(pool: WorkerPool, tmp_path: Path, before: int, after: int) -> None:
    def strategy(num_stages: int) -> Any:
        return {"num_stages": num_stages} if num_stages > 1 else None

    pool.run(fit_and_save, before, str(tmp_path), strategy(before), before, limit_train_batches=10)
    path = next(tmp_path.iterdir())
    arguments = {"max_epochs": 2, "limit_train_batches": 10, "ckpt_path": str(path)}
    resumed = pool.run(fit_and_save, after, str(tmp_path / "on"), strategy(after), after, **arguments)[0]
    assert resumed.global_step == 20
    virtual = {"num_stages": after, "virtual": True} if after > 1 else None
    expected = pool.run(fit_and_save, 1, str(tmp_path / "virtual"), virtual, 1, **arguments)[0]
    assert_equal(resumed, expected, 1e-5)
