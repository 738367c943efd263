"""What user code outside of steps does with predictions, weights, metrics and loggers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelPruning
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import grad_norm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torchmetrics import MeanMetric, MetricTracker

from lightning_dgmp import DelayedMPStrategy
from tests import models
from tests.pool import Failure, WorkerPool
from tests.training import assert_equal, fit


def train(devices: int, module: LightningModule, strategy: dict[str, Any] | None = None, **kwargs: Any) -> Trainer:
    seed_everything(7, verbose=False)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "max_epochs": 1, "limit_train_batches": 8, "accelerator": "cpu"}
    chosen = DelayedMPStrategy(**(strategy or {"num_stages": devices}))
    trainer = Trainer(devices=devices, strategy=chosen, **{**quiet, **kwargs})
    trainer.fit(module, models.vectors(), models.vectors())
    return trainer


# ----- predictions


class Predicts(models.ValidatedMLP):
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


def predict(devices: int) -> Tensor:
    module = Predicts()
    trainer = train(devices, module)
    return torch.cat(trainer.predict(module, models.vectors(16)))  # type: ignore[arg-type]


def test_predictions_are_tensors_on_all_stages(pool: WorkerPool) -> None:
    one, two = pool.run(predict, 2, 2)
    assert one.shape == (16, 4)
    assert torch.equal(one, two)


# ----- weights of other stages


class Averages(Callback):
    """As most averages of weights are written."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.average = {key: value.detach().clone() for key, value in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        for key, value in pl_module.state_dict().items():
            self.average[key].lerp_(value.detach(), 0.1)


class AveragesModel(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.average = torch.optim.swa_utils.AveragedModel(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.average.update_parameters(pl_module)


class Saves(Callback):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(pl_module.state_dict(), "/dev/null")


class Copies(Callback):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        copy.deepcopy(pl_module.get_submodule("hidden"))


class LogsNorms(Callback):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("norm", sum(p.detach().norm() for p in pl_module.parameters()))


def fit_with(devices: int, callback: Callable[[], Callback]) -> None:
    train(devices, models.ValidatedMLP(), callbacks=[callback()])


@pytest.mark.parametrize("callback", [Averages, AveragesModel, Saves, Copies, LogsNorms])
def test_who_wants_weights_of_other_stages_is_told(pool: WorkerPool, callback: Any) -> None:
    results = pool.try_run(fit_with, 2, 2, callback)
    assert all(isinstance(result, Failure) for result in results)
    assert any("of parameters of its own stage alone, but it asked for those of `" in r.message for r in results)
    assert any("with trainer.strategy.whole_model()" in result.message for result in results)


class LooksAtTheWhole(Callback):
    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        with trainer.strategy.whole_model():
            self.norm = float(torch.nn.utils.parameters_to_vector(pl_module.parameters()).norm())


def look(devices: int) -> float:
    callback = LooksAtTheWhole()
    train(devices, models.ValidatedMLP(), callbacks=[callback])
    return callback.norm


def test_the_whole_model_can_be_looked_at(pool: WorkerPool) -> None:
    norms = pool.run(look, 2, 2)
    assert norms[0] == norms[1] > 0


class Prunes(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            own = pl_module.inp if trainer.strategy.stage == 0 else pl_module.out
            torch.nn.utils.prune.random_unstructured(own, "weight", 0.3)


def model_pruning() -> ModelPruning:
    return ModelPruning("l1_unstructured", amount=0.3)


@pytest.mark.parametrize(
    ("callback", "text"), [(Prunes, "must stay the same during training"), (model_pruning, "of its own stage alone")]
)
def test_pruning_during_training_is_refused(pool: WorkerPool, callback: Any, text: str) -> None:
    results = pool.try_run(fit_with, 2, 2, callback)
    assert all(text in result.message for result in results), results


# ----- after a failure


class FailsLate(models.ValidatedMLP):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            raise ArithmeticError("late")


def go_on_after_failure(devices: int, folder: str) -> list[str]:
    module = FailsLate()
    said = []
    chosen = DelayedMPStrategy(num_stages=devices)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(devices=devices, strategy=chosen, accelerator="cpu", max_epochs=1, **quiet)
    for act in (
        lambda: trainer.fit(module, models.vectors()),
        lambda: trainer.save_checkpoint(f"{folder}/after.ckpt"),
        lambda: module.state_dict()["inp.weight"] + module.state_dict()["out.weight"].sum(),
    ):
        try:
            act()
        except (ArithmeticError, RuntimeError) as error:
            said.append(str(error))
    return said


def test_what_is_said_after_a_failure(pool: WorkerPool, tmp_path: Path) -> None:
    for said in pool.run(go_on_after_failure, 2, 2, str(tmp_path)):
        assert "late" in said[0]
        assert "Training has failed" in said[1]
        assert "If a fit has failed before, make the module anew" in said[2]
    assert not list(tmp_path.iterdir())


# ----- metrics


class MeanOfAll(models.ValidatedMLP):
    """A metric with a group of all processes."""

    def setup(self, stage: str) -> None:
        self.mean = MeanMetric(process_group=dist.new_group(list(range(dist.get_world_size()))))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.mean.update(loss)
        self.log("mean", self.mean)
        self.log("loss", loss, sync_dist=True)


def test_a_metric_with_a_group_of_all_processes(pool: WorkerPool) -> None:
    args: dict[str, Any] = {"make_val_loader": models.vectors}
    ours = pool.run(fit, 2, MeanOfAll, models.vectors, {"num_stages": 2}, 2, **args)[0]
    assert any("mean" in row for _, row in ours.rows)
    expected = pool.run(fit, 1, MeanOfAll, models.vectors, {"num_stages": 2, "virtual": True}, 1, **args)[0]
    assert_equal(ours, expected, 1e-6)


class LogsGradients(models.ValidatedMLP):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict({key: norm for key, norm in grad_norm(self, 2).items() if "total" not in key})


def metrics_of(devices: int, folder: str) -> tuple[dict[str, float], str]:
    monitored = "grad_2.0_norm/inp.weight" if devices > 1 else None
    checkpoint = ModelCheckpoint(folder, monitor=monitored, filename="best")
    module = LogsGradients()
    trainer = train(devices, module, callbacks=[checkpoint], enable_checkpointing=True)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}, checkpoint.best_model_path


def test_what_stages_log_by_themselves_reaches_the_callbacks_of_all(pool: WorkerPool, tmp_path: Path) -> None:
    one, two = pool.run(metrics_of, 2, 2, str(tmp_path))
    assert one == two
    assert {"grad_2.0_norm/inp.weight", "grad_2.0_norm/out.weight", "val_loss"} <= one[0].keys()


# ----- loggers


class WithExample(models.ValidatedMLP):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.example_input_array = torch.randn(2, 8)


def fit_with_loggers(folder: str, strategy: dict[str, Any], devices: int) -> None:
    loggers = [CSVLogger(folder, "csv", ""), TensorBoardLogger(folder, "board", "", log_graph=True)]
    train(
        devices,
        WithExample(),
        strategy,
        logger=loggers,
        log_every_n_steps=1,
        check_val_every_n_epoch=None,
        val_check_interval=3,
    )


def test_loggers(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(fit_with_loggers, 2, str(tmp_path / "processes"), {"num_stages": 2}, 2)
    pool.run(fit_with_loggers, 1, str(tmp_path / "virtual"), {"num_stages": 2, "virtual": True}, 1)
    ours, expected = ((tmp_path / kind / "csv/metrics.csv").read_text() for kind in ("processes", "virtual"))
    assert ours.splitlines()[0] == expected.splitlines()[0]
    assert len(ours.splitlines()) == len(expected.splitlines()) > 8
    graphs = [EventAccumulator(str(tmp_path / kind / "board")).Reload().Graph() for kind in ("processes", "virtual")]
    assert [node.name for node in graphs[0].node] == [node.name for node in graphs[1].node]
    assert "WithExample/Linear[out]/weight/weight" in "\n".join(node.name for node in graphs[0].node)


class CopiesMetrics(models.ValidatedMLP):
    """Metrics keep all that is in their ``__dict__`` when they are copied."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mean, self.tracker = MeanMetric(), MetricTracker(MeanMetric(), maximize=False)

    def on_train_epoch_start(self) -> None:
        self.tracker.increment()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.tracker.update(loss.detach())
        self.mean.update(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        for i, mean in enumerate((self.mean.clone(), copy.deepcopy(self.mean), pickle.loads(pickle.dumps(self.mean)))):
            self.log(f"copy_{i}", mean.compute())
        self.log_dict({f"epoch_{i}": value for i, value in enumerate(self.tracker.compute_all())})

    def on_validation_epoch_end(self) -> None:
        self.mean.clone().reset()


def test_metrics_may_be_copied(pool: WorkerPool) -> None:
    args: dict[str, Any] = {"max_epochs": 2, "make_val_loader": models.vectors, "limit_train_batches": 10}
    expected = pool.run(fit, 1, CopiesMetrics, models.vectors, {"num_stages": 2, "virtual": True}, 1, **args)[0]
    for outcome in pool.run(fit, 2, CopiesMetrics, models.vectors, {"num_stages": 2}, 2, **args):
        assert {"copy_0", "copy_1", "copy_2", "epoch_0", "epoch_1"} <= outcome.metrics.keys()
        assert outcome.metrics == pytest.approx(expected.metrics, rel=1e-5)


class MetricsInADict(models.ValidatedMLP):
    """What is not carried to other stages, but logged."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kept = {"mean": MeanMetric()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.kept["mean"].update(self.loss(batch))

    def on_validation_epoch_end(self) -> None:
        self.log("mean", self.kept["mean"].compute())


def fit_and_validate(devices: int) -> Any:
    module = MetricsInADict()
    trainer = train(devices, module)
    known = float(trainer.callback_metrics["mean"])
    return known, trainer.validate(module, models.vectors(), verbose=False)[0]["mean"]


def test_what_hooks_log_is_that_of_the_last_stage(pool: WorkerPool) -> None:
    results = pool.run(fit_and_validate, 2, 2)
    assert results[0] == results[1]
    assert results[0][0] == results[0][0], "not a number"
