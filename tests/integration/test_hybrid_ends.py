"""Several replicas end together, fail together, and go on from each other's checkpoints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tests import models
from tests.integration.test_hybrid import assert_agree, fit_on
from tests.integration.test_signals import Signals
from tests.pool import Failure, WorkerPool
from tests.scripts import run
from tests.training import Outcome, assert_equal, fit


class Stops(Callback):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 5 and trainer.global_rank == self.rank:
            trainer.should_stop = True


def fit_until(rank: int, terminates: bool) -> int:
    if not terminates:
        return fit(models.MLP, models.vectors, {"num_stages": 2}, 4, callbacks=[Stops(rank)]).global_step
    callback = Signals({rank: 5}, signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        fit(models.MLP, models.vectors, {"num_stages": 2}, 4, callbacks=[callback])
    return callback.steps


@pytest.mark.parametrize(("rank", "terminates"), [(2, False), (3, False), (2, True)])
def test_a_wish_of_one_replica_ends_all(pool: WorkerPool, rank: int, terminates: bool) -> None:
    steps = set(pool.run(fit_until, 4, rank, terminates))
    assert len(steps) == 1
    assert 5 <= steps.pop() <= 5 + 5


class Fails(models.MLP):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 6 and self.global_rank == self.rank:
            raise ZeroDivisionError("the user's own error")


def fail(rank: int) -> Any:
    return fit(Fails, models.vectors, {"num_stages": 2}, 4, module_args={"rank": rank})


@pytest.mark.parametrize("rank", [0, 3])
def test_a_failure_in_one_replica_ends_all(pool: WorkerPool, rank: int) -> None:
    """Also where the process lives on, so that its connections do."""
    start = time.monotonic()
    for result in pool.try_run(fail, 4, rank, timeout=60):
        assert isinstance(result, Failure)
        assert "the user's own error" in result.message
    assert time.monotonic() - start < 30


SCRIPT = """
import os, signal
from lightning.pytorch import Callback, Trainer
import lightning_dgmp
from tests import models

class Dies(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 6 and trainer.global_rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    strategy = lightning_dgmp.DelayedMPStrategy(num_stages=2, data_parallel_size=2)
    trainer = Trainer(
        accelerator="cpu", devices=4, strategy=strategy, max_epochs=1, logger=False, callbacks=[Dies()],
        enable_checkpointing=False, enable_progress_bar=False,
    )
    trainer.fit(models.MLP(), models.vectors())
"""


def test_a_killed_process_ends_all(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = run([sys.executable, str(script)], limit=100)
    assert result.returncode != 0
    assert "lost" in result.stderr
    left = subprocess.run(["pgrep", "-f", str(script)], capture_output=True, text=True).stdout
    assert not left, "a process was left behind"


def fit_and_resume(folder: str, devices: int, saves: dict[str, Any], resumes: dict[str, Any] | None) -> Outcome:
    def fit_and_save(strategy: dict[str, Any], max_epochs: int, **kwargs: Any) -> Outcome:
        callbacks = [ModelCheckpoint(folder, save_last=True)]
        args: dict[str, Any] = {"module_args": {"optimizer": "adamw"}, "enable_checkpointing": True}
        return fit(models.MLP, models.vectors, strategy, devices, max_epochs, callbacks=callbacks, **args, **kwargs)

    if resumes is None:
        return fit_and_save(saves, 2)
    fit_and_save(saves, 1)
    return fit_and_save(resumes, 2, ckpt_path=f"{folder}/last.ckpt")


@pytest.mark.parametrize("is_sharded", [False, True])
def test_resuming_is_going_on(pool: WorkerPool, tmp_path: Path, is_sharded: bool) -> None:
    strategy = {"num_stages": 2, "save_distributed_checkpoint": is_sharded}
    expected = pool.run(fit_and_resume, 4, str(tmp_path / "a"), 4, strategy, None)
    ours = pool.run(fit_and_resume, 4, str(tmp_path / "b"), 4, strategy, strategy)
    assert_agree(ours)
    for name, value in expected[0].state.items():
        torch.testing.assert_close(ours[0].state[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("resumes", [{"num_stages": 4}, {"num_stages": 1}])
def test_checkpoints_fit_any_division(pool: WorkerPool, tmp_path: Path, resumes: dict[str, Any]) -> None:
    outcomes = pool.run(fit_and_resume, 4, str(tmp_path), 4, {"num_stages": 2}, resumes)
    assert_agree(outcomes)
    assert outcomes[0].global_step > 17


class Slow(Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        time.sleep(0.02)


def fit_with_clock(folder: str) -> tuple[list[str], float]:
    begin = time.monotonic()
    checkpoint = ModelCheckpoint(folder, train_time_interval=timedelta(seconds=0.25), save_top_k=-1)
    fit(models.MLP, models.vectors, {"num_stages": 2}, 4, 2, callbacks=[checkpoint, Slow()], enable_checkpointing=True)
    return sorted(os.listdir(folder)), time.monotonic() - begin


def test_checkpoints_by_the_clock(pool: WorkerPool, tmp_path: Path) -> None:
    saved, seconds = pool.run(fit_with_clock, 4, str(tmp_path))[0]
    assert 1 <= len(saved) <= seconds / 0.25 + 1


class Predicts(models.ValidatedMLP):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0]).shape[0]


def evaluate() -> tuple[Any, Any]:
    from lightning_dgmp import DelayedMPStrategy

    trainer = Trainer(
        accelerator="cpu", devices=4, strategy=DelayedMPStrategy(num_stages=2), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    torch.manual_seed(3)
    module: LightningModule = Predicts()
    metrics = trainer.validate(module, models.vectors(72), verbose=False)
    return trainer.predict(module, models.vectors(70)), metrics  # each replica predicts for its half


def test_replicas_share_the_evaluation(pool: WorkerPool) -> None:
    results = pool.run(evaluate, 4)
    assert [sum(counts) for counts, _ in results] == [35, 35, 35, 35]
    assert results[0][1][0]["val_loss"] > 0


def test_early_stopping_and_schedulers_agree(pool: WorkerPool) -> None:
    outcomes = fit_on(pool, 2, 2, module_args={"optimizer": "adamw"}, max_epochs=2)
    expected = fit_on(pool, 2, 2, virtual=True, module_args={"optimizer": "adamw"}, max_epochs=2)
    assert_equal(outcomes[0], expected[0], 1e-5)
