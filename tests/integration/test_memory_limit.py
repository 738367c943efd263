"""What no process can hold: the operating system limits the memory of each, and the training state is larger."""

from __future__ import annotations

import ctypes
import resource
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dgmp import DelayedMPStrategy
from tests import models
from tests.deferred_models import LateMLP
from tests.integration.test_memory import MMAP_THRESHOLD, held
from tests.pool import Failure, WorkerPool

WIDTH, DEPTH = 1280, 16
STATE = 4 * 4 * WIDTH * WIDTH * DEPTH  # bytes of the weights, their gradients and two moments of Adam: 419 MB
LIMIT = STATE / 2.5


class Most(Callback):
    """How much memory the limit would count, at most."""

    most = 0

    def look(self, *args: Any) -> None:
        self.most = max(self.most, held("VmData"))

    on_train_batch_end = on_after_backward = on_validation_end = look


def train(width: int, folder: str, num_stages: int, max_steps: int, before: int | None = None) -> tuple[int, int]:
    """Train, save, validate; go on from what is there. Gives the most memory that was held, and the last step.

    Args:
        width: Of the model.
        folder: For checkpoints.
        num_stages: 1 for plain Lightning.
        max_steps: When to end.
        before: What a process holds for any model, beyond which it may have `LIMIT`.
    """
    warnings.simplefilter("ignore")
    assert ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 65536)  # what is freed goes back to the system
    seed_everything(7, verbose=False)
    strategy: Any = "auto"
    if num_stages > 1:
        strategy = DelayedMPStrategy(num_stages, backward="replay", save_distributed_checkpoint=True)
    most, saves = Most(), ModelCheckpoint(f"{folder}/{width}", every_n_train_steps=3, save_last=True, save_top_k=0)
    trainer = Trainer(
        accelerator="cpu", devices=num_stages, strategy=strategy, max_steps=max_steps, limit_val_batches=1,
        val_check_interval=2, logger=False, enable_progress_bar=False, callbacks=[saves, most],
    )  # fmt: skip
    module, loader = LateMLP(depth=DEPTH, width=width), models.vectors()
    path = Path(folder, str(width), "last.ckpt")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if before is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (before + int(LIMIT), hard))
    try:
        trainer.fit(module, loader, loader, ckpt_path=path if path.exists() else None)
        steps = trainer.global_step
        trainer.validate(module, loader, verbose=False)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    return most.most, steps


def test_four_processes_train_what_one_cannot_hold(tmp_path: Path) -> None:
    pool = WorkerPool()  # new processes, which end with the test
    before = min(most for most, _ in pool.run(train, 4, 16, str(tmp_path), 4, 3))
    (alone,) = pool.try_run(train, 1, WIDTH, str(tmp_path / "one"), 1, 3, before)
    assert isinstance(alone, Failure)
    assert "memory" in alone.message
    for steps in (3, 5):
        together = pool.run(train, 4, WIDTH, str(tmp_path), 4, steps, before, timeout=240)
        assert all(last_step == steps and most - before < LIMIT for most, last_step in together)
    pool.close()
