"""Values of a stage into which later stages write in place."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dgmp.plan.cut import Cuts
from lightning_dgmp.plan.trace import trace_step
from tests import models
from tests.pool import Failure, WorkerPool
from tests.training import Outcome, assert_equal, fit


class Validated(models.Base):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class BasicBlock(nn.Module):
    """As torchvision's."""

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Pyramid(Validated):
    """A feature pyramid, whose last modules take early features."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(lr=0.01, **kwargs)
        self.layer1, self.layer2, self.layer3 = BasicBlock(1, 4, 1), BasicBlock(4, 8, 2), BasicBlock(8, 16, 2)
        self.lat1, self.lat2, self.lat3 = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(8, 2, 3, padding=1)

    def loss(self, batch: Any) -> Tensor:
        c1 = self.layer1(batch[0])
        c2 = self.layer2(c1)
        p3 = self.lat3(self.layer3(c2))
        p2 = self.lat2(c2) + F.interpolate(p3, scale_factor=2.0)
        p1 = self.lat1(c1) + F.interpolate(p2, scale_factor=2.0)
        return F.cross_entropy(self.head(p1).mean((2, 3)), batch[1])


class LowLevel(Validated):
    """``how`` the result of ``b2`` gets into that of ``b1``; ``low`` is sent after it."""

    how = "+="

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stem, self.b1, self.b2, self.fuse = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 4)
        self.batches = 0

    def loss(self, batch: Any) -> Tensor:
        low = self.stem(batch[0])
        x = self.b1(low)
        x = self.write(x, torch.tanh(self.b2(x * 1)))
        return F.cross_entropy(self.head(F.relu(x + self.fuse(low))), batch[1])

    def write(self, x: Tensor, y: Tensor) -> Tensor:
        x += y
        return x


class ByMethod(LowLevel):
    def write(self, x: Tensor, y: Tensor) -> Tensor:
        x.mul_(y)
        return x


class ByIndex(LowLevel):
    def write(self, x: Tensor, y: Tensor) -> Tensor:
        x[:, :4] = y[:, :4]
        return x


class InAModule(LowLevel):
    """The module of the later stage writes into its argument."""

    class Adds(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            x.add_(torch.tanh(super().forward(x * 1)))
            return x

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.b2 = self.Adds(8, 8)

    def loss(self, batch: Any) -> Tensor:
        low = self.stem(batch[0])
        x = self.b1(low)
        self.b2(x)
        return F.cross_entropy(self.head(F.relu(x + self.fuse(low))), batch[1])


def run(pool: WorkerPool, model: Any, num_stages: int, **strategy: Any) -> Outcome:
    data = models.images if model is Pyramid else models.vectors
    devices = 1 if strategy.get("virtual") else num_stages
    strategy |= {"num_stages": num_stages}
    return pool.run(fit, devices, model, data, strategy, devices, make_val_loader=data, limit_train_batches=12)[0]


@pytest.mark.parametrize(
    ("model", "num_stages", "split_at"),
    [
        (Pyramid, 4, None),
        (Pyramid, 2, ["layer2.downsample"]),
        (LowLevel, 2, ["b2"]),
        (LowLevel, 3, ["b1", "b2"]),
        (LowLevel, 4, ["b1", "b2", "head"]),
        (ByMethod, 2, ["b2"]),
        (ByIndex, 2, ["b2"]),
        (ByIndex, 3, ["b1", "b2"]),
        (InAModule, 2, ["b2"]),
        (InAModule, 3, ["b1", "b2"]),
    ],
)
def test_processes_equal_virtual_stages(
    pool: WorkerPool, model: Any, num_stages: int, split_at: list[str] | None
) -> None:
    expected = run(pool, model, num_stages, split_at=split_at, virtual=True)
    for backward in ("stash", "recompute"):
        assert_equal(run(pool, model, num_stages, split_at=split_at, backward=backward), expected, 1e-6)


class UsesAView(LowLevel):
    def write(self, x: Tensor, y: Tensor) -> Tensor:
        view = x[:, :4]
        x += y
        return torch.cat([view, x[:, 4:]], dim=1)


def test_no_cut_lies_between_a_value_and_a_write_that_a_view_shows() -> None:
    module, batch = UsesAView(), (torch.randn(2, 8), torch.zeros(2, dtype=torch.long))
    cuts = Cuts(trace_step(lambda _: module.loss(batch), module, torch.device("cpu")))
    assert cuts.obstacles[2] == "a result of `__getitem__` before it, which `cat` takes, is changed in place behind it"


class WritesLater(LowLevel):
    def write(self, x: Tensor, y: Tensor) -> Tensor:
        self.batches += 1
        if self.batches > 1:
            x += y
        return x


class SendsAViewLater(LowLevel):
    def loss(self, batch: Any) -> Tensor:
        self.batches += 1
        low = self.stem(batch[0])
        x = self.b1(low)
        view = x.view(-1, 8)
        x += torch.tanh(self.b2(x * 1))
        return F.cross_entropy(self.head(F.relu(x + self.fuse(low if self.batches == 1 else view * 2))), batch[1])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (WritesLater, "`add_` writes a .* which it did not do on the first batch"),
        (SendsAViewLater, "Stage 0 should send leaf 0 of `fuse` to stage 1, but it is <ghost: .* made by `b2`"),
    ],
)
def test_other_writes_than_on_the_first_batch_are_errors(pool: WorkerPool, model: Any, message: str) -> None:
    results = pool.try_run(fit, 2, model, models.vectors, {"num_stages": 2, "split_at": ["b2"]}, 2)
    assert all(isinstance(result, Failure) for result in results)
    assert re.search(message, results[0].message)
