"""Callbacks decide alike on all stages, and without asking all of them at every batch."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_dgmp.world import World
from tests import models
from tests.pool import Failure, WorkerPool
from tests.training import assert_equal, fit


class Slow(models.ValidatedMLP):
    def loss(self, batch: Any) -> Tensor:
        time.sleep(0.02)
        return super().loss(batch)


def fit_counting_collectives(make_callback: Any, num_stages: int, **kwargs: Any) -> Any:
    """The step at which training ended, and what the stages asked one another for during training batches."""
    asked: list[str] = []
    all_gather = World.all_gather

    def counting(self: World, item: Any, what: str, *args: Any) -> Any:
        asked.append(what)
        return all_gather(self, item, what, *args)

    with patch.object(World, "all_gather", counting):
        args = {"callbacks": [make_callback()], "enable_checkpointing": True, **kwargs}
        outcome = fit(Slow, models.vectors, {"num_stages": num_stages}, num_stages, **args)
    return outcome.global_step, asked


def timer() -> Timer:
    return Timer(timedelta(seconds=1))


@pytest.mark.parametrize(("callback", "arguments"), [(timer, {}), (Callback, {"max_time": "00:00:00:01"})])
def test_a_timer_stops_all_stages_after_the_same_batch(
    pool: WorkerPool, callback: Any, arguments: dict[str, Any]
) -> None:
    args = {"max_epochs": 50, "enable_checkpointing": False, **arguments}
    results = pool.run(fit_counting_collectives, 3, callback, 3, **args)
    steps = {step for step, _ in results}
    assert len(steps) == 1
    assert 1 <= steps.pop() < 1000  # of 1700; a second is short on a busy machine
    assert not any("broadcast" in what for what in results[0][1][20:-10])


class Every:
    """Makes a checkpoint callback in each process."""

    def __init__(self, folder: Path, **arguments: Any) -> None:
        self.folder, self.arguments = folder, arguments

    def __call__(self) -> ModelCheckpoint:
        return ModelCheckpoint(self.folder, filename="{step}", save_top_k=-1, **self.arguments)


def test_checkpoints_by_the_clock(pool: WorkerPool, tmp_path: Path) -> None:
    make = Every(tmp_path, train_time_interval=timedelta(seconds=0.5))
    start = time.monotonic()
    results = pool.run(fit_counting_collectives, 3, make, 3, max_epochs=3)
    seconds = time.monotonic() - start
    assert {step for step, _ in results} == {102}
    saved = sorted(int(path.stem.split("=")[1]) for path in tmp_path.iterdir())
    assert 2 <= len(saved) <= seconds / 0.5 + 2
    assert not any("broadcast" in what for what in results[0][1][20:]), results[0][1]


@pytest.mark.parametrize("monitor", ["loss", "val_loss"])
def test_the_best_checkpoint_by_a_metric(pool: WorkerPool, tmp_path: Path, monitor: str) -> None:
    arguments = {"monitor": monitor, "every_n_train_steps": 5, "save_top_k": 2}
    names = []
    for kind, num_processes in (("virtual", 1), ("processes", 3)):
        results = pool.run(fit_to_save_the_best, num_processes, str(tmp_path / kind), arguments, kind == "virtual")
        assert len({repr(best) for best in results}) == 1
        names.append((sorted(path.name for path in (tmp_path / kind).iterdir()), results[0]))
    assert names[0][0] == names[1][0]
    assert names[0][1] == pytest.approx(names[1][1], rel=1e-5)


def fit_to_save_the_best(folder: str, arguments: dict[str, Any], virtual: bool) -> Any:
    checkpoint = ModelCheckpoint(folder, filename="{step}", **arguments)
    strategy = {"num_stages": 3, "virtual": virtual}
    args: dict[str, Any] = {"callbacks": [checkpoint], "enable_checkpointing": True, "val_check_interval": 10}
    args["make_val_loader"] = models.vectors
    fit(models.ValidatedMLP, models.vectors, strategy, 1 if virtual else 3, **args)
    assert checkpoint.best_model_score is not None
    return checkpoint.best_model_score.item()


@pytest.mark.parametrize("arguments", [{"every_n_train_steps": 5}, {"train_time_interval": timedelta(seconds=0.2)}])
def test_a_training_metric_in_the_name_of_a_checkpoint(
    pool: WorkerPool, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    names = pool.run(fit_to_save_by_name, 2, str(tmp_path), arguments)
    assert names[0] == names[1]
    assert [path.name for path in tmp_path.iterdir()] == [names[0]]


def fit_to_save_by_name(folder: str, arguments: dict[str, Any]) -> str:
    checkpoint = ModelCheckpoint(folder, filename="{step}-{loss:.6f}", **arguments)
    fit(Slow, models.vectors, {"num_stages": 2}, 2, callbacks=[checkpoint], enable_checkpointing=True)
    return Path(checkpoint.best_model_path).name


def rates_seen(virtual: bool) -> Any:
    args = {"callbacks": [LearningRateMonitor("step")], "module_args": {"optimizer": "adamw"}}
    strategy = {"num_stages": 3, "virtual": virtual}
    outcome = fit(models.MLP, models.vectors, strategy, 1 if virtual else 3, **args)
    return [row["lr-AdamW/pg1"] for _, row in outcome.rows if "lr-AdamW/pg1" in row]


def test_the_learning_rate_monitor(pool: WorkerPool) -> None:
    assert pool.run(rates_seen, 3, False)[0] == pool.run(rates_seen, 1, True)[0]


class Finetuned(models.MLP):
    def configure_optimizers(self) -> Optimizer:
        return SGD((p for p in self.parameters() if p.requires_grad), lr=0.05, momentum=0.9)


class UnfreezesLater(BaseFinetuning):
    """Adds a parameter group, with parameters of the first stages, in the second epoch."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze([pl_module.inp, pl_module.hidden[0]])

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group([pl_module.inp, pl_module.hidden[0]], optimizer, lr=0.02)


def fit_finetuning(folder: str, virtual: bool) -> Any:
    callbacks = [UnfreezesLater(), ModelCheckpoint(folder, filename="last")]
    args: dict[str, Any] = {"callbacks": callbacks, "enable_checkpointing": True, "max_epochs": 2}
    strategy = {"num_stages": 3, "virtual": virtual}
    return fit(Finetuned, models.vectors, strategy, 1 if virtual else 3, **args)


def test_a_finetuning_callback_adds_a_parameter_group(pool: WorkerPool, tmp_path: Path) -> None:
    expected = pool.run(fit_finetuning, 1, str(tmp_path / "virtual"), True)[0]
    assert_equal(pool.run(fit_finetuning, 3, str(tmp_path / "processes"), False)[0], expected, 1e-6)
    optimizers = [
        torch.load(tmp_path / kind / "last.ckpt", weights_only=False)["optimizer_states"][0]
        for kind in ("virtual", "processes")
    ]
    groups = [[group["params"] for group in optimizer["param_groups"]] for optimizer in optimizers]
    assert groups[0] == groups[1]
    assert len(groups[0]) > 1
    assert optimizers[0]["state"].keys() == optimizers[1]["state"].keys()


class FinetunedBackbone(models.Base):
    """Its BatchNorm stays trainable when ``freeze`` takes the rest, so the optimizer has it from the start."""

    def __init__(self) -> None:
        super().__init__()
        blocks = (nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()) for _ in range(3))
        self.backbone = nn.Sequential(*blocks)
        self.head = nn.Linear(8, 4)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    configure_optimizers = Finetuned.configure_optimizers


class UnfreezesBackbone(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.02)


class UnfreezesByHand(Callback):
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        BaseFinetuning.freeze(pl_module.backbone)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 0:
            BaseFinetuning.unfreeze_and_add_param_group(pl_module.backbone, trainer.optimizers[0], lr=0.02)


def fit_backbone(make: Any, kind: str, folder: str, max_epochs: int = 2, ckpt_path: str | None = None) -> Any:
    callbacks = [make(), ModelCheckpoint(folder, filename="last")]
    args: dict[str, Any] = {"callbacks": callbacks, "enable_checkpointing": True, "ckpt_path": ckpt_path}
    strategy = None if kind == "plain" else {"num_stages": 2, "virtual": kind == "virtual"}
    return fit(FinetunedBackbone, models.vectors, strategy, 2 if kind == "processes" else 1, max_epochs, **args)


@pytest.mark.parametrize("make", [UnfreezesBackbone, UnfreezesByHand])
def test_finetuning_what_the_optimizer_has_in_part(pool: WorkerPool, tmp_path: Path, make: Any) -> None:
    def run(kind: str, *args: Any) -> Any:
        return pool.run(fit_backbone, 2 if kind == "processes" else 1, make, kind, str(tmp_path / kind), *args)[0]

    assert_equal(run("processes"), run("virtual"), 1e-6)
    files = {kind: str(tmp_path / kind / "last.ckpt") for kind in ("processes", "virtual")}
    ours, theirs = (torch.load(path, weights_only=False) for path in files.values())
    (optimizer,), (expected,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert [len(group["params"]) for group in optimizer["param_groups"]] == [8, 6]
    assert optimizer["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(optimizer["state"], expected["state"])
    if make is UnfreezesBackbone:  # which gives the optimizer of a resumed run its groups
        assert ours["callbacks"]["UnfreezesBackbone"] == theirs["callbacks"]["UnfreezesBackbone"]
        for ours_by, theirs_by in (("processes", "virtual"), ("plain", "plain")):
            expected = run(theirs_by, 3, files["virtual"])
            assert_equal(run(ours_by, 3, files["processes"]), expected, 1e-6)


class ReadsTheLoss(Callback):
    def __init__(self, everywhere: bool) -> None:
        self.everywhere = everywhere
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *args: Any) -> None:
        assert outputs["loss"].shape == ()
        if self.everywhere or trainer.is_global_zero:
            self.losses.append(outputs["loss"].item())


def fit_reading_the_loss(everywhere: bool) -> Any:
    callback = ReadsTheLoss(everywhere)
    outcome = fit(models.MLP, models.vectors, {"num_stages": 2}, 2, callbacks=[callback])
    return [row["loss"] for _, row in outcome.rows], callback.losses


def test_a_callback_reads_the_loss_where_it_is(pool: WorkerPool) -> None:
    (logged, read), (_, nothing) = pool.run(fit_reading_the_loss, 2, False)
    assert read == pytest.approx(logged)
    assert not nothing


def test_reading_the_loss_where_it_is_not_is_an_error(pool: WorkerPool) -> None:
    for result in pool.try_run(fit_reading_the_loss, 2, True):
        assert isinstance(result, Failure)
        assert "which alone has the loss (global rank 0): read it there, `if trainer.is_global_zero`" in result.message


class PlateauByStep(models.MLP):
    """The monitored value exists on the last stage alone when the scheduler wants it."""

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.05)
        scheduler = ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
        config = {"scheduler": scheduler, "interval": "step", "frequency": 5, "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}


def test_a_scheduler_by_step_that_watches_a_metric(pool: WorkerPool) -> None:
    strategy = {"num_stages": 3}
    expected = pool.run(fit, 1, PlateauByStep, models.vectors, {**strategy, "virtual": True}, 1)[0]
    assert_equal(pool.run(fit, 3, PlateauByStep, models.vectors, strategy, 3)[0], expected, 1e-6)


class ScalesByWorld(models.MLP):
    def configure_optimizers(self) -> Any:
        assert self.trainer.world_size == 2
        assert self.trainer.strategy.data_parallel_size == 1  # type: ignore[attr-defined]
        return SGD(self.parameters(), lr=0.01 * self.trainer.world_size)


def fit_noting_warnings() -> list[str]:
    with patch("lightning_dgmp.mesh.rank_zero_warn") as warn:
        fit(ScalesByWorld, models.vectors, {"num_stages": 2}, 2)
    return [call.args[0] for call in warn.call_args_list]


def test_who_scales_by_the_world_is_warned_once(pool: WorkerPool) -> None:
    (warning,) = pool.run(fit_noting_warnings, 2)[0]
    assert "use `trainer.strategy.data_parallel_size`" in warning


@pytest.mark.parametrize("callback", [ModelCheckpoint, EarlyStopping])
def test_a_monitor_that_nobody_logs(pool: WorkerPool, callback: Any) -> None:
    for result in pool.try_run(fit_with, 2, callback(monitor="nothing")):
        assert isinstance(result, Failure)
        assert re.search("monitor='nothing'|metric `nothing`", result.message)


def fit_with(callback: Any, **kwargs: Any) -> Any:
    args = {"callbacks": [callback], "enable_checkpointing": isinstance(callback, ModelCheckpoint), **kwargs}
    outcome = fit(models.ValidatedMLP, models.vectors, {"num_stages": 2}, 2, make_val_loader=models.vectors, **args)
    return outcome.global_step


@pytest.mark.parametrize("make", [RichProgressBar, DeviceStatsMonitor, TQDMProgressBar])
def test_lightnings_other_callbacks(pool: WorkerPool, make: Any) -> None:
    args: dict[str, Any] = {"limit_train_batches": 8}
    if "Progress" in make.__name__:
        args["enable_progress_bar"] = True
    assert pool.run(fit_with, 2, make(), **args) == [8, 8]


def fit_with_summary(make: Any, num_stages: int) -> list[Any]:
    """How many parameters the summaries of this process have, and how many of them are trained."""
    args: dict[str, Any] = {"callbacks": [make()], "enable_model_summary": True, "limit_train_batches": 8}
    with patch.object(make, "summarize", wraps=make.summarize) as summarize:
        fit(models.MLP, models.vectors, {"num_stages": num_stages}, num_stages, **args)
    return [call.args[1:3] for call in summarize.call_args_list]


@pytest.mark.parametrize(("make", "num_stages"), [(ModelSummary, 4), (RichModelSummary, 2)])
def test_a_summary_counts_the_whole_model(pool: WorkerPool, make: Any, num_stages: int) -> None:
    whole = sum(p.numel() for p in models.MLP().parameters())
    assert pool.run(fit_with_summary, num_stages, make, num_stages) == [[(whole, whole)]] + [[]] * (num_stages - 1)


def search() -> list[str]:
    """What is said to who searches for learning rates and batch sizes."""
    said = []
    for callbacks, search in (
        ([LearningRateFinder()], Trainer.fit),
        ([], lambda trainer, *args: Tuner(trainer).lr_find(*args)),
        ([BatchSizeFinder()], Trainer.fit),
        ([], lambda trainer, *args: Tuner(trainer).scale_batch_size(*args)),
    ):
        trainer = Trainer(accelerator="cpu", devices=2, strategy="delayed_mp", logger=False, callbacks=callbacks,
                          enable_checkpointing=False, enable_progress_bar=False)  # fmt: skip
        with pytest.raises((MisconfigurationException, ValueError)) as error:
            search(trainer, models.MLP(), models.vectors())
        said.append(str(error.value))
    return said


def test_searches_are_refused(pool: WorkerPool) -> None:
    for rate, rate_by_tuner, size, size_by_tuner in pool.run(search, 2):
        assert "does not support the search for a learning rate" in rate
        assert "there is a `LearningRateFinder`, as by `Tuner.lr_find`. Search on one device" in rate == rate_by_tuner
        assert "Batch size finder is not supported with distributed strategies" in size
        assert "Tuning the batch size is currently not supported with distributed strategies" in size_by_tuner
