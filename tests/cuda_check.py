"""``python -m tests.cuda_check``: several stages that share one GPU, beside virtual stages and a plain Trainer on it.

Prints a line for each precision: how far the weights are apart after training, the loss scale, and the time per batch.
The stages talk over gloo, through pinned host memory. Needs a GPU, says so elsewhere, and ends with 1 if they differ.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_dgmp import DelayedMPStrategy
from tests import models
from tests.pool import WorkerPool

__all__ = ["check", "train"]

# Kernels for other shapes of the same sum may round differently.
TOLERANCES = {"32-true": 1e-5, "bf16-mixed": 1e-4, "16-mixed": 1e-4}


class _Clock(Callback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def train(num_stages: int, mode: str, precision: str, num_replicas: int = 1) -> dict[str, Any]:
    """Train a small language model or, on replicas, a network with ``sync_batchnorm``.

    ``mode`` is "plain", "virtual" or "processes".
    """
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    seed_everything(7, verbose=False)
    module: models.Base = models.LanguageModel(layers=6, width=64, optimizer="momentum")
    if num_replicas > 1:
        module = models.ResidualNet(optimizer="momentum")
    clock = _Clock()
    strategy: Any = "auto"
    if mode != "plain":
        shared = [torch.device("cuda", 0)] * (num_stages if mode == "processes" else 1) * num_replicas
        strategy = DelayedMPStrategy(
            num_stages, virtual=mode == "virtual", parallel_devices=shared, process_group_backend="gloo"
        )
    trainer = Trainer(
        accelerator="cuda",
        devices=1,
        strategy=strategy,
        sync_batchnorm=num_replicas > 1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, models.images() if num_replicas > 1 else models.ragged_tokens())
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    steps = sorted(b - a for a, b in zip(clock.times[10:], clock.times[11:]))
    return {
        "state": {name: value.detach().cpu() for name, value in module.state_dict().items()},
        "ms": 1000 * steps[len(steps) // 2],
        "scale": None if scaler is None else scaler.get_scale(),
    }


def check(pool: WorkerPool, num_stages: int, precision: str, num_replicas: int = 1) -> tuple[bool, str]:
    """Whether processes do what virtual stages do, and a line about it."""
    args: dict[str, Any] = {"num_replicas": num_replicas, "timeout": 300}
    ours = pool.run(train, num_stages * num_replicas, num_stages, "processes", precision, **args)[0]
    virtual = pool.run(train, num_replicas, num_stages, "virtual", precision, **args)[0]
    plain = pool.run(train, 1, 1, "plain", precision, timeout=300)[0]
    worst = max((ours["state"][name] - value).abs().max().item() for name, value in virtual["state"].items())
    is_same = worst <= TOLERANCES[precision] and ours["scale"] == virtual["scale"]
    return is_same, (
        f"{precision:10} K={num_stages}, R={num_replicas}: differs from virtual stages by {worst:.1e}, scale"
        f" {ours['scale']} and {virtual['scale']}; ms per batch: processes {ours['ms']:.2f}, virtual"
        f" {virtual['ms']:.2f}, plain {plain['ms']:.2f}"
    )


def main() -> int:
    """Check all precisions."""
    if not torch.cuda.is_available():
        print("There is no CUDA device here.")
        return 0
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name(0)}")
    pool, all_same = WorkerPool(), True
    try:
        for precision in TOLERANCES:
            for num_stages, num_replicas in ((2, 1), (3, 1), (2, 2)):
                is_same, line = check(pool, num_stages, precision, num_replicas)
                all_same &= is_same
                print(line, flush=True)
    finally:
        pool.close()
    return 0 if all_same else 1


if __name__ == "__main__":
    sys.exit(main())
