"""What a user does with a module, from the first fit to a resumed one, and the comparison of two such stories."""

from __future__ import annotations

import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

import lightning_dgmp
from tests.compat.modules import CASES, Case
from tests.training import ListLogger, Unwatched

__all__ = ["compare", "whole_story"]


def whole_story(name: str, strategy: dict[str, Any] | str | None, devices: int, tmp_path: str) -> dict[str, Any]:
    """Fit for two epochs, validate, test, predict, and resume for a third.

    Args:
        name: Of a case.
        strategy: A name, the arguments of :class:`~lightning_dgmp.DelayedMPStrategy`, or ``None`` for Lightning's own.
        devices: How many processes run this.
        tmp_path: A folder that all of them share.
    """
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    case, start = CASES[name], time.monotonic()
    seed_everything(7, verbose=False)
    module, datamodule = case.make(), None if case.data is None else case.data()
    trainer, logger, checkpoint = _trainer(case, strategy, devices, tmp_path, 2)
    trainer.fit(module, datamodule=datamodule)
    story: dict[str, Any] = {
        "rows": logger.rows,
        "global_step": trainer.global_step,
        "callback_metrics": _plain(trainer.callback_metrics),
        "best": Path(checkpoint.best_model_path).name,
        "best_score": _plain(checkpoint.best_model_score),
        "state": _state(module),
        "plan": str(plan) if (plan := getattr(trainer.strategy, "_plan", None)) is not None else None,
    }
    story["validate"] = _plain(trainer.validate(module, datamodule=datamodule, verbose=False))
    if is_overridden("test_step", module):
        story["test"] = _plain(trainer.test(module, datamodule=datamodule, verbose=False))
    if is_overridden("predict_step", module, LightningModule):
        predictions = trainer.predict(module, datamodule=datamodule)
        story["predictions"] = _plain(predictions) if trainer.is_global_zero else None
    story["state_after"] = _state(module)

    seed_everything(8, verbose=False)
    module, datamodule = case.make(), None if case.data is None else case.data()
    trainer, logger, checkpoint = _trainer(case, strategy, devices, tmp_path, 3)
    last = os.path.join(tmp_path, "last.ckpt")
    trainer.fit(module, datamodule=datamodule, ckpt_path=last, weights_only=False)  # hyperparameters may be functions
    story |= {
        "resumed_rows": logger.rows,
        "resumed_global_step": trainer.global_step,
        "resumed_best": Path(checkpoint.best_model_path).name,
        "resumed_state": _state(module),
        "seconds": time.monotonic() - start,
    }
    return story


def compare(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Assert that two stories tell the same; how they were cut and how long it took may differ."""
    ignored = {"plan", "seconds"}
    assert actual.keys() == expected.keys()
    for key in [key for key in expected if key not in ignored]:
        _compare(actual[key], expected[key], tolerance, key)


def _trainer(
    case: Case, strategy: dict[str, Any] | str | None, devices: int, folder: str, max_epochs: int
) -> tuple[Trainer, ListLogger, ModelCheckpoint]:
    chosen: Any = strategy if strategy is not None else "auto"
    if isinstance(strategy, dict):
        chosen = lightning_dgmp.DelayedMPStrategy(**strategy)
    logger = ListLogger()
    mode = "max" if "acc" in case.monitor else "min"
    name = f"best{max_epochs}-{{epoch}}-{{step}}"
    checkpoint = ModelCheckpoint(folder, filename=name, monitor=case.monitor, save_last=True, mode=mode)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=chosen,
        max_epochs=max_epochs,
        logger=logger,
        callbacks=[checkpoint, Unwatched()],
        log_every_n_steps=1,
        num_sanity_val_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return trainer, logger, checkpoint


def _state(module: LightningModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _plain(nest: Any) -> Any:
    """Tensors without graphs, in plain containers."""
    if isinstance(nest, Tensor):
        return nest.detach().clone()
    if isinstance(nest, np.ndarray):
        return torch.from_numpy(nest.copy())
    if isinstance(nest, dict):
        return {key: _plain(value) for key, value in nest.items()}
    if isinstance(nest, (list, tuple)):
        return [_plain(value) for value in nest]
    return nest


def _compare(actual: Any, expected: Any, tolerance: float, where: str) -> None:
    if isinstance(expected, dict):
        assert isinstance(actual, dict), f"{where}: {actual!r} instead of {expected!r}"
        more, fewer = sorted(actual.keys() - expected.keys()), sorted(expected.keys() - actual.keys())
        assert more == fewer, f"{where}: {fewer} are missing, {more} are too many"
        for key, value in expected.items():
            _compare(actual[key], value, tolerance, f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert isinstance(actual, (list, tuple)), f"{where}: {actual!r} instead of {expected!r}"
        assert len(actual) == len(expected), f"{where}: {len(actual)} items instead of {len(expected)}"
        for i, (ours, theirs) in enumerate(zip(actual, expected)):
            _compare(ours, theirs, tolerance, f"{where}[{i}]")
    elif isinstance(expected, (Tensor, float)):
        ours, theirs = torch.as_tensor(actual), torch.as_tensor(expected)
        assert ours.shape == theirs.shape, f"{where}: shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
        assert ours.dtype == theirs.dtype, f"{where}: {ours.dtype} instead of {theirs.dtype}"
        if not theirs.is_floating_point() or theirs.numel() == 0:
            assert torch.equal(ours, theirs), f"{where}: {ours.tolist()} instead of {theirs.tolist()}"
            return
        assert torch.equal(ours.isfinite(), theirs.isfinite()), f"{where}: {actual!r} instead of {expected!r}"
        finite = theirs.isfinite()
        scale = max(theirs[finite].abs().max().item(), 1e-3) if finite.any() else 1.0
        worst = (ours - theirs)[finite].abs().max().item() if finite.any() else 0.0
        text = f"{worst / scale:.1e} of the largest value, {scale:.3g}, more than {tolerance:.0e}"
        assert worst <= tolerance * scale, f"{where}: differs by {text}"
    else:
        assert actual == expected, f"{where}: {actual!r} instead of {expected!r}"
