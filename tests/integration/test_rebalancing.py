"""Cuts that move by measured times: nothing is lost, and an imbalance is gone."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from lightning_dgmp import DelayedMPStrategy
from lightning_dgmp.plan.plan import make_plan
from lightning_dgmp.rebalancing import busy_in
from lightning_dgmp.timing import Span
from tests import models, sharing
from tests.integration.test_monitor import Sleepers, events
from tests.pool import WorkerPool
from tests.training import Outcome, fit

BEFORE, AFTER = ["hidden.1", "hidden.2"], ["hidden.0", "hidden.3"]


class Normed(models.ValidatedMLP):
    """With buffers that move."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)) for _ in range(4))


class ValidatedTied(sharing.Tied):
    pass


def fit_and_move(folder: str, model: Any, loader: Any, cuts: list[str] | None, devices: int, **kwargs: Any) -> Outcome:
    """Train, and let cuts move at the end of an epoch, or go on from there with ``cuts``."""
    save = ModelCheckpoint(folder, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    num_stages = kwargs.pop("num_stages", 3)
    starts = kwargs.pop("starts", AFTER)
    strategy: dict[str, Any] = {"num_stages": num_stages, **kwargs.pop("strategy", {})}
    strategy |= {"balance": "measured"} if cuts is None else {"split_at": cuts}
    args = {"max_epochs": 3, "limit_train_batches": 10}
    if kwargs.pop("flushes", True):
        args |= {"make_val_loader": loader, "enable_checkpointing": True, "callbacks": [save]}

    def better(trace: Any, root: nn.Module, plan: Any, measured: Any, slack: int, budget: Any) -> Any:
        return make_plan(trace, root, num_stages, starts, slack), 0.1

    with (
        patch("lightning_dgmp.starting.better_plan", better),
        patch("lightning_dgmp.starting.busy_in", lambda *_: 1.0),
    ):
        return fit(model, loader, strategy, devices, **args | kwargs)


@pytest.mark.parametrize(
    ("model", "loader", "args"),
    [
        (models.ValidatedMLP, models.vectors, {"module_args": {"optimizer": "momentum"}}),
        (Normed, models.vectors, {"module_args": {"optimizer": "adamw"}, "gradient_clip_val": 0.3}),
        (Normed, models.vectors, {"devices": 6, "module_args": {"optimizer": "adamw"}}),
        (models.ValidatedMLP, models.vectors, {"strategy": {"slack": 1, "correct_updates": True}}),
        (models.ValidatedMLP, models.vectors, {"strategy": {"backward": "recompute"}, "accumulate_grad_batches": 5}),
        (ValidatedTied, models.ragged_tokens, {"starts": ["gpt.blocks.1", "gpt.blocks.3"],
                                               "module_args": {"optimizer": "adamw"}}),
    ],
)  # fmt: skip
def test_going_on_is_beginning_with_the_new_cuts(
    pool: WorkerPool, tmp_path: Path, model: Any, loader: Any, args: dict[str, Any]
) -> None:
    args, devices = dict(args), args.get("devices", 3)
    args.pop("devices", None)
    moved = pool.run(fit_and_move, devices, str(tmp_path / "a"), model, loader, None, devices, **args)
    starts = args.get("starts", AFTER)
    for outcome in moved:
        assert [stage.first_module for stage in outcome.summaries[1:]] == starts
    path = str(tmp_path / "a" / "epoch=0.ckpt")
    again = (str(tmp_path / "b"), model, loader, starts, devices)
    resumed = pool.run(fit_and_move, devices, *again, ckpt_path=path, **args)
    for ours, theirs in zip(moved, resumed):
        for name, value in theirs.state.items():
            torch.testing.assert_close(ours.state[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_cuts_move_without_validation_and_checkpoints(pool: WorkerPool, tmp_path: Path, accumulate: int) -> None:
    """Before the next epoch, if there is one."""
    where = str(tmp_path), models.ValidatedMLP, models.vectors, None, 3
    args = {"max_epochs": 2, "limit_train_batches": 14, "accumulate_grad_batches": accumulate}
    ours, expected = (pool.run(fit_and_move, 3, *where, **args, flushes=flushes)[0] for flushes in (False, True))
    assert [stage.first_module for stage in ours.summaries[1:]] == AFTER
    for name, value in expected.state.items():
        torch.testing.assert_close(ours.state[name], value, rtol=0, atol=0)


def warnings_of_one_epoch() -> list[str]:
    said: list[str] = []
    with patch("lightning_dgmp.starting.rank_zero_warn", said.append):
        fit(models.MLP, models.vectors, {"num_stages": 2, "balance": "measured"}, 2)
    return said


def test_training_that_ends_before_cuts_can_move_says_so(pool: WorkerPool) -> None:
    for said in pool.run(warnings_of_one_epoch, 2):
        assert "`balance='measured'` moves cuts before the next validation, checkpoint or epoch" in "".join(said)


class Keeping(nn.Module):
    """Keeps what it has seen from batch to batch: a tensor, a nest, a number, an object."""

    def __init__(self, unsendable: bool = False) -> None:
        super().__init__()
        self.linear, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.count, self.unsendable = 0, unsendable
        self.state: Any = None
        self.pair: Any = [torch.zeros(16), 0.0]
        self.memory = SimpleNamespace(mean=None)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.linear(x)))
        if self.state is not None:
            out = out + self.state + self.pair[0] + 0.01 * self.count
        new = torch.tanh(out)
        if self.training:
            self.state, self.count = new.detach().mean(0), self.count + 1
            self.pair = [0.5 * self.pair[0] + new.detach()[0], 1.0]
            if self.unsendable:
                self.memory = SimpleNamespace(mean=iter(()))
        return new


class Stateful(models.ValidatedMLP):
    def __init__(self, unsendable: bool = False, **kwargs: Any) -> None:
        super().__init__(lr=0.0, **kwargs)
        self.hidden = nn.ModuleList(Keeping(unsendable) for _ in range(4))


@pytest.mark.parametrize("starts", [AFTER, ["hidden.2", "hidden.3"], ["hidden.1.second", "hidden.2"]])
def test_what_modules_keep_moves_along(pool: WorkerPool, tmp_path: Path, starts: list[str]) -> None:
    """With a learning rate of zero the losses do not depend on cuts, but on what is kept."""
    args = {"starts": starts, "val_check_interval": 4}
    moved = pool.run(fit_and_move, 3, str(tmp_path), Stateful, models.vectors, None, 3, **args)[0]
    assert [stage.first_module for stage in moved.summaries[1:]] == starts
    alone = pool.run(fit, 1, Stateful, models.vectors, None, 1, make_val_loader=models.vectors, max_epochs=3,
                     limit_train_batches=10, val_check_interval=4)[0]  # fmt: skip
    losses = [[row for row in outcome.rows if "loss" in row[1] or "val_loss" in row[1]] for outcome in (moved, alone)]
    assert losses[0] == [(step, pytest.approx(row, rel=1e-5)) for step, row in losses[1]]


def test_the_balance_is_drawn_again(pool: WorkerPool, tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    pool.run(fit_and_move, 3, str(tmp_path), models.ValidatedMLP, models.vectors, None, 3, logger=logger)
    found = events(tmp_path)
    before, after = found.Images("pipeline/balance")
    assert (before.step, after.step) == (1, 11)
    assert before.encoded_image_string != after.encoded_image_string


def test_cuts_stay_where_state_cannot_move(pool: WorkerPool, tmp_path: Path) -> None:
    args = {"module_args": {"unsendable": True}}
    outcome = pool.run(fit_and_move, 3, str(tmp_path), Stateful, models.vectors, None, 3, **args)[0]
    assert [stage.first_module for stage in outcome.summaries[1:]] != AFTER


class Periods(Callback):
    """The median of the seconds from one batch to the next, with the first cuts and with the last ones."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.monotonic())

    def on_train_end(self, *_: Any) -> None:
        intervals = [b - a for a, b in pairwise(self.starts)]
        self.before, self.after = median(intervals[4:20]), median(intervals[24:])


def fit_and_time(seconds: tuple[float, ...]) -> tuple[Outcome, float, float]:
    periods = Periods()
    return fit_unequal(seconds, callbacks=[periods]), periods.before, periods.after


def fit_unequal(seconds: tuple[float, ...], **kwargs: Any) -> Outcome:
    args = {"make_val_loader": models.vectors, "val_check_interval": 22, "limit_val_batches": 1}
    strategy = {"num_stages": 3, "balance": "measured"}
    return fit(lambda: ValidatedSleepers(seconds), models.vectors, strategy, 3, **args, **kwargs)


class ValidatedSleepers(Sleepers):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


def test_measured_times_remove_an_imbalance(pool: WorkerPool) -> None:
    """The last two of six layers are four times as slow: two for each stage become four, one and one.

    So a batch takes half of the time.
    """
    outcome, before, after = pool.run(fit_and_time, 3, (0.004, 0.004, 0.004, 0.004, 0.016, 0.016))[0]
    assert [stage.first_module for stage in outcome.summaries] == ["layers.0", "layers.4", "layers.5"]
    assert after < 0.8 * before


def test_equal_stages_stay(pool: WorkerPool) -> None:
    outcome = pool.run(fit_unequal, 3, (0.01,) * 6)[0]
    assert [stage.first_module for stage in outcome.summaries] == ["layers.0", "layers.2", "layers.4"]


def test_what_counts_as_busy() -> None:
    spans = [Span("forward", b, 10 * b, 10 * b + 4) for b in range(20)]
    spans += [Span("wait_activation", b, 10 * b, 10 * b + 1) for b in range(20)]
    spans += [Span("backward", b, 10 * b + 4, 10 * b + 8) for b in range(20)]
    spans += [Span("wait_data", b, 10 * b + 8, 10 * b + 9) for b in range(20)]
    assert busy_in(spans, 5) == pytest.approx(7)
    assert busy_in(spans, 15) is None


@pytest.mark.parametrize("other", [{"virtual": True}, {"split_at": ["hidden.1"]}])
def test_what_does_not_go_together(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`balance='measured'` moves cuts by measured times, but"):
        DelayedMPStrategy(2, balance="measured", **other)
    with pytest.raises(ValueError, match="`balance` must be 'flops' or 'measured', but is 'best'"):
        DelayedMPStrategy(2, balance="best")  # type: ignore[arg-type]
