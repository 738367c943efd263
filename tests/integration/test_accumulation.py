"""Gradients accumulated over several batches: an update every M of them, delays as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from tests import models
from tests.pool import WorkerPool
from tests.reference import train_by_hand
from tests.training import assert_equal, fit

TOLERANCE = 1e-6


@pytest.mark.parametrize(("accumulate", "optimizer"), [(2, "momentum"), (3, "adamw"), (8, "momentum")])
def test_virtual_stages_are_a_fifo_of_gradients(pool: WorkerPool, accumulate: int, optimizer: str) -> None:
    args: dict[str, Any] = {"module_args": {"optimizer": optimizer}, "accumulate_grad_batches": accumulate}
    strategy = {"num_stages": 4, "virtual": True}
    ours = pool.run(fit, 1, models.MLP, models.vectors, strategy, 1, **args)[0]
    seed_everything(7, verbose=False)
    module, batches = models.MLP(optimizer=optimizer), list(models.vectors())
    losses = train_by_hand(module, [batches], ours.stages, 4, accumulate)
    logged = [i for i in range(len(batches)) if (i + 1) % accumulate == 0 or i == len(batches) - 1]
    assert [row["loss"] for _, row in ours.rows if "loss" in row] == pytest.approx(
        [losses[i] for i in logged], rel=1e-6
    )
    for name, p in module.named_parameters():
        torch.testing.assert_close(ours.state[name], p.detach(), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("num_stages", "accumulate"), [(2, 2), (2, 3), (2, 8), (4, 2), (4, 3)])
@pytest.mark.parametrize(("backward", "optimizer"), [("stash", "adamw"), ("recompute", "momentum")])
def test_processes_equal_virtual_stages(
    pool: WorkerPool, num_stages: int, accumulate: int, backward: str, optimizer: str
) -> None:
    args: dict[str, Any] = {"module_args": {"optimizer": optimizer}, "accumulate_grad_batches": accumulate}
    args |= {"max_epochs": 2, "limit_train_batches": 19}
    virtual = {"num_stages": num_stages, "virtual": True}
    expected = pool.run(fit, 1, models.MLP, models.vectors, virtual, 1, **args)[0]
    strategy = {"num_stages": num_stages, "backward": backward}
    ours = pool.run(fit, num_stages, models.MLP, models.vectors, strategy, num_stages, **args)[0]
    assert_equal(ours, expected, 1e-6)


@pytest.mark.parametrize("val_check_interval", [5, 6])
def test_validation_in_the_middle_of_an_update(pool: WorkerPool, val_check_interval: int) -> None:
    args: dict[str, Any] = {"accumulate_grad_batches": 3, "val_check_interval": val_check_interval, "max_epochs": 2}
    args |= {"limit_train_batches": 19, "make_val_loader": models.vectors, "module_args": {"optimizer": "momentum"}}
    virtual = {"num_stages": 3, "virtual": True}
    expected = pool.run(fit, 1, models.ValidatedMLP, models.vectors, virtual, 1, **args)[0]
    ours = pool.run(fit, 3, models.ValidatedMLP, models.vectors, {"num_stages": 3}, 3, **args)[0]
    assert_equal(ours, expected, 1e-6)


def scheduled(strategy: Any, devices: int) -> Any:
    callback = GradientAccumulationScheduler({0: 1, 1: 4, 3: 2})
    return fit(models.MLP, models.vectors, strategy, devices, max_epochs=4, callbacks=[callback])


def test_an_accumulation_scheduler(pool: WorkerPool) -> None:
    expected = pool.run(scheduled, 1, {"num_stages": 3, "virtual": True}, 1)[0]
    assert_equal(pool.run(scheduled, 3, {"num_stages": 3}, 3)[0], expected, 1e-6)


def test_resuming_goes_on(pool: WorkerPool, tmp_path: Path) -> None:
    """Also where an epoch does not end with an update's last batch; the numbers of batches and steps differ."""
    args: dict[str, Any] = {"accumulate_grad_batches": 4, "limit_train_batches": 10, "enable_checkpointing": True}
    strategy = {"num_stages": 3}
    whole = pool.run(
        fit, 3, models.MLP, models.vectors, strategy, 3, **args, max_epochs=4, default_root_dir=str(tmp_path / "a")
    )
    pool.run(
        fit, 3, models.MLP, models.vectors, strategy, 3, **args, max_epochs=2, default_root_dir=str(tmp_path / "b")
    )
    (path,) = (tmp_path / "b").rglob("*.ckpt")
    resumed = pool.run(
        fit,
        3,
        models.MLP,
        models.vectors,
        strategy,
        3,
        **args,
        max_epochs=4,
        ckpt_path=str(path),
        default_root_dir=str(tmp_path / "c"),
    )
    for name, value in whole[0].state.items():
        assert torch.equal(resumed[0].state[name], value), name


class FreezesInBetween(models.MLP):
    """What has added up until then counts."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.inp.requires_grad_(not 11 <= batch_idx < 17)


def test_a_parameter_is_frozen_between_two_batches_of_an_update(pool: WorkerPool) -> None:
    args: dict[str, Any] = {"accumulate_grad_batches": 2}
    expected = pool.run(fit, 1, FreezesInBetween, models.vectors, {"num_stages": 3, "virtual": True}, 1, **args)[0]
    assert_equal(pool.run(fit, 3, FreezesInBetween, models.vectors, {"num_stages": 3}, 3, **args)[0], expected, 1e-6)


class FreezesMatrices(models.MLP):
    """Once, or now and then: a backward of a batch in flight needs the matrix as it was."""

    def __init__(self, period: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.period = period

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for layer in (self.hidden[0], self.hidden[2]):
            layer.requires_grad_(batch_idx < 11 if self.period == 0 else batch_idx % self.period > 0)


@pytest.mark.parametrize("backward", ["stash", "recompute"])
@pytest.mark.parametrize(("period", "accumulate"), [(0, 2), (0, 3), (2, 1), (2, 3), (3, 2)])
def test_matrices_that_are_frozen_now_and_then(pool: WorkerPool, period: int, accumulate: int, backward: str) -> None:
    args: dict[str, Any] = {"accumulate_grad_batches": accumulate, "module_args": {"period": period}}
    expected = pool.run(fit, 1, FreezesMatrices, models.vectors, {"num_stages": 3, "virtual": True}, 1, **args)[0]
    strategy = {"num_stages": 3, "backward": backward}
    assert_equal(pool.run(fit, 3, FreezesMatrices, models.vectors, strategy, 3, **args)[0], expected, 1e-7)
