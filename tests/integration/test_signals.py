"""Signals reach each process at another moment, and all stages act on them after the same batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dgmp import DelayedMPStrategy
from lightning_dgmp.world import PeerError
from tests import models
from tests.pool import WorkerPool
from tests.scripts import finish, start
from tests.training import fit


class Signals(Callback):
    """Sends a signal to its own process, once or more often."""

    def __init__(self, batches: dict[int, int], signum: int, times: int = 1) -> None:
        self.batches, self.signum, self.times, self.steps = batches, signum, times, 0

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        self.steps = trainer.global_step
        if self.batches.get(trainer.global_rank) == trainer.global_step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.signum)


def fit_until_the_term(rank: int) -> int:
    callback = Signals({rank: 9}, signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        fit(models.MLP, models.vectors, {"num_stages": 3}, 3, callbacks=[callback])
    return callback.steps


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_term_to_any_process_ends_all_after_the_same_batch(pool: WorkerPool, rank: int) -> None:
    steps = set(pool.run(fit_until_the_term, 3, rank))
    assert len(steps) == 1
    assert 9 <= steps.pop() <= 9 + 6


@contextmanager
def heeding_interrupts() -> Iterator[None]:
    """As a process of a terminal does; those of the pool ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def fit_until_the_interrupt(folder: str, batches: dict[int, int], times: int = 1) -> tuple[str, int, list[str]]:
    callbacks = [Signals(batches, signal.SIGINT, times), OnExceptionCheckpoint(folder)]
    with heeding_interrupts(), pytest.raises((SystemExit, PeerError)) as raised:
        fit(models.MLP, models.vectors, {"num_stages": 3}, 3, callbacks=callbacks, enable_checkpointing=True)
    return type(raised.value).__name__, callbacks[0].steps, os.listdir(folder)


@pytest.mark.parametrize("batches", [{0: 9}, {0: 9, 1: 10, 2: 9}, {2: 9}, {1: 34}])  # of which there are 34
def test_an_interrupt_of_any_process_ends_and_saves_after_the_same_batch(
    pool: WorkerPool, tmp_path: Path, batches: dict[int, int]
) -> None:
    results = pool.run(fit_until_the_interrupt, 3, str(tmp_path), batches)
    kind, steps, files = results[0]
    assert results == [results[0]] * 3
    assert (kind, files) == ("SystemExit", ["on_exception.ckpt"])  # which is what Lightning makes of an interrupt
    assert min(batches.values()) <= steps <= min(batches.values()) + 6
    checkpoint = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert checkpoint["global_step"] == steps
    assert not any(value.isnan().any() for value in checkpoint["state_dict"].values())


def test_a_second_interrupt_ends_at_once(pool: WorkerPool, tmp_path: Path) -> None:
    results = pool.run(fit_until_the_interrupt, 3, str(tmp_path), {0: 9}, 2)
    assert results[0] == ("SystemExit", 9, [])
    assert [kind for kind, _, _ in results[1:]] == ["PeerError"] * 2


class SignalsInEvaluation(Callback):
    """Sends a signal to its own process after the second batch of ``where``, and counts batches."""

    def __init__(self, where: str, rank: int, signum: int) -> None:
        self.where, self.rank, self.signum, self.batches = where, rank, signum, 0

    def after_batch(self, trainer: Trainer, *args: Any) -> None:
        if trainer.state.stage is None or self.where != trainer.state.stage.value:
            return
        self.batches += 1
        time.sleep(0.01)
        if self.batches == 2 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.signum)

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = after_batch


class Evaluated(models.ValidatedMLP):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])


def evaluate_until_the_signal(function: str, where: str, rank: int, folder: str, signum: int) -> tuple[int, list[str]]:
    callbacks = [SignalsInEvaluation(where, rank, signum), OnExceptionCheckpoint(folder)]
    trainer = Trainer(
        accelerator="cpu", devices=3, strategy=DelayedMPStrategy(), max_epochs=1, limit_train_batches=4, logger=False,
        callbacks=callbacks, enable_checkpointing=True, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=-1 if where == "sanity_check" else 0,
    )  # fmt: skip
    loaders = [models.vectors(16, 8), models.vectors(800, 8)]
    ending = SIGTERMException if signum == signal.SIGTERM else SystemExit
    keeping = patch.object(OnExceptionCheckpoint, "teardown")  # which removes the file
    with heeding_interrupts(), pytest.raises(ending) as raised, keeping:
        trainer.fit(Evaluated(), *loaders) if function == "fit" else getattr(trainer, function)(Evaluated(), loaders[1])
    assert type(raised.value) is ending
    return callbacks[0].batches, os.listdir(folder)


@pytest.mark.parametrize(
    ("function", "where", "ranks", "signum"),
    [
        ("fit", "sanity_check", [2], signal.SIGTERM),
        ("fit", "validate", [1], signal.SIGTERM),
        ("fit", "validate", [2], signal.SIGINT),
        ("validate", "validate", [2], signal.SIGTERM),
        ("test", "test", [0, 1], signal.SIGTERM),
        ("predict", "predict", [0, 2], signal.SIGTERM),
    ],
)
def test_a_signal_in_an_evaluation_ends_all_after_the_same_batch(
    pool: WorkerPool, tmp_path: Path, function: str, where: str, ranks: list[int], signum: int
) -> None:
    for rank in ranks:
        results = pool.run(evaluate_until_the_signal, 3, function, where, rank, str(tmp_path), signum, timeout=30)
        assert results[1:] == results[:-1]
        assert 2 <= results[0][0] <= 2 + 20
        assert results[0][1] == ["on_exception.ckpt"]


def fit_as_a_job(folder: str, batches: dict[int, int]) -> int:
    """As a SLURM job of three tasks, with a `scontrol` that only writes down what it is told."""
    variables = {
        "NTASKS": "3", "NTASKS_PER_NODE": "3", "JOB_NAME": "test", "PROCID": os.environ["LOCAL_RANK"],
        "LOCALID": os.environ["LOCAL_RANK"], "NODEID": "0", "NNODES": "1", "JOB_ID": "1", "NODELIST": "127.0.0.1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as changes:
        for name, value in variables.items():
            changes.setenv(f"SLURM_{name}", value)
        changes.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        callback = Signals(batches, signal.SIGUSR1)
        args: dict[str, Any] = {"plugins": [SLURMEnvironment()], "callbacks": [callback], "default_root_dir": folder}
        return fit(models.MLP, models.vectors, {"num_stages": 3}, 3, **args).global_step


@pytest.mark.parametrize("batches", [{0: 9}, {0: 9, 1: 9, 2: 9}, {2: 9}])
def test_a_job_is_saved_and_requeued_once(pool: WorkerPool, tmp_path: Path, batches: dict[int, int]) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    scontrol.chmod(0o755)
    assert pool.run(fit_as_a_job, 3, str(tmp_path), batches) == [34] * 3
    assert (tmp_path / "calls").read_text() == "requeue 1\n"
    checkpoint = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert 9 <= checkpoint["global_step"] <= 9 + 6
    assert not any(value.isnan().any() for value in checkpoint["state_dict"].values())


SCRIPT = """
import os, sys, time
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
import lightning_dgmp
from tests import models

class Model(models.MLP):
    def test_step(self, batch, batch_idx):
        self.loss(batch)

class Ready(Callback):
    num_batches = 0

    def on_train_batch_end(self, trainer, *args):
        time.sleep(0.05)
        self.num_batches += 1
        if self.num_batches == 5:
            open(os.path.join(sys.argv[1], str(trainer.global_rank)), "w").write(str(os.getpid()))

    on_test_batch_end = on_train_batch_end

    def on_exception(self, trainer, *args):
        open(os.path.join(sys.argv[1], f"end{trainer.global_rank}"), "w").write(str(trainer.global_step))

if __name__ == "__main__":
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="delayed_mp", max_epochs=100, logger=False, enable_progress_bar=False,
        callbacks=[Ready(), OnExceptionCheckpoint(sys.argv[1])],
    )
    try:
        getattr(trainer, sys.argv[2])(Model(), models.vectors(8000))
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__} of rank {trainer.global_rank}\\n")  # at once: two processes write
        raise
"""


def send(folder: Path, function: str, whom: str, signum: int) -> str:
    """Send a signal to a process of a launched run, and return what the run printed when all of it has ended."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(folder), function]
    # A shell that runs the tests in the background lets them ignore interrupts, and their children would too.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = start(command, start_new_session=True, preexec_fn=heed)
    try:
        deadline = time.monotonic() + 100
        while not ((folder / "0").exists() and (folder / "1").exists()):
            if time.monotonic() > deadline:
                finish(process, limit=0)
            assert process.poll() is None, process.communicate()
            time.sleep(0.2)
        time.sleep(0.5)  # the files are written
        if whom == "all":  # as the terminal does
            os.killpg(process.pid, signum)
        else:
            os.kill(int((folder / whom).read_text()), signum)
        errors = finish(process, limit=60)[0].stderr
        left = subprocess.run(["pgrep", "-f", str(script)], capture_output=True, text=True).stdout
        assert not left, "a process was left behind"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0 or signum == signal.SIGTERM  # whose exception is a SystemExit
    return errors


@pytest.mark.parametrize("whom", ["all", "0", "1"])
def test_an_interrupt_ends_all(tmp_path: Path, whom: str) -> None:
    assert "Detected KeyboardInterrupt" in send(tmp_path, "fit", whom, signal.SIGINT)
    assert (tmp_path / "end0").read_text() == (tmp_path / "end1").read_text()
    assert (tmp_path / "on_exception.ckpt").exists()


@pytest.mark.parametrize("whom", ["0", "1"])
def test_a_kill_of_one_ends_all(tmp_path: Path, whom: str) -> None:
    errors = send(tmp_path, "fit", whom, signal.SIGKILL)
    assert whom == "1" or "(rank 1) lost stage 1 (rank 0)" in errors


def test_a_term_to_one_ends_a_test(tmp_path: Path) -> None:
    errors = send(tmp_path, "test", "1", signal.SIGTERM)
    assert all(f"SIGTERMException of rank {rank}" in errors for rank in range(2)), errors


def fit_and_save_at_the_end(folder: str, fails: bool) -> Any:
    callback = Fails() if fails else Signals({1: 9}, signal.SIGTERM)
    callbacks = [callback, OnExceptionCheckpoint(folder)]
    with patch.object(OnExceptionCheckpoint, "teardown"):  # which removes the file
        return fit(models.MLP, models.vectors, {"num_stages": 2}, 2, callbacks=callbacks, enable_checkpointing=True)


class Fails(Callback):
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 9 and trainer.global_rank == 1:
            raise ZeroDivisionError("the user's own error")


def test_a_checkpoint_at_a_term_is_whole(pool: WorkerPool, tmp_path: Path) -> None:
    results = pool.try_run(fit_and_save_at_the_end, 2, str(tmp_path), False)
    assert [result.type for result in results] == ["SIGTERMException"] * 2
    checkpoint = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert 9 <= checkpoint["global_step"] <= 9 + 4
    assert not any(value.isnan().any() for value in checkpoint["state_dict"].values())


def test_no_checkpoint_at_the_failure_of_a_stage(pool: WorkerPool, tmp_path: Path) -> None:
    for result in pool.try_run(fit_and_save_at_the_end, 2, str(tmp_path), True):
        assert "the user's own error" in result.message
    assert not list(tmp_path.iterdir())
