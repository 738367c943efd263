"""More batches in flight between neighbours: the same as longer delays, and less waiting for slow links."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor

from lightning_dgmp import DelayedMPStrategy
from tests import models, sharing
from tests.pool import WorkerPool
from tests.training import assert_equal, fit


@pytest.mark.parametrize("slack", [1, 2])
def test_virtual_stages_are_a_fifo_of_gradients(pool: WorkerPool, slack: int) -> None:
    strategy = {"num_stages": 3, "virtual": True, "slack": slack}
    args = {"module_args": {"optimizer": "momentum"}}
    ours = pool.run(fit, 1, models.MLP, models.vectors, strategy, 1, **args)[0]
    seed_everything(7, verbose=False)
    module = models.MLP(optimizer="momentum")
    optimizer: Any = module.configure_optimizers()
    named = list(module.named_parameters())
    fifo: dict[str, deque[Tensor | None]] = {
        n: deque([None] * ((2 - ours.stages[n][0]) * (1 + slack))) for n, _ in named
    }
    for batch in models.vectors():
        optimizer.zero_grad()
        module.loss(batch).backward()
        for n, p in named:
            fifo[n].append(p.grad)
            p.grad = fifo[n].popleft()
        optimizer.step()
    while any(fifo.values()):
        for n, p in named:
            p.grad = fifo[n].popleft() if fifo[n] else None
        optimizer.step()
    for n, p in named:
        torch.testing.assert_close(ours.state[n], p.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "loader", "options", "args"),
    [
        (models.MLP, models.vectors, {}, {"max_epochs": 2}),
        (models.MLP, models.vectors, {"backward": "recompute"}, {"gradient_clip_val": 0.3}),
        (models.MLP, models.vectors, {}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.3}),
        (models.MLP, models.vectors, {"predict_weights": True}, {"module_args": {"optimizer": "momentum"}}),
        (models.MLP, models.vectors, {"synchronous_steps": 8, "correct_updates": True}, {}),
        (models.ValidatedMLP, models.vectors, {}, {"make_val_loader": models.vectors, "val_check_interval": 9}),
        (models.LanguageModel, models.ragged_tokens, {}, {"limit_train_batches": 3}),
        (sharing.Tied, models.ragged_tokens, {}, {}),
    ],
)
def test_processes_equal_virtual_stages(pool: WorkerPool, model: Any, loader: Any, options: Any, args: Any) -> None:
    virtual = {key: value for key, value in options.items() if key != "backward"}
    expected = pool.run(fit, 1, model, loader, {"num_stages": 3, "virtual": True, "slack": 2, **virtual}, 1, **args)[0]
    ours = pool.run(fit, 3, model, loader, {"num_stages": 3, "slack": 2, **options}, 3, **args)[0]
    assert_equal(ours, expected, 1e-6)


def test_replicas_with_slack(pool: WorkerPool) -> None:
    args: dict[str, Any] = {"gradient_clip_val": 0.3, "module_args": {"optimizer": "momentum"}}
    expected = pool.run(fit, 2, models.MLP, models.vectors, {"num_stages": 2, "virtual": True, "slack": 1}, 2, **args)[
        0
    ]
    outcomes = pool.run(fit, 4, models.MLP, models.vectors, {"num_stages": 2, "slack": 1}, 4, **args)
    for outcome in outcomes:
        assert_equal_state(outcome.state, expected.state)


def assert_equal_state(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("slack", [-1, 0.5, True])
def test_impossible_slack(slack: Any) -> None:
    with pytest.raises(ValueError, match="`slack` must be an integer of at least 0, but is"):
        DelayedMPStrategy(2, slack=slack)
