"""What steps change through `.data`, through views, or in an object, ends as if they had changed the tensor itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dgmp.data import _pickled
from lightning_dgmp.operations import GhostMode
from tests import models
from tests.pool import WorkerPool
from tests.training import Outcome, assert_equal, fit

STAGES = [{"num_stages": 2, "virtual": True}, {"num_stages": 2}, {"num_stages": 2, "backward": "recompute"}]


def run(pool: WorkerPool, model: Any, strategy: dict[str, Any] | None, **kwargs: Any) -> list[Outcome]:
    devices = 1 if strategy is None or "virtual" in strategy else 2
    return pool.run(fit, devices, model, models.vectors, strategy, devices, **kwargs)


class Layer(nn.Module):
    def __init__(self, change: Callable[[Layer, Tensor], None]) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(8, 8), change
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("bank", torch.zeros(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        self.change(self, x.detach().mean(0))
        return torch.tanh((x - self.mean - self.bank.mean(0)) / (1 + 0.1 * self.steps))


class Layers(models.Base):
    """One layer for each of ``CHANGES[kind]``; ``in_place`` has them all do the first."""

    def __init__(self, kind: str, in_place: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        changes = CHANGES[kind]
        self.layers = nn.ModuleList(Layer(changes[0] if in_place else change) for change in changes)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(x, y)


def adds(layer: Layer, _: Tensor) -> None:
    layer.steps.add_(1)


def adds_to_data(layer: Layer, _: Tensor) -> None:
    layer.steps.data.add_(1)


def augments_data(layer: Layer, _: Tensor) -> None:
    layer.steps.data += 1


def copies_to_data(layer: Layer, _: Tensor) -> None:
    layer.steps.data.copy_(layer.steps + 1)


def sets_data(layer: Layer, _: Tensor) -> None:
    layer.steps.data = layer.steps + 1


def averages(layer: Layer, new: Tensor) -> None:
    layer.mean.mul_(0.9).add_(new, alpha=0.1)


def averages_data(layer: Layer, new: Tensor) -> None:
    layer.mean.data.mul_(0.9).add_(new, alpha=0.1)


def copies_average(layer: Layer, new: Tensor) -> None:
    layer.mean.data.copy_(0.9 * layer.mean + 0.1 * new)


def sets_average(layer: Layer, new: Tensor) -> None:
    layer.mean.data = 0.9 * layer.mean + 0.1 * new


def averages_view(layer: Layer, new: Tensor) -> None:
    layer.mean[:].mul_(0.9).add_(new, alpha=0.1)


def averages_detached(layer: Layer, new: Tensor) -> None:
    layer.mean.detach().mul_(0.9).add_(new, alpha=0.1)


def banks(layer: Layer, new: Tensor) -> None:
    layer.bank[0] = new


def banks_row(layer: Layer, new: Tensor) -> None:
    layer.bank[0].copy_(new)


CHANGES = {
    "count": [adds, adds_to_data, augments_data, copies_to_data, sets_data],
    "average": [averages, averages_data, copies_average, sets_average, averages_view, averages_detached],
    "bank": [banks, banks_row, banks_row, banks_row],
}


@pytest.mark.parametrize("kind", CHANGES)
def test_buffers_of_layers(pool: WorkerPool, kind: str) -> None:
    in_place = {"kind": kind, "in_place": True}
    for strategy in STAGES:
        expected = run(pool, Layers, STAGES[0], module_args=in_place)[0]
        assert_equal(run(pool, Layers, strategy, module_args={"kind": kind})[0], expected, 1e-6)


class Anneals(models.MLP):
    """A counter of the LightningModule's own, a plain average that a hook logs, and a count of an evaluation."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))
        self.average = torch.zeros(())

    def loss(self, batch: Any) -> Tensor:
        self.steps.data.add_(1)
        return F.cross_entropy(self(batch[0]) / (1 + 0.1 * self.steps), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.average.data.mul_(0.9).add_(loss.item(), alpha=0.1)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.data += len(batch[0])
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def on_train_epoch_end(self) -> None:
        self.log("average", self.average.clone())


def test_attributes_of_the_lightning_module(pool: WorkerPool) -> None:
    plain = run(pool, Anneals, None, make_val_loader=models.vectors)[0]
    virtual = run(pool, Anneals, STAGES[0], make_val_loader=models.vectors)[0]
    for strategy in STAGES:
        for outcome in run(pool, Anneals, strategy, make_val_loader=models.vectors):
            for name in ("steps", "seen"):
                assert outcome.state[name] == plain.state[name]
            assert outcome.metrics["average"] == pytest.approx(virtual.metrics["average"])


class ReturnsItsBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.linear(x)
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return torch.tanh(x), self.mean.clone()


class UsesTheBufferOfAnother(models.Base):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.first, self.second, self.out = ReturnsItsBuffer(), nn.Linear(8, 8), nn.Linear(8, 4)

    def loss(self, batch: Any) -> Tensor:
        x, mean = self.first(batch[0])
        return F.cross_entropy(self.out(torch.tanh(self.second(x)) + mean), batch[1])


def test_a_buffer_that_its_owner_alone_knows_is_no_value_elsewhere(pool: WorkerPool) -> None:
    strategy = {"num_stages": 2, "split_at": ["second"]}
    results = pool.try_run(fit, 2, UsesTheBufferOfAnother, models.vectors, strategy, 2)
    assert all("made by a buffer that takes activations" in result.message for result in results), results


class Normalises(models.MLP):
    """The batch is an object, of which an attribute is set, a tensor changed in place, and a list made shorter."""

    def loss(self, batch: Any) -> Tensor:
        batch.x = (batch.x - 1) / 2
        batch.y.sub_(1).remainder_(4)
        batch.names.pop()
        assert len(batch.names) == len(batch.x) - 1
        return super().loss((batch.x, batch.y))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch.y))


def test_a_batch_that_is_an_object_is_changed_once(pool: WorkerPool) -> None:
    def run(strategy: dict[str, Any] | None, **module_args: Any) -> Outcome:
        devices = 1 if strategy is None or "virtual" in strategy else 2
        arguments: dict[str, Any] = {"module_args": module_args, "make_val_loader": models.graphs}
        return pool.run(fit, devices, Normalises, models.graphs, strategy, devices, limit_val_batches=2, **arguments)[0]

    virtual = {"num_stages": 2, "virtual": True}
    assert_equal(run(virtual, lr=0.0), run(None, lr=0.0), 1e-6)
    expected = run(virtual)
    assert_equal(run({"num_stages": 2}), expected, 1e-6)
    assert_equal(run({"num_stages": 2, "backward": "recompute"}), expected, 1e-6)


def test_an_object_that_is_loaded_again_with_what_another_stage_made() -> None:
    ghost = GhostMode().like(torch.zeros(3), "`out` of stage 1", False, torch.device("cpu"))
    with pytest.raises(TypeError, match=r"made by `out` of stage 1, which a step has kept in it.*`copy.copy\(item\)`"):
        _pickled(models.Graph(pred=ghost))
