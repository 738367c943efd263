"""Collectives of user code and of metrics concern the replicas, wherever they are called."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch import Tensor
from torchmetrics import MeanMetric, SumMetric

from lightning_dgmp.replicas import Replicas
from tests import models
from tests.pool import WorkerPool
from tests.training import assert_equal, fit


class Passes(torch.autograd.Function):
    """Averages over all processes on the way back, as functions that gather do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad / dist.get_world_size()


class Asks(models.ValidatedMLP):
    """Asks the other processes, as code for DDP does, and keeps metrics where no module holds them."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.metrics = {"dict": SumMetric()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        loss = Passes.apply(loss)
        total = loss.detach().clone()
        dist.all_reduce(total)
        dist.all_reduce(total, group=dist.group.WORLD)
        self.trainer.strategy.barrier("in a step")
        made = MeanMetric()
        made.update(loss.detach())
        self.metrics["dict"].update(loss.detach())
        self.log("total", total / dist.get_world_size())
        self.log("told", self.trainer.strategy.broadcast(float(dist.get_rank())))
        self.log("stop", float(self.trainer.strategy.reduce_boolean_decision(batch_idx % 2 == 0)))
        self.log("made", made.compute())
        self.log("dict", self.metrics["dict"].compute())
        return loss


class Sums(Callback):
    """A callback with a metric of its own."""

    def __init__(self) -> None:
        self.sum = SumMetric()

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.sum.update(1.0)

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        module.log("sum", self.sum.compute())
        self.sum.reset()


def run(strategy: Any, devices: int) -> Any:
    kwargs: dict[str, Any] = {"callbacks": [Sums()], "make_val_loader": models.vectors, "limit_train_batches": 8}
    return fit(Asks, models.vectors, strategy, devices, **kwargs)


def test_processes_log_what_virtual_stages_log(pool: WorkerPool) -> None:
    expected = pool.run(run, 1, {"num_stages": 3, "virtual": True}, 1)[0]
    assert {"total", "told", "stop", "made", "dict", "sum"} <= {key for _, row in expected.rows for key in row}
    assert_equal(pool.run(run, 3, {"num_stages": 3}, 3)[0], expected, 1e-6)


def ask_in_two_ways() -> Any:
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    groups = [dist.new_group([0]), dist.new_group([1])]
    replicas = Replicas(groups[rank], groups[rank])
    sizes = [dist.get_world_size()]
    with replicas.step():
        value = torch.ones(())
        dist.all_reduce(value)
        sizes += [dist.get_world_size(), int(value)]
    metric = SumMetric()
    metric.update(1.0)
    sizes.append(int(metric.compute()))
    replicas.close()
    metric.update(1.0)
    return [*sizes, dist.get_world_size(), int(metric.compute())]


def test_the_world_is_replaced_in_steps_alone(pool: WorkerPool) -> None:
    assert pool.run(ask_in_two_ways, 2) == [[2, 1, 1, 1, 2, 4]] * 2


class StepsByHand(models.ValidatedMLP):
    """Steps a scheduler, and counts, in an overridden `optimizer_step`."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
        self.count = 0
        return optimizer

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.scheduler.step()
        self.count += 1

    def on_train_epoch_end(self) -> None:
        self.log("rate", self.scheduler.get_last_lr()[0])
        self.log("count", float(self.count))


def step_by_hand(strategy: Any, devices: int) -> Any:
    kwargs: dict[str, Any] = {"val_check_interval": 5, "limit_train_batches": 20}
    return fit(StepsByHand, models.vectors, strategy, devices, make_val_loader=models.vectors, **kwargs)


def test_a_scheduler_stepped_by_hand_steps_once_a_batch(pool: WorkerPool) -> None:
    expected = pool.run(step_by_hand, 1, {"num_stages": 3, "virtual": True}, 1)[0]
    assert next(row["count"] for _, row in expected.rows if "count" in row) == 20
    assert_equal(pool.run(step_by_hand, 3, {"num_stages": 3}, 3)[0], expected, 1e-6)


class Divided(torch.optim.Optimizer):
    """As Muon of its author: each process computes every n-th update, and all gather what the others have."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            result = None if closure is None else closure()
        assert (dist.get_world_size(), dist.get_rank()) == (self.world_size, self.rank)
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if i % self.world_size == self.rank:
                    p.sub_(group["lr"] * p.grad.sign() * p.grad.norm())
                dist.broadcast(p, dist.get_global_rank(dist.group.WORLD, i % self.world_size))
        return result


class DividedMLP(models.MLP):
    def configure_optimizers(self) -> Any:
        return Divided(self.parameters(), 0.05)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_optimizers_that_divide_their_work(pool: WorkerPool, num_replicas: int) -> None:
    args: tuple[Any, ...] = DividedMLP, models.vectors
    ours = pool.run(fit, 2 * num_replicas, *args, {"num_stages": 2}, 2 * num_replicas)[0]
    strategy = {"num_stages": 2, "virtual": True}
    assert_equal(ours, pool.run(_virtual, num_replicas, *args, strategy, num_replicas)[0], 1e-6)


def _virtual(*args: Any) -> Any:
    if not dist.is_initialized():  # one virtual process has no process group, which such an optimizer needs
        dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    return fit(*args)
