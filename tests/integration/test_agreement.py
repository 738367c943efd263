"""All processes begin with the model of rank 0, whatever they have made without a seed, or say how theirs differ."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dgmp import DelayedMPStrategy
from tests import models, sharing
from tests.pool import WorkerPool
from tests.training import assert_equal, fit


class RandomFeatures(models.Base):
    """A buffer of the LightningModule is used at both ends; others have no usual layout or dtype."""

    def __init__(self, width: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("features", torch.randn(8, width) / 3)
        self.register_buffer("transposed", torch.randn(4, 8).t())
        self.register_buffer("complex", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("mask", torch.rand(5) > 0.5)
        self.register_buffer("empty", torch.rand(0, 3))
        self.register_buffer("repeated", torch.randn(8, 1).expand(8, 4))
        self.register_buffer("number", torch.rand(()))
        self.register_buffer("sparse", torch.diag((torch.rand(6) > 0.5).float()).to_sparse())
        self.layers, self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(4)), nn.Linear(width, width)

    def loss(self, batch: Any) -> Tensor:
        x, _ = batch
        hidden = torch.cos(x @ self.features)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return F.mse_loss(self.out(hidden) @ self.features.t(), x) + self.number


MODELS: dict[str, tuple[Any, Any]] = {
    "tied": (sharing.Tied, models.ragged_tokens),
    "buffers": (RandomFeatures, models.vectors),
}


def make_on_rank(make: Callable[[], LightningModule], is_alike: bool) -> LightningModule:
    torch.manual_seed(7 if is_alike else 7 + int(os.environ["LOCAL_RANK"]))
    return make()


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("name", list(MODELS))
def test_no_seed_is_needed(pool: WorkerPool, name: str, replicas: int) -> None:
    make, data = MODELS[name]
    ours, expected = (
        pool.run(fit, 2 * replicas, partial(make_on_rank, make, alike), data, {"num_stages": 2}, 2 * replicas)
        for alike in (False, True)
    )
    for outcome in ours:
        for key, value in expected[0].state.items():
            torch.testing.assert_close(outcome.state[key], value, rtol=0, atol=0)
            assert outcome.state[key].layout == value.layout


class MixesUp(models.MLP):
    """With generators of its own, which draw before the network what both its ends need."""

    def __init__(self) -> None:
        super().__init__()
        self.generators = [torch.Generator().manual_seed(torch.initial_seed()), Random(torch.initial_seed())]
        self.numpy_generator = numpy.random.default_rng(torch.initial_seed())

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        torch_generator, generator = self.generators
        share = torch.rand((), generator=torch_generator) * generator.random() * self.numpy_generator.random()
        return share * super().loss((share * x, y))


def test_generators_of_modules_go_on_alike(pool: WorkerPool) -> None:
    ours, expected = (
        pool.run(fit, 2, partial(make_on_rank, MixesUp, alike), models.vectors, {"num_stages": 2}, 2)[0]
        for alike in (False, True)
    )
    assert_equal(ours, expected, 0)


class DeeperBehind(models.MLP):
    def __init__(self) -> None:
        super().__init__(depth=4 + int(os.environ["LOCAL_RANK"]) // 2)


class WiderBehind(models.MLP):
    def __init__(self) -> None:
        super().__init__(width=16 + int(os.environ["LOCAL_RANK"]) // 2)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (DeeperBehind, r"`hidden.4.weight` is a (16, 16) torch.float32 tensor on rank 2 and missing on rank 0"),
        (WiderBehind, r"`inp.weight` is a (17, 8) torch.float32 tensor on rank 2 and a (16, 8) torch.float32 tensor"),
    ],
)
def test_models_that_differ(pool: WorkerPool, module: Any, text: str) -> None:
    for failure in pool.try_run(fit, 3, module, models.vectors, {"num_stages": 3}, 3):
        assert failure.message.startswith("All processes must make the same model, but " + text)
        assert "independent of the rank" in failure.message


class CachesAMask(models.MLP):
    """A layer keeps a mask that it makes in its forward, as long as it has been needed so far."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)
            self.register_buffer("mask", None)

        def forward(self, x: Tensor) -> Tensor:
            if self.mask is None or len(self.mask) < len(x):
                self.mask = torch.ones(len(x), 1)
            return self.linear(x) * self.mask[: len(x)]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden = nn.ModuleList(CachesAMask.Layer() for _ in range(4))
        self.register_buffer("repeated", torch.randn(8, 1).expand(8, 4))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


def evaluate_and_fit(strategy: dict[str, Any], devices: int) -> list[float]:
    """With batches of many sizes, in an order that no fit determines."""
    torch.manual_seed(7)
    module, losses = CachesAMask(), []
    for what, size in (
        ("validate", 5),
        ("fit", 3),
        ("test", 11),
        ("validate", 7),
        ("fit", 4),
        ("predict", 13),
        ("fit", 2),
    ):
        trainer = Trainer(accelerator="cpu", devices=devices, strategy=DelayedMPStrategy(**strategy), max_epochs=1,
                          logger=False, enable_checkpointing=False, enable_progress_bar=False,
                          enable_model_summary=False, limit_val_batches=3)  # fmt: skip
        loader = models.vectors(30, size)
        if what == "fit":
            trainer.fit(module, loader, models.vectors(30, size + 4))
        else:
            getattr(trainer, what)(module, loader)
        losses += [float(value) for value in trainer.callback_metrics.values()]
    return losses


@pytest.mark.parametrize("num_stages", [2, 3])
def test_buffers_that_are_made_where_they_are_needed(pool: WorkerPool, num_stages: int) -> None:
    expected = pool.run(evaluate_and_fit, 1, {"num_stages": num_stages, "virtual": True}, 1)[0]
    for losses in pool.run(evaluate_and_fit, num_stages, {"num_stages": num_stages}, num_stages):
        assert losses == pytest.approx(expected, rel=1e-5)
    assert len(expected) >= 5
