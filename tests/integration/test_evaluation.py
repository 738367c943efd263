"""Validation, test and prediction through the pipeline, before, within and after training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_dgmp import DelayedMPStrategy
from tests import models
from tests.pool import WorkerPool
from tests.training import ListLogger, assert_equal, fit


class Evaluated(models.MLP):
    """Logs in every way, and evaluates other modules, other data and other batch sizes than it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.side = torch.nn.Linear(16, 4)
        self.metrics = MetricCollection([MulticlassAccuracy(4), MulticlassF1Score(4)], prefix="val_")
        self.mean = MeanMetric()
        self.best = 0.0
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True)
        self.log_dict({"twice": 2 * loss, "index": float(batch_idx)}, on_step=False, on_epoch=True)
        self.log("largest", loss, reduce_fx="max", on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("epoch", float(self.current_epoch))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        x, y = batch
        hidden = torch.tanh(self.hidden[1](torch.tanh(self.hidden[0](torch.tanh(self.inp(x))))))
        logits = self(x) + self.side(hidden)
        loss = torch.nn.functional.cross_entropy(logits, y)
        self.log("val_loss", loss, prog_bar=True, sync_dist=True)
        self.log("val_both", loss, on_step=True, on_epoch=True)
        self.mean.update(loss)
        if dataloader_idx == 0:
            self.metrics(logits, y)
            self.log_dict(self.metrics, on_step=False, on_epoch=True, add_dataloader_idx=False)
        self.seen.append(loss)
        return loss

    def on_validation_epoch_end(self) -> None:
        self.best = max(self.best, float(self.metrics["MulticlassAccuracy"].compute()))
        self.log("best", self.best)
        self.log("val_mean", self.mean)
        self.log("seen", torch.stack(self.seen).sum())
        self.seen.clear()

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        loss = self.loss(batch)
        self.log("test_loss", loss)
        return {"loss": loss}

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self(batch[0]).argmax(-1), batch_idx


def loaders() -> list[DataLoader]:
    return [models.vectors(50, 16), models.vectors(21, 5)]


def evaluate(num_stages: int, virtual: bool) -> dict[str, Any]:
    seed_everything(7, verbose=False)
    module, logger = Evaluated(), ListLogger()
    devices, strategy = (1 if virtual else num_stages), DelayedMPStrategy(num_stages, virtual=virtual)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy,
        max_epochs=2, logger=logger, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, val_check_interval=11, num_sanity_val_steps=2,
    )  # fmt: skip
    story: dict[str, Any] = {"before": trainer.validate(module, loaders(), verbose=False)}
    trainer.fit(module, models.vectors(), loaders())
    story["metrics"] = {name: value.item() for name, value in trainer.callback_metrics.items()}
    story["best"] = module.best
    story["after"] = trainer.validate(module, loaders(), verbose=False)
    story["test"] = trainer.test(module, loaders(), verbose=False)
    predictions = trainer.predict(module, loaders())
    if trainer.is_global_zero:
        assert predictions is not None
        story["predictions"] = [[(classes.tolist(), index) for classes, index in loader] for loader in predictions]
        story["rows"] = logger.rows
    return story


def assert_close(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_close(ours[key], value)
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            assert_close(a, b)
    else:
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("num_stages", [2, 4])
def test_evaluation_says_what_one_process_says(pool: WorkerPool, num_stages: int) -> None:
    expected = pool.run(evaluate, 1, num_stages, True)[0]
    assert [list(of_loader) for of_loader in expected["test"]] == [[f"test_loss/dataloader_idx_{i}"] for i in (0, 1)]
    assert [len(of_loader) for of_loader in expected["predictions"]] == [4, 5]
    results = pool.run(evaluate, num_stages, num_stages, False)
    assert_close(results[0], expected)
    for other in results[1:]:
        assert list(other["metrics"]) == list(results[0]["metrics"])
        assert_close(other, {key: value for key, value in results[0].items() if key not in ("predictions", "rows")})


class Generates(models.MLP):
    """Calls the network again on what it has returned, so that no plan can divide the step."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0]
        for _ in range(3):
            x = torch.nn.functional.pad(self(x), (0, 4))
        self.log("val_loss", x.square().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> None: ...


def generate(num_stages: int, virtual: bool) -> Any:
    seed_everything(7, verbose=False)
    module: LightningModule = Generates()
    devices, strategy = (1 if virtual else num_stages), DelayedMPStrategy(num_stages, virtual=virtual)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy,
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with patch("lightning_dgmp.evaluation.rank_zero_warn") as warn:
        trainer.fit(module, models.vectors(), models.vectors(20))
        value = trainer.callback_metrics["val_loss"].item()
        with patch("lightning_dgmp.loops.rank_zero_warn", warn):
            predictions = trainer.predict(module, models.vectors(20))
    return value, [call.args[0] for call in warn.call_args_list], predictions


def test_a_step_that_cannot_be_divided_runs_with_the_whole_model(pool: WorkerPool) -> None:
    expected, (empty,), nothing = pool.run(generate, 1, 2, True)[0]
    assert "`Generates.predict_step` returned None for all batches" in empty
    assert "Return the predictions, or call `trainer.predict(return_predictions=False)`" in empty
    for value, warnings, predictions in pool.run(generate, 2, 2, False):
        assert value == pytest.approx(expected, rel=1e-5)
        assert "`validation_step` runs with the whole model on every process" in warnings[0]
        assert "so a value would have to travel back" in warnings[0]
        assert "`predict_step` must use parameters of the LightningModule, but it uses none" in warnings[1]
        assert warnings[2:] == [empty]
        assert predictions == nothing == [None] * 3


class GeneratesUntil(models.MLP):
    """Logs before it turns out, by a value that it reads, that the network is called again."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))
        x = batch[0]
        while x.shape[1] < 11:
            x = torch.nn.functional.pad(self(x[:, -8:]), (4, x.shape[1] - 7))
            if x.isnan().all():
                break


def validate(module: type[LightningModule], devices: int = 2, **strategy: Any) -> Any:
    seed_everything(7, verbose=False)
    chosen = DelayedMPStrategy(**strategy)
    trainer = Trainer(accelerator="cpu", devices=devices, strategy=chosen, logger=False, enable_progress_bar=False)
    return trainer.validate(module(), models.vectors(20), verbose=False)[0]


def test_what_an_attempt_logs_counts_once(pool: WorkerPool) -> None:
    expected = pool.run(validate, 1, GeneratesUntil, 1, num_stages=4, virtual=True)[0]
    for result in pool.run(validate, 4, GeneratesUntil, 4):
        assert result == pytest.approx(expected, rel=1e-5)


class GeneratesLater(Generates):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.log("val_loss", self.loss(batch))
        else:
            super().validation_step(batch, batch_idx)


def test_a_step_whose_later_batches_cannot_be_divided(pool: WorkerPool) -> None:
    for result in pool.try_run(validate, 2, GeneratesLater):
        assert "`validation_step` was divided among the stages by its first batch, but a later" in result.message
        assert "runs with the whole model on every process if that shows in its first batch" in result.message


begins: list[float] = []
ends: list[float] = []


class Sleeps(models.MLP):
    """Notes when steps begin, and when they end, which they do on the last stage alone."""

    class Layer(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.02)
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.nn.ModuleList(self.Layer(16, 16) for _ in range(2))

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        begins.append(time.monotonic())
        result = self(batch[0])
        ends.append(time.monotonic())
        return result

    predict_step = validation_step


class WaitsForOutputs(Sleeps):
    def on_validation_batch_end(self, *args: Any) -> None: ...

    def on_predict_batch_end(self, *args: Any) -> None: ...


def evaluate_asleep(make: type[Sleeps]) -> Any:
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=DelayedMPStrategy(2), logger=False, enable_progress_bar=False
    )
    trainer.validate(make(), models.vectors(64), verbose=False)
    seen = [(begins[-8:], ends[-8:])]
    trainer.predict(make(), models.vectors(64))
    return [*seen, (begins[-8:], ends[-8:])]


@pytest.mark.parametrize("make", [Sleeps, WaitsForOutputs])
def test_stages_evaluate_at_the_same_time(pool: WorkerPool, make: type[Sleeps]) -> None:
    """Unless all of them want the outputs of a batch, the first one is ahead."""
    last, first = pool.run(evaluate_asleep, 2, make)
    for (_, done), (begun, _) in zip(last, first):
        ahead = [begin < end for begin, end in zip(begun[1:], done)]
        assert sum(ahead) > 3 if make is Sleeps else not any(ahead)


class Writer(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.batches: list[Any] = []
        self.epoch: list[Any] = []

    def write_on_batch_end(
        self, trainer: Trainer, module: LightningModule, prediction: Any, indices: Any, *_: Any
    ) -> None:
        self.batches.append((indices, prediction.tolist()))

    def write_on_epoch_end(self, trainer: Trainer, module: LightningModule, predictions: Any, indices: Any) -> None:
        self.epoch.append((indices, [prediction.tolist() for prediction in predictions]))


class ReadsOutputs(models.ValidatedMLP):
    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {"logits": self(batch[0])}

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", torch.nn.functional.cross_entropy(outputs["logits"], batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(-1)


def write(virtual: bool) -> Any:
    seed_everything(7, verbose=False)
    module, writer = ReadsOutputs(), Writer()
    trainer = Trainer(
        accelerator="cpu", devices=1 if virtual else 2, strategy=DelayedMPStrategy(2, virtual=virtual), max_epochs=1,
        logger=False, callbacks=[writer], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, models.vectors(), models.vectors(20))
    value = trainer.callback_metrics["val_loss"].item()
    trainer.predict(module, models.vectors(21, 5))
    return {"value": value, "batches": writer.batches, "epoch": writer.epoch}


def test_hooks_that_read_outputs_get_them_on_all_stages(pool: WorkerPool) -> None:
    expected = pool.run(write, 1, True)[0]
    assert expected["batches"][0][0] == [0, 1, 2, 3, 4]
    for result in pool.run(write, 2, False):
        assert_close(result, expected)


class Counts(models.MLP):
    """Numbers and lists that reach the same values in every epoch, and are set back by different hooks."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.correct = self.total = self.trained = 0
        self.predictions: list[int] = []
        self.targets: list[int] = []
        self.classes: set[int] = set()
        self.mine = ""

    def on_fit_start(self) -> None:
        self.mine = f"rank {self.global_rank}"  # is not the last stage's

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trained += len(batch[1])
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        self.correct = self.total = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        guess = self(x).argmax(-1)
        self.correct += int((guess == guess).sum())
        self.total += len(y)
        self.predictions += (0 * guess).tolist()
        self.targets += y.tolist()
        self.classes |= set(y.tolist())

    def on_validation_epoch_end(self) -> None:
        self.log("accuracy", self.correct / self.total)
        self.log("classes", float(len(self.classes)))
        self.log("agree", sum(p == t for p, t in zip(self.predictions, self.targets, strict=True)) / len(self.targets))
        self.predictions.clear()
        self.targets = []
        self.classes = set()

    def on_train_epoch_end(self) -> None:
        self.log("trained", float(self.trained))
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = 0.001 * self.trained
        self.trained = 0


def fit_and_count(strategy: dict[str, Any], devices: int) -> Any:
    outcome = fit(Counts, models.vectors, strategy, devices, max_epochs=3, make_val_loader=models.vectors,
                  val_check_interval=17)  # fmt: skip
    return outcome, outcome.metrics


def test_what_steps_count_is_known_whatever_hooks_set_back(pool: WorkerPool) -> None:
    expected, metrics = pool.run(fit_and_count, 1, {"num_stages": 3, "virtual": True}, 1)[0]
    results = pool.run(fit_and_count, 3, {"num_stages": 3}, 3)
    assert_equal(results[0][0], expected, 1e-6)
    for _, own in results:
        assert own == pytest.approx(metrics)


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield from count()


class SetsBackWithin(models.ValidatedMLP):
    """Hooks of batches set back what steps count, and it comes to the same again; of a dict only the key changes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.count, self.seen = 0, {"": 1}
        self.stream = DataLoader(Endless())  # which has no length

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.count += 1
        self.seen = {f"epoch {self.current_epoch}": 1}
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.fit_loop.total_batch_idx % 3 == 2:
            self.count = 0

    def on_validation_epoch_end(self) -> None:
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = 0.01 * (1 + self.count)
        assert f"epoch {self.current_epoch}" in self.seen


@pytest.mark.parametrize("interval", [3, 4])
def test_what_steps_count_between_hooks_of_batches(pool: WorkerPool, interval: int) -> None:
    args: dict[str, Any] = {"max_epochs": 2, "make_val_loader": models.vectors, "val_check_interval": interval}
    args |= {"limit_train_batches": 8, "num_sanity_val_steps": 0}
    virtual = {"num_stages": 3, "virtual": True}
    expected = pool.run(fit, 1, SetsBackWithin, models.vectors, virtual, 1, **args)[0]
    assert_equal(pool.run(fit, 3, SetsBackWithin, models.vectors, {"num_stages": 3}, 3, **args)[0], expected, 1e-6)
