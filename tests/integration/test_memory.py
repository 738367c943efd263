"""A process holds the parameters, the optimizer state and the memory of its stage, not of the model; the plan knows."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_dgmp import DelayedMPStrategy
from lightning_dgmp.plan.memory import memory_of
from tests import models
from tests.pool import WorkerPool

MMAP_THRESHOLD = -3  # of `mallopt(3)`
WIDTH, DEPTH = 1536, 8  # 76 MB of parameters


class Measure(Callback):
    """The storage of parameters, gradients and optimizer state, and what the process holds, in the steady state."""

    def __init__(self) -> None:
        self.before = held("VmRSS")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        def storage(tensors: list[torch.Tensor]) -> int:
            return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

        parameters = list(pl_module.parameters())
        self.parameters = storage(parameters)
        self.gradients = storage([p.grad for p in parameters if p.grad is not None])
        state = trainer.optimizers[0].state.values()
        self.peak = held("VmHWM") - self.before
        self.optimizer = storage([v for s in state for v in s.values() if isinstance(v, torch.Tensor) and v.dim()])


def held(what: str) -> int:
    """Bytes in memory: "VmRSS" now, or "VmHWM" at most. The peak that `getrusage` tells is also that of the parent."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return 1024 * int(line.split()[1])


def fit_twice(num_stages: int, make: Callable[[bool], tuple[Any, Any]], **kwargs: Any) -> tuple[Measure, Any]:
    """Train a small model, which brings in what a process needs for any, and then the real one."""
    # What is freed goes back to the system: peaks are exact.
    assert ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 65536)
    for is_small in (True, False):
        callback = Measure()
        module, data = make(is_small)
        strategy: Any = DelayedMPStrategy(num_stages=num_stages, **kwargs) if num_stages > 1 else "auto"
        trainer = Trainer(
            accelerator="cpu", devices=num_stages, strategy=strategy, max_steps=8, logger=False, callbacks=[callback],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, data)
    return callback, strategy


def mlp(is_small: bool) -> tuple[Any, Any]:
    return models.MLP(depth=DEPTH, width=16 if is_small else WIDTH, optimizer="adamw"), models.vectors()


def measure(num_stages: int) -> tuple[int, int, int, int]:
    callback, _ = fit_twice(num_stages, mlp)
    return callback.parameters, callback.gradients, callback.optimizer, callback.peak


def test_a_stage_holds_its_share() -> None:
    pool = WorkerPool()  # new processes, which end with the test
    whole = pool.run(measure, 1, 1)[0]
    pool.close()
    parts = pool.run(measure, 4, 4)
    pool.close()
    for i, what in enumerate(("parameters", "gradients", "optimizer state")):
        total = sum(part[i] for part in parts)
        assert abs(total - whole[i]) < 0.01 * whole[i], what
        assert max(part[i] for part in parts) < 0.3 * whole[i], what
    # The parameters, gradients and two moments of a stage, the snapshots of the batches in flight, what any process
    # needs besides, and half a share to spare. Rank r has the delay r; the last stage keeps no snapshot.
    share, besides = whole[0] / 4, whole[3] - 4 * whole[0]
    for rank, part in enumerate(parts):
        assert part[3] < (4 + rank) * share + besides + share / 2, rank


class Convolutions(models.ResidualNet):
    def __init__(self, channels: int, blocks: int, **kwargs: Any) -> None:
        super().__init__(channels, blocks, **kwargs)
        self.stem = nn.Conv2d(3, channels, 3, padding=1)


class Batches(Dataset[Any]):
    """Made when they are asked for, so that they take no memory before."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Any:
        return self._make()


def transformer(width: int, batch_size: int, is_small: bool, optimizer: str) -> tuple[Any, Any]:
    width, batch_size = (16, 2) if is_small else (width, batch_size)
    batches = Batches(lambda: torch.randint(0, 200, (batch_size, 33)))
    return models.LanguageModel(8, width, 200, optimizer=optimizer), DataLoader(batches, batch_size=None)


def convolutions(channels: int, batch_size: int, is_small: bool, optimizer: str) -> tuple[Any, Any]:
    channels, batch_size = (4, 2) if is_small else (channels, batch_size)
    batches = Batches(lambda: (torch.randn(batch_size, 3, 48, 48), torch.zeros(batch_size, dtype=torch.long)))
    return Convolutions(channels, 8, optimizer=optimizer), DataLoader(batches, batch_size=None)


def predict_and_measure(make: Any, size: int, batch_size: int, optimizer: str, backward: Any) -> tuple[int, int]:
    callback, strategy = fit_twice(3, lambda small: make(size, batch_size, small, optimizer), backward=backward)
    return memory_of(strategy.plan, backward)[strategy.stage].total, callback.peak


@pytest.mark.parametrize(
    "case",
    [
        (transformer, 384, 4, "adamw", "stash"),  # parameters and snapshots
        (transformer, 128, 64, "momentum", "stash"),  # activations
        (transformer, 128, 64, "adamw", "recompute"),
        (convolutions, 24, 24, "adamw", "stash"),
        (convolutions, 24, 24, "momentum", "recompute"),
    ],
)
def test_peaks_are_those_of_the_plan(case: Any) -> None:
    pool = WorkerPool()
    for rank, (predicted, measured) in enumerate(pool.run(predict_and_measure, 3, *case)):
        assert predicted == pytest.approx(measured, rel=0.15), rank
    pool.close()
