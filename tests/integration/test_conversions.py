"""Checkpoints go from any strategy to any other: each parameter keeps what its optimizer remembers about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import Optimizer

from tests import models
from tests.pool import WorkerPool
from tests.training import fit

State = dict[str, dict[str, Tensor]]


class NotesTheState(Callback):
    """Keeps what the optimizer remembers right before this process's first update."""

    def __init__(self) -> None:
        self.state: State = {}

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        if not self.state:
            held = [(name, p) for name, p in module.named_parameters() if p in optimizer.state]
            self.state = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in held}


def fit_and_save(folder: str, strategy: Any, devices: int, **kwargs: Any) -> State:
    notes = NotesTheState()
    callbacks = [ModelCheckpoint(folder, save_top_k=-1, filename="{step}"), notes]
    args: dict[str, Any] = {"module_args": {"optimizer": "adamw"}, "limit_train_batches": 6, "callbacks": callbacks}
    fit(models.MLP, models.vectors, strategy, devices, enable_checkpointing=True, **args, **kwargs)
    return notes.state


def by_name(checkpoint: dict[str, Any]) -> State:
    """The state in the file, of parameters in the order in which the user's groups have them."""
    parameters = list(models.MLP().named_parameters())
    names = [name for name, p in parameters if p.dim() >= 2] + [name for name, p in parameters if p.dim() < 2]
    saved = checkpoint["optimizer_states"][0]
    assert [i for group in saved["param_groups"] for i in group["params"]] == list(range(len(names)))
    return {name: saved["state"][i] for i, name in enumerate(names)}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (({"num_stages": 2}, 2), ("ddp", 2)),
        (({"num_stages": 2}, 2), ({"num_stages": 4}, 4)),
        (("ddp", 2), ({"num_stages": 2}, 2)),
        ((None, 1), ({"num_stages": 4}, 4)),
        (({"num_stages": 4}, 4), (None, 1)),
        (({"num_stages": 4}, 4), ({"num_stages": 2}, 2)),
    ],
    ids=["2 to ddp", "2 to 4", "ddp to 2", "1 to 4", "4 to 1", "4 to 2"],
)
def test_the_optimizers_state_by_parameter(pool: WorkerPool, tmp_path: Path, before: Any, after: Any) -> None:
    pool.run(fit_and_save, before[1], str(tmp_path / "before"), *before)
    path = tmp_path / "before" / "step=6.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    expected = by_name(checkpoint)
    resumed = {"max_epochs": 2, "ckpt_path": str(path)}
    states = pool.run(fit_and_save, after[1], str(tmp_path / "after"), *after, **resumed)
    assert set().union(*states) == expected.keys()
    for state in states:
        assert after[0] not in ("ddp", None) or state.keys() == expected.keys()
        for name, remembered in state.items():
            assert remembered.keys() == {"step", "exp_avg", "exp_avg_sq"}
            torch.testing.assert_close(remembered, expected[name], rtol=0, atol=0)
    later = torch.load(tmp_path / "after" / "step=12.ckpt", weights_only=True)
    assert later.keys() - {"lightning_dgmp"} == checkpoint.keys() - {"lightning_dgmp"}
    for name, remembered in by_name(later).items():
        assert remembered["exp_avg"].shape == expected[name]["exp_avg"].shape
        assert not remembered["exp_avg"].equal(expected[name]["exp_avg"])
        assert later["state_dict"][name].shape == checkpoint["state_dict"][name].shape
