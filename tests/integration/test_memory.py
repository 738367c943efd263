"""A process holds the parameters, the optimizer state and the memory of its stage, not of the model."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_dgmp import DelayedMPStrategy
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


def measure(num_stages: int) -> tuple[int, int, int, int]:
    # What is freed goes back to the system: peaks are exact.
    assert ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 65536)
    for width in (16, WIDTH):  # the small model brings in what a process needs for any
        callback = Measure()
        module = models.MLP(depth=DEPTH, width=width, optimizer="adamw")
        strategy: Any = DelayedMPStrategy(num_stages=num_stages) if num_stages > 1 else "auto"
        trainer = Trainer(
            accelerator="cpu", devices=num_stages, strategy=strategy, max_steps=8, logger=False, callbacks=[callback],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, models.vectors())
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
