"""What steps keep in containers and objects is known to the hooks of all stages when an epoch is over."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor
from torchmetrics import CatMetric, MeanMetric, SumMetric

from lightning_dgmp.learned import _glimpse
from tests import models
from tests.pool import WorkerPool
from tests.training import Outcome, assert_equal, fit


class Result:
    def __init__(self, loss: Tensor, number: int) -> None:
        self.loss, self.numbers = loss, [number]


@dataclass
class Named:
    name: str
    result: Result


class Keeps(models.ValidatedMLP):
    """Logs in a hook, on all stages, what ``keep`` has kept in the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Any = []
        self.functions = [lambda: 0]  # never changes, and cannot be pickled

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.keep(self.loss(batch), batch_idx)

    def keep(self, loss: Tensor, number: int) -> None:
        self.kept.append(Result(loss, number))

    def losses(self) -> list[Tensor]:
        return [result.loss * sum(result.numbers) for result in self.kept]

    def on_validation_epoch_end(self) -> None:
        self.log("kept", torch.stack(self.losses()).sum())


class KeepsNamed(Keeps):
    def keep(self, loss: Tensor, number: int) -> None:
        self.kept.append(Named("a", Result(loss, number)))

    def losses(self) -> list[Tensor]:
        return [named.result.loss for named in self.kept]


class KeepsGroups(Keeps):
    """Mappings whose factories cannot be pickled, the inner one known by the outer one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = defaultdict(lambda: defaultdict(lambda: {"loss": []}))

    def keep(self, loss: Tensor, number: int) -> None:
        self.kept["even" if number % 2 == 0 else "odd"][number % 3]["loss"].append(loss)

    def losses(self) -> list[Tensor]:
        assert not self.kept["even"]["new"]["loss"]
        assert not self.kept["new"][0]["loss"]
        return [loss for group in self.kept.values() for part in group.values() for loss in part["loss"]]


class ChangesAnObject(Keeps):
    """The container stays as it is, its object does not."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"all": Result(torch.zeros(()), 0)}

    def keep(self, loss: Tensor, number: int) -> None:
        self.kept["all"].loss = self.kept["all"].loss + loss

    def losses(self) -> list[Tensor]:
        return [self.kept["all"].loss]


class MakesAnObject(Keeps):
    """In a later batch than the first, which all stages see."""

    def keep(self, loss: Tensor, number: int) -> None:
        if number > 0:
            self.kept = Result(loss, number)

    def losses(self) -> list[Tensor]:
        return [torch.zeros(())] if isinstance(self.kept, list) else [self.kept.loss * self.kept.numbers[0]]


class Evaluator:
    def __init__(self) -> None:
        self.all, self.number = CatMetric(nan_strategy="disable"), 0

    def __call__(self, loss: Tensor) -> None:
        self.all.update(loss)
        self.number += 1

    def result(self) -> Tensor:
        return self.all.compute().sum() / self.number


class KeepsMetrics(Keeps):
    def __init__(self) -> None:
        super().__init__()
        self.kept, self.evaluator = {"all": Evaluator(), "made": {}}, Evaluator()

    def keep(self, loss: Tensor, number: int) -> None:
        self.kept["all"](loss)
        self.evaluator(loss)
        self.kept["made"].setdefault(number % 2, MeanMetric()).update(loss)

    def losses(self) -> list[Tensor]:
        means = [metric.compute() for metric in self.kept["made"].values()]
        return [self.kept["all"].result(), self.evaluator.result(), *means]


class Notes(Callback):
    def __init__(self) -> None:
        self.losses: list[list[float]] = []

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Keeps)
        self.losses.append([loss.item() for loss in pl_module.losses()])


def fit_keeping(kind: type[Keeps], strategy: dict[str, Any], devices: int) -> tuple[Outcome, list[list[float]]]:
    notes, args = Notes(), {"make_val_loader": models.vectors, "max_epochs": 2}
    return fit(kind, models.vectors, strategy, devices, callbacks=[notes], **args), notes.losses


@pytest.mark.parametrize("kind", [Keeps, KeepsNamed, KeepsGroups, ChangesAnObject, MakesAnObject, KeepsMetrics])
def test_what_steps_keep(pool: WorkerPool, kind: type[Keeps]) -> None:
    results = pool.run(fit_keeping, 2, kind, {"num_stages": 2}, 2)
    expected = pool.run(fit_keeping, 1, kind, {"num_stages": 2, "virtual": True}, 1)[0]
    assert results[0][1] == results[1][1]
    assert_equal(results[0][0], expected[0], 1e-6)
    for losses, right in zip(results[0][1], expected[1], strict=True):
        assert losses == pytest.approx(right, rel=1e-5)


def test_a_tensor_in_the_place_of_another_is_new() -> None:
    """Also where it has the address of the one before."""
    result = Result(torch.zeros(()), 0)
    kept = [result]
    before = _glimpse(kept)
    assert before == _glimpse(kept)
    for _ in range(100):
        del result.loss
        result.loss = torch.zeros(())
        assert before != _glimpse(kept)


class KeepsTheModel(Keeps):
    def keep(self, loss: Tensor, number: int) -> None:
        self.kept.append((self, loss))

    def losses(self) -> list[Tensor]:
        return [torch.zeros(())]


def warnings_while_keeping(kind: type[Keeps]) -> list[str]:
    with warnings.catch_warnings(record=True) as said, pytest.MonkeyPatch.context() as changes:
        changes.setattr(warnings, "simplefilter", lambda *args: None)  # of `fit`
        warnings.resetwarnings()
        fit_keeping(kind, {"num_stages": 2}, 2)
    return [str(warning.message) for warning in said if "What steps keep" in str(warning.message)]


def test_what_cannot_be_sent_is_named_once(pool: WorkerPool) -> None:
    first, second = pool.run(warnings_while_keeping, 2, KeepsTheModel)
    assert len(first) == 1
    assert "`kept` stays on the last stage (it holds a KeepsTheModel)" in first[0]
    assert not second
    assert pool.run(warnings_while_keeping, 2, Keeps) == [[], []]


class KeepsForEpochs(models.ValidatedMLP):
    """By what it logs training stops early, if a stage has another value."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [SumMetric(), SumMetric(nan_strategy="disable")]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        for metric in self.kept:
            metric.update(-torch.ones_like(loss).detach() * (self.current_epoch + 1))
        return loss

    def on_train_epoch_end(self) -> None:
        for i, metric in enumerate(self.kept):
            self.log(f"kept_{i}", metric.compute())
            metric.reset()


def fit_stopping_early(strategy: dict[str, Any], devices: int) -> Outcome:
    callbacks = [EarlyStopping(f"kept_{i}", patience=1, check_on_train_epoch_end=True) for i in range(2)]
    return fit(KeepsForEpochs, models.vectors, strategy, devices, 3, callbacks=callbacks, limit_train_batches=3)


def test_metrics_in_containers_at_the_end_of_training_epochs(pool: WorkerPool) -> None:
    results = pool.run(fit_stopping_early, 2, {"num_stages": 2}, 2)
    expected = pool.run(fit_stopping_early, 1, {"num_stages": 2, "virtual": True}, 1)[0]
    assert_equal(results[0], expected, 1e-6)
    assert results[0].metrics == results[1].metrics


class KeepsAnActivation(ChangesAnObject):
    """Of another stage, from which it does not travel."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.kept["all"].numbers.append(self.inp(batch[0]))
        self.loss(batch)


def test_what_has_not_come_to_the_last_stage_is_named(pool: WorkerPool) -> None:
    said = pool.run(warnings_while_keeping, 2, KeepsAnActivation)[0]
    assert len(said) == 1
    assert "`kept` stays on the last stage (a value is needed that is not here, of" in said[0]
    assert "made by `inp` of stage 0" in said[0]
