"""What the monitor logs and draws, read back from files of events."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_dgmp import DelayedMPMonitor, DelayedMPStrategy
from lightning_dgmp.reports import Reporter
from lightning_dgmp.simulator import StageCost, delayed, predict
from lightning_dgmp.timing import KINDS
from tests import models
from tests.pool import WorkerPool
from tests.training import ListLogger, Outcome, assert_equal, fit

SHARES = (*KINDS, "other")
SLEPT: list[tuple[str, float, float]] = []  # (in place of what, when, how long) this process slept


def sleep(kind: str, seconds: float) -> None:
    start = time.monotonic()
    time.sleep(seconds)
    SLEPT.append((kind, start, time.monotonic() - start))


class SleepingLayer(nn.Module):
    """Sleeps in the place of work, twice as long in the backward."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.linear, self.seconds = nn.Linear(8, 8), seconds

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        sleep("forward", self.seconds)
        if y.requires_grad:
            y.register_hook(lambda _: sleep("backward", 2 * self.seconds))
        return y


class Sleepers(models.Base):
    def __init__(self, seconds: tuple[float, ...] = (0.001, 0.001, 0.001), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layers = nn.Sequential(*map(SleepingLayer, seconds))

    def loss(self, batch: Any) -> Tensor:
        return self.layers(batch[0]).pow(2).mean()


def train(folder: str, devices: int, seconds: tuple[float, ...], logger: Any = None, **kwargs: Any) -> list[str]:
    """Return what was said on this rank."""
    import warnings

    seed_everything(1, verbose=False)
    split_at = [f"layers.{k}" for k in range(1, len(seconds))]
    strategy = DelayedMPStrategy(num_stages=len(seconds), split_at=split_at)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = Trainer(
            accelerator="cpu", devices=devices, strategy=strategy, max_epochs=1, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False,
            logger=TensorBoardLogger(folder, name="", version="") if logger is None else logger, **kwargs,
        )  # fmt: skip
        trainer.fit(Sleepers(seconds), models.vectors())
    assert not [
        c for c in trainer.callbacks if isinstance(c, DelayedMPMonitor) and c not in kwargs.get("callbacks", [])
    ]
    return [str(w.message) for w in said if "pipeline" in str(w.message)]


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def scalar(found: EventAccumulator, tag: str) -> list[float]:
    return [event.value for event in found.Scalars(tag)]


def test_tensorboard_has_it_by_default(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(train, 3, str(tmp_path), 3, (0.001, 0.001, 0.001), log_every_n_steps=8)
    found = events(tmp_path)
    tags = set(found.Tags()["scalars"])
    names = [*SHARES, "delay", "in_flight", "bytes_sent", "parameter_bytes", "snapshot_bytes", "activation_bytes"]
    names += ["gradient_norm", "snapshot_distance"]
    expected = {f"stage_{k}/{name}" for k in range(3) for name in names}
    assert expected | {"pipeline/period", "pipeline/efficiency", "pipeline/speedup"} <= tags
    for tag in expected:
        assert np.isfinite(scalar(found, tag)).all(), tag
        assert [event.step for event in found.Scalars(tag)] == [8, 16, 24, 32, 34]
    for k in range(3):
        shares = np.array([scalar(found, f"stage_{k}/{name}") for name in SHARES])
        assert shares.sum(0) == pytest.approx(1, abs=1e-4)
        assert shares.min() >= 0
        assert scalar(found, f"stage_{k}/delay")[-1] == 2 - k == scalar(found, f"stage_{k}/in_flight")[-1]
        assert scalar(found, f"stage_{k}/parameter_bytes")[-1] == 4 * (64 + 8)
        assert scalar(found, f"stage_{k}/snapshot_bytes")[-1] == 4 * (64 + 8) * (2 - k)
        assert (scalar(found, f"stage_{k}/activation_bytes")[-1] > 0) == (k < 2)
        assert scalar(found, f"stage_{k}/gradient_norm")[-1] > 0
        assert (scalar(found, f"stage_{k}/snapshot_distance")[-1] > 0) == (k < 2)
        batch = 4 * 8 * next(iter(models.vectors()))[0].shape[0]
        assert scalar(found, f"stage_{k}/bytes_sent")[1] == (2 if k == 1 else 1) * batch
    for tag in ("pipeline/timeline", "pipeline/balance"):
        path = tmp_path / "picture.png"
        path.write_bytes(found.Images(tag)[-1].encoded_image_string)
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.shape[0] > 200
        assert pixels.shape[1] > 600
        assert (pixels < 200).mean() > 0.05, "the picture is blank"


class Stopwatch(Callback):
    """Measures, on each rank, what the monitor is to find: seconds a batch, and how many of them its process worked."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.starts = first, last, dict[int, tuple[float, float]]()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.starts[batch_idx] = time.monotonic(), time.thread_time()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        (start, cpu_before), (end, cpu) = self.starts[self.first], self.starts[self.last]
        number = self.last - self.first
        slept = dict.fromkeys(("forward", "backward"), 0.0)
        for kind, when, seconds in SLEPT:
            slept[kind] += seconds / number if start <= when < end else 0
        self.period = (end - start) / number
        self.cost = StageCost(**slept, update=(cpu - cpu_before) / number)  # with all that is no sleep


def train_watched(*args: Any, **kwargs: Any) -> tuple[list[str], float, StageCost]:
    watch = Stopwatch(12, 23)
    said = train(*args, **kwargs, callbacks=[DelayedMPMonitor(pictures=False), watch])
    return said, watch.period, watch.cost


@pytest.fixture(scope="module")
def watched(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A training of three stages of which the second one is twice as slow, and what its ranks say, by stages.

    A busy machine makes batches longer and work slower, so what the monitor and the simulator say is compared with a
    stopwatch.
    """
    folder = tmp_path_factory.mktemp("watched")
    args = {"log_every_n_steps": 12, "limit_train_batches": 24}
    results = pool.run(train_watched, 3, str(folder), 3, (0.06, 0.12, 0.06), **args)
    return folder, *zip(*results[::-1])


def test_the_simulator_agrees_with_the_stopwatch(watched: Any) -> None:
    """Which sees more where the processes wait for a processor."""
    _, _, periods, costs = watched
    assert max(cost.forward + cost.backward for cost in costs) <= predict(delayed(3, 48), costs).period
    assert predict(delayed(3, 48), costs).period <= 1.05 * sum(periods) / 3


def test_the_monitor_names_the_slow_stage(watched: Any) -> None:
    """The others wait for half of the time."""
    folder, said, periods, costs = watched
    found = events(folder)
    shares = [{kind: scalar(found, f"stage_{k}/{kind}")[-1] for kind in SHARES} for k in range(3)]
    busy = [of["forward"] + of["backward"] for of in shares]
    least = [(cost.forward + cost.backward) / period for cost, period in zip(costs, periods)]
    assert all(share >= slept - 0.03 for share, slept in zip(busy, least)), (busy, least)
    assert max(shares[0], key=lambda kind: shares[0][kind] * kind.startswith("wait")) == "wait_error"
    assert max(shares[2], key=lambda kind: shares[2][kind] * kind.startswith("wait")) == "wait_activation"
    assert scalar(found, "pipeline/period")[-1] == pytest.approx(sum(periods) / 3, rel=0.15)
    assert scalar(found, "pipeline/efficiency")[-1] == pytest.approx(busy[1], abs=0.05)
    assert scalar(found, "pipeline/speedup")[-1] == pytest.approx(sum(busy), abs=0.1)
    assert busy[1] == max(busy)
    assert "stage 1 computes in" in said[2][0]
    assert "split_at" in said[2][0]
    assert not said[1]
    assert not said[0]


def lines_of_epochs(num_batches: int, max_epochs: int, max_steps: int) -> list[str]:
    """Those of a training without a logger."""
    said: list[str] = []
    with patch("lightning_dgmp.monitor.rank_zero_info", said.append):
        fit(models.MLP, models.vectors, {"num_stages": 2}, 2, logger=False, limit_train_batches=num_batches,
            max_epochs=max_epochs, max_steps=max_steps, log_every_n_steps=50)  # fmt: skip
    return said


@pytest.mark.parametrize(("num_batches", "max_steps"), [(3, -1), (12, -1), (12, 15)])
def test_each_epoch_has_a_line(pool: WorkerPool, num_batches: int, max_steps: int) -> None:
    """Also where there is no logger, and an epoch has one report, or ends early."""
    said = pool.run(lines_of_epochs, 2, num_batches, 2, max_steps)
    assert [line.partition(" takes")[0] for line in said[0]] == ["Epoch 0: a batch", "Epoch 1: a batch"]
    assert said[1] == []


def test_any_logger_gets_the_numbers(pool: WorkerPool, tmp_path: Path) -> None:
    logger, callbacks = CSVLogger(str(tmp_path), name="", version=""), [DelayedMPMonitor()]
    args = {"logger": logger, "log_every_n_steps": 10}
    said = pool.run(train, 2, "", 2, (0.001, 0.001), callbacks=callbacks, **args)
    assert [text for text in said[0] if "draws" in text] == [
        "The pipeline's monitor draws for `TensorBoardLogger` alone, but there is CSVLogger: it gets numbers without"
        " pictures. `DelayedMPMonitor(pictures=False)` needs none."
    ]
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "pipeline/efficiency" in header
    assert "stage_1/wait_activation" in header
    assert len(rows) >= 4
    args["logger"] = CSVLogger(str(tmp_path), name="", version="again")
    assert not [text for text in pool.run(train, 2, "", 2, (0.001, 0.001), **args)[0] if "draws" in text]


def test_a_trace_file_has_all_stages(pool: WorkerPool, tmp_path: Path) -> None:
    monitor = DelayedMPMonitor(trace_steps=(10, 20), pictures=False)
    pool.run(train, 3, str(tmp_path), 3, (0.002, 0.002, 0.002), callbacks=[monitor])
    content = json.loads((tmp_path / "pipeline_trace.json").read_text())
    spans = [event for event in content["traceEvents"] if event["ph"] == "X"]
    for stage in range(3):
        forwards = [e["args"]["batch"] for e in spans if e["tid"] == stage and e["cat"] == "forward"]
        assert len(forwards) == 10
        assert forwards == list(range(forwards[0], forwards[0] + 10))
    ends = {(e["tid"], e["args"]["batch"]): e["ts"] + e["dur"] for e in spans if e["cat"] == "forward"}
    for (stage, batch), end in ends.items():  # a later stage cannot be done before an earlier one
        assert (stage + 1, batch) not in ends or ends[stage + 1, batch] > end


@pytest.mark.parametrize("window", [(0, 34), (6, 30)])
def test_a_trace_may_be_longer_than_what_is_kept_otherwise(
    pool: WorkerPool, tmp_path: Path, window: tuple[int, int]
) -> None:
    pool.run(train_with_short_memory, 2, str(tmp_path), window)
    content = json.loads((tmp_path / "pipeline_trace.json").read_text())
    for stage in range(2):
        forwards = [e["args"]["batch"] for e in content["traceEvents"] if e["tid"] == stage and "forward" in e.values()]
        assert forwards == list(range(*window))


def train_with_short_memory(folder: str, window: tuple[int, int]) -> None:
    with patch("lightning_dgmp.timing._NUM_SPANS", 20):
        train(folder, 2, (0.001, 0.001), callbacks=[DelayedMPMonitor(False, window)])


def test_a_trace_that_is_not_reached_is_missed(pool: WorkerPool, tmp_path: Path) -> None:
    said = pool.run(train, 2, str(tmp_path), 2, (0.001, 0.001), callbacks=[DelayedMPMonitor(False, (30, 40))])
    assert "There is no `pipeline_trace.json`: `trace_steps=(30, 40)`" in "".join(said[0])
    assert "pipeline_trace" not in "".join(said[1])


def train_twice(folder: str) -> list[str]:
    """The second training, which writes into the same folder, is too short for a trace."""
    monitor = DelayedMPMonitor(False, (2, 6))
    train(folder, 2, (0.001, 0.001), callbacks=[monitor], limit_train_batches=8)
    return train(folder, 2, (0.001, 0.001), callbacks=[monitor], limit_train_batches=4)


def test_a_trace_of_an_earlier_training_is_not_missed(pool: WorkerPool, tmp_path: Path) -> None:
    assert "There is no" not in "".join(pool.run(train_twice, 2, str(tmp_path))[0])
    assert (tmp_path / "pipeline_trace.json").is_file()


def fit_with_monitor(num_stages: int, watched: bool) -> Outcome:
    callbacks = [DelayedMPMonitor()] if watched else []
    return fit(models.MLP, models.vectors, {"num_stages": num_stages}, num_stages, callbacks=callbacks, max_epochs=2)


def test_nothing_changes_for_the_training(pool: WorkerPool) -> None:
    watched = pool.run(fit_with_monitor, 3, 3, True)[0]
    plain = pool.run(fit_with_monitor, 3, 3, False)[0]
    assert "stage_0/forward" in {key for _, row in watched.rows for key in row}
    watched.rows = [
        (step, row) for step, row in watched.rows if not any(key.startswith(("stage_", "pipeline/")) for key in row)
    ]
    assert_equal(watched, plain, 0.0)


class Gain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.func.grad(lambda y: y.pow(2).sum())(torch.ones(3)).mean() / 2


class WithTorchFunc(models.MLP):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden.insert(1, Gain())


def test_hooks_of_the_graph_are_left_to_the_user(pool: WorkerPool) -> None:
    """`torch.func` refuses to work within others."""
    callbacks = [DelayedMPMonitor()]
    outcome = pool.run(fit, 2, WithTorchFunc, models.vectors, {"num_stages": 2}, 2, callbacks=callbacks)[0]
    assert [row for _, row in outcome.rows if row.get("stage_0/activation_bytes", 0) > 0]


class Broken(ListLogger):
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "pipeline/period" in metrics:
            raise OSError("the disk is full")


def test_the_monitor_never_stops_a_training(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    said = pool.run(train, 2, "", 2, (0.001, 0.001), logger=Broken(), callbacks=[DelayedMPMonitor(False)],
                    log_every_n_steps=5)  # fmt: skip
    assert said[0] == ["The pipeline's monitor could not log: OSError: the disk is full"]
    assert said[1] == []


def train_with_failing_reports(folder: str) -> list[str]:
    """That of step 10 fails on the first of two stages, that of step 25 on the last."""
    distance = Reporter._snapshot_distance

    def failing(self: Reporter) -> Tensor:
        if self._runner.num_forwards == (25 if self._runner.is_last else 10):
            raise OverflowError("too much to report")
        return distance(self)

    with patch.object(Reporter, "_snapshot_distance", failing):
        return train(folder, 2, (0.001, 0.001), log_every_n_steps=5)


def test_a_report_that_fails_is_left_out(pool: WorkerPool, tmp_path: Path) -> None:
    said = pool.run(train_with_failing_reports, 2, str(tmp_path))
    for texts, stage in zip(said, (1, 0)):
        assert f"The pipeline's monitor failed on stage {stage}: OverflowError: too much to report" in texts
    assert [event.step for event in events(tmp_path).Scalars("pipeline/period")] == [5, 15, 20, 30, 34]


class Masks(models.MLP):
    """With weights that are no numbers to train: what is pruned, and what is quantised."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.hidden:
            layer.mask = nn.Parameter(torch.ones(16, dtype=torch.bool), requires_grad=False)
            layer.scale = nn.Parameter(torch.ones(16, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        for layer in self.hidden:
            x = torch.tanh(layer(x)) * layer.mask * layer.scale
        return self.out(x)


def test_weights_that_are_not_trained_have_no_distance(pool: WorkerPool) -> None:
    args = {"callbacks": [DelayedMPMonitor()], "limit_train_batches": 6}
    rows = pool.run(fit, 2, Masks, models.vectors, {"num_stages": 2}, 2, **args)[0].rows
    assert [row["stage_0/snapshot_distance"] for _, row in rows if "stage_0/snapshot_distance" in row][-1] > 0


def norms_of_stages(max_norm: float | None) -> list[list[float]]:
    """At each step."""
    outcome = fit(models.MLP, models.vectors, {"num_stages": 2}, 2, callbacks=[DelayedMPMonitor()],
                  gradient_clip_val=max_norm, limit_train_batches=8)  # fmt: skip
    rows = {step: row for step, row in outcome.rows if "stage_0/gradient_norm" in row}
    return [[rows[step][f"stage_{k}/gradient_norm"] for k in range(2)] for step in sorted(rows)]


def test_the_norm_of_a_stage_is_its_own(pool: WorkerPool) -> None:
    """Also where clipping asks for that of all."""
    expected, ours = (pool.run(norms_of_stages, 2, max_norm)[0] for max_norm in (None, 1e6))
    assert len(expected) == 8
    assert ours == [pytest.approx(norms, rel=1e-5) for norms in expected]
    assert all(first != pytest.approx(last, rel=1e-3) for first, last in expected)


def train_one(virtual: bool) -> None:
    strategy = {"num_stages": 2 if virtual else 1, "virtual": virtual}
    outcome = fit(models.MLP, models.vectors, strategy, 1, callbacks=[DelayedMPMonitor()])
    assert not any("pipeline/period" in row for _, row in outcome.rows)


@pytest.mark.parametrize("virtual", [True, False])
def test_without_several_processes_there_is_nothing_to_show(pool: WorkerPool, virtual: bool) -> None:
    pool.run(train_one, 1, virtual)


def train_with_replicas(num_stages: int) -> list[str]:
    outcome = fit(models.MLP, models.vectors, {"num_stages": num_stages}, 4, callbacks=[DelayedMPMonitor()],
                  limit_train_batches=12)  # fmt: skip
    return sorted({key for _, row in outcome.rows for key in row})


def test_the_first_replica_is_shown(pool: WorkerPool) -> None:
    keys = pool.run(train_with_replicas, 4, 2)
    assert "stage_1/forward" in keys[0]
    assert not any("stage_" in key for rank in (1, 2, 3) for key in keys[rank])


@pytest.mark.parametrize("backward", ["recompute", "replay"])
def test_what_is_kept_for_later_counts(pool: WorkerPool, backward: str) -> None:
    strategy = {"num_stages": 2, "backward": backward}
    outcome = pool.run(fit, 2, models.MLP, models.vectors, strategy, 2, callbacks=[DelayedMPMonitor()])[0]
    last = [row for _, row in outcome.rows if "stage_0/snapshot_bytes" in row][-1]
    assert (last["stage_0/snapshot_bytes"] > 0) == (backward == "recompute")
