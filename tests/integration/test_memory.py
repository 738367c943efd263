"""A process holds the parameters, the optimizer state and the memory of its stage, not of the model."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_dgmp import DelayedMPStrategy
from tests import models
from tests.pool import WorkerPool

WIDTH, DEPTH = 1536, 8  # 76 MB of parameters


class Measure(Callback):
    """The storage of parameters, gradients and optimizer state, and what the process holds, in the steady state."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        def storage(tensors: list[torch.Tensor]) -> int:
            return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

        parameters = list(pl_module.parameters())
        self.parameters = storage(parameters)
        self.gradients = storage([p.grad for p in parameters if p.grad is not None])
        state = trainer.optimizers[0].state.values()
        self.optimizer = storage([v for s in state for v in s.values() if isinstance(v, torch.Tensor) and v.dim()])


def measure(num_stages: int) -> tuple[int, int, int, int]:
    callback = Measure()
    module = models.MLP(depth=DEPTH, width=WIDTH, optimizer="adamw")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    strategy: Any = DelayedMPStrategy(num_stages=num_stages) if num_stages > 1 else "auto"
    trainer = Trainer(
        accelerator="cpu", devices=num_stages, strategy=strategy, max_steps=8, logger=False, callbacks=[callback],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, models.vectors())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return callback.parameters, callback.gradients, callback.optimizer, peak * 1024


def test_a_stage_holds_its_share(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.close()  # peaks count from the start of a process
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back to the system: peaks are exact
    whole = pool.run(measure, 1, 1)[0]
    pool.close()
    parts = pool.run(measure, 4, 4)
    pool.close()
    for i, what in enumerate(("parameters", "gradients", "optimizer state")):
        total = sum(part[i] for part in parts)
        assert abs(total - whole[i]) < 0.01 * whole[i], what
        assert max(part[i] for part in parts) < 0.3 * whole[i], what
    # The peak of plain training in equal shares, the snapshots of the batches in flight, and a share to spare. Rank r
    # has the delay r; the last stage keeps no snapshot.
    share = whole[0] / 4
    for rank, part in enumerate(parts):
        snapshots = rank + 1 if rank else 0
        assert part[3] < whole[3] / 4 + (snapshots + 1) * share, rank
