"""Optimizers of torch with state for each parameter, whatever the groups are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F

from tests import models
from tests.pool import Failure, WorkerPool
from tests.training import assert_equal, fit


class Matrices(models.Base):
    """Has nothing but matrices, which is all that Muon takes; the middle ones make a group."""

    def __init__(self, name: str, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.kwargs = name, kwargs
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(5))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return F.cross_entropy(x[:, :4], y)

    def configure_optimizers(self) -> Any:
        middle = [p for i, layer in enumerate(self.layers) for p in layer.parameters() if i == 2]
        rest = [p for i, layer in enumerate(self.layers) for p in layer.parameters() if i != 2]
        groups = [{"params": middle, "lr": 0.002}, {"params": rest}]
        return getattr(torch.optim, self.name)(groups, lr=0.001, **self.kwargs)


OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"fused": True}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "foreach": True}),
    ("AdamW", {"fused": True}),
    ("AdamW", {"foreach": True, "amsgrad": True}),
    ("Adam", {"foreach": False, "weight_decay": 0.1}),
    ("NAdam", {}),
    ("RAdam", {}),
    ("Muon", {}),
    ("Adagrad", {}),
    ("RMSprop", {"momentum": 0.5}),
    ("Adafactor", {}),
    ("Adadelta", {}),
    ("Adamax", {}),
    ("ASGD", {}),
    ("Rprop", {}),
]


@pytest.mark.parametrize(("name", "kwargs"), OPTIMIZERS, ids=lambda value: str(value))
def test_processes_equal_virtual_stages(pool: WorkerPool, name: str, kwargs: dict[str, Any]) -> None:
    args: dict[str, Any] = {"module_args": {"name": name, "kwargs": kwargs}, "limit_train_batches": 20}
    expected = pool.run(fit, 1, Matrices, models.vectors, {"num_stages": 3, "virtual": True}, 1, **args)[0]
    ours = pool.run(fit, 3, Matrices, models.vectors, {"num_stages": 3}, 3, **args)[0]
    assert_equal(ours, expected, 1e-5)


def test_fused_momentum(pool: WorkerPool) -> None:
    args: dict[str, Any] = {"module_args": {"name": "SGD", "kwargs": {"momentum": 0.9, "fused": True}}}
    result = pool.try_run(fit, 1, Matrices, models.vectors, {"num_stages": 3, "virtual": True}, 1, **args)[0]
    assert "Use `fused=False`." in result.message
    ours = pool.run(fit, 3, Matrices, models.vectors, {"num_stages": 3}, 3, **args)[0]
    args["module_args"]["kwargs"] = {"momentum": 0.9}
    assert_equal(ours, pool.run(fit, 3, Matrices, models.vectors, {"num_stages": 3}, 3, **args)[0], 1e-6)


class WithZero(models.MLP):
    def configure_optimizers(self) -> Any:
        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.SGD, lr=0.1)


def test_zero_redundancy_is_refused(pool: WorkerPool) -> None:
    for result in pool.try_run(fit, 2, WithZero, models.vectors, {"num_stages": 2}, 2):
        assert isinstance(result, Failure)
        assert "does not support `ZeroRedundancyOptimizer`" in result.message


def test_narrow_messages(pool: WorkerPool) -> None:
    args: dict[str, Any] = {"module_args": {"optimizer": "momentum"}}
    expected = pool.run(fit, 3, models.LanguageModel, models.ragged_tokens, {"num_stages": 3}, 3, **args)[0]
    strategy = {"num_stages": 3, "message_dtype": torch.bfloat16}
    ours = pool.run(fit, 3, models.LanguageModel, models.ragged_tokens, strategy, 3, **args)[0]
    differences = [(ours.state[name] - value).abs().max().item() for name, value in expected.state.items()]
    assert {value.dtype for value in ours.state.values()} == {torch.float32}
    assert 1e-6 < max(differences) < 0.02
    assert_equal(ours, expected, 0.05)
