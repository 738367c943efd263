"""Training runs whose outcomes tests compare."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader

import lightning_dgmp
from lightning_dgmp import DelayedMPMonitor

__all__ = ["ListLogger", "Outcome", "Unwatched", "assert_equal", "fit"]


class ListLogger(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "list"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step or 0, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class Unwatched(DelayedMPMonitor):
    """Stands where a monitor would be added by itself, and report after every batch, which takes time."""

    def on_train_batch_end(self, *_: Any) -> None: ...


class Outcome:
    """What a run leaves: the weights, what it logged, and where it ended."""

    def __init__(self, trainer: Trainer, module: LightningModule, logger: ListLogger) -> None:
        with getattr(trainer.strategy, "whole_model", nullcontext)():
            self.state = {name: value.clone() for name, value in module.state_dict().items()}
        self.rows = logger.rows
        self.global_step = trainer.global_step
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        plan = getattr(trainer.strategy, "_plan", None)
        self.summaries = [] if plan is None else plan.stages
        self.plan = None if plan is None else str(plan)
        self.stages = {} if plan is None else {name: plan.stage_of(name) for name, _ in module.named_parameters()}


def fit(
    make_module: Callable[..., LightningModule],
    make_loader: Callable[[], DataLoader],
    strategy: dict[str, Any] | str | None,
    devices: int,
    max_epochs: int = 1,
    module_args: dict[str, Any] | None = None,
    make_val_loader: Callable[[], DataLoader] | None = None,
    ckpt_path: str | None = None,
    seed: int = 7,
    **trainer_args: Any,
) -> Outcome:
    """Train; ``strategy`` is a name, the arguments of :class:`DelayedMPStrategy`, or ``None`` for Lightning's own."""
    warnings.simplefilter("ignore")
    seed_everything(seed, verbose=False)
    module = make_module(**(module_args or {}))
    logger = ListLogger()
    chosen: Any = strategy if strategy is not None else "auto"
    if isinstance(strategy, dict):
        chosen = lightning_dgmp.DelayedMPStrategy(**strategy)
    defaults: dict[str, Any] = dict.fromkeys(
        ("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    callbacks = [*trainer_args.pop("callbacks", []), *([] if "logger" in trainer_args else [Unwatched()])]
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=chosen,
        max_epochs=max_epochs,
        callbacks=callbacks,
        **{"logger": logger, "log_every_n_steps": 1, **defaults, **trainer_args},
    )
    trainer.fit(module, make_loader(), make_val_loader() if make_val_loader else None, ckpt_path=ckpt_path)
    return Outcome(trainer, module, logger)


def assert_equal(actual: Outcome, expected: Outcome, tolerance: float) -> None:
    """Compare weights, buffers and everything that was logged."""
    assert actual.global_step == expected.global_step
    assert [step for step, _ in actual.rows] == [step for step, _ in expected.rows]
    for (step, ours), (_, theirs) in zip(actual.rows, expected.rows):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert abs(ours[key] - value) <= tolerance * max(1.0, abs(value)), (step, key, ours[key], value)
    assert actual.state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        if value.is_floating_point():
            worst = (actual.state[name] - value).abs().max().item()
            assert worst <= tolerance * max(1.0, value.abs().max().item()), (name, worst)
        else:
            torch.testing.assert_close(actual.state[name], value)
