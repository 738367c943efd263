"""Modules that do what a pipeline finds hard."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models import MLP, Base


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.tanh(x) * 2

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> Tensor:
        return error * 0.5


class CustomFunction(Base):
    """Every block ends in a custom autograd function, whose forward runs without a graph."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return _Scale.apply(self.linear(x))

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.blocks = nn.ModuleList(self.Layer() for _ in range(5))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(x, y)


class LooksFirst(MLP):
    """Touches the values at the cut without a graph before it uses them with one."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        for layer in self.hidden:
            x = layer(x)
            with torch.no_grad():
                self.size = x.abs().mean() + layer.weight.mean()
            x = torch.tanh(x)
        return self.out(x)


class ReentrantCheckpoint(MLP):
    """Activation checkpointing whose function runs without a graph first."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        for i, layer in enumerate(self.hidden):  # what is inside of such a function cannot be at a cut
            x = layer(x) if i % 2 else torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)
            x = torch.tanh(x)
        return self.out(x)


class Checkpointed(MLP):
    """Activation checkpointing of a function of several layers, after which further layers come."""

    def forward(self, x: Tensor) -> Tensor:
        def first_half(x: Tensor) -> Tensor:
            x = torch.tanh(self.inp(x))
            for layer in self.hidden[:2]:
                x = torch.tanh(layer(x))
            return x

        x = torch.utils.checkpoint.checkpoint(first_half, x, use_reentrant=False)
        for layer in self.hidden[2:]:
            x = torch.tanh(layer(x))
        return self.out(x)


class Penalised(MLP):
    """Terms of the loss that are made of early results by operations outside of any module."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        h = self.inp(x)
        penalty = h.square().mean() * 0.1
        for layer in self.hidden:
            h = layer(torch.tanh(h))
            penalty = penalty + 0.1 * h.abs().mean()
        return F.cross_entropy(self.out(h), y) + penalty


class KeepsAnEarlyValue(MLP):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("early", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        self.early = x.detach().mean()
        for layer in self.hidden:
            x = layer(torch.tanh(x))
        return self.out(x)


class ChangesThings(MLP):
    """The step takes its batch apart and changes it, and a module changes its argument."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.act = nn.ReLU(inplace=True)

    def loss(self, batch: Any) -> Tensor:
        batch = list(batch)
        y = batch.pop()
        batch[0].mul_(2)
        h = self.inp(batch[0])
        h = self.act(h)
        for layer in self.hidden:
            h = self.act(layer(h))
        return F.cross_entropy(self.out(h), y)


class Unfreezes(MLP):
    """All but the last layer is frozen on the first batches."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inp.requires_grad_(False)
        self.hidden.requires_grad_(False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            self.requires_grad_(True)


class MovingAverage(Base):
    """Blocks that normalise by running statistics, updated in the forward, and renew one buffer by assignment.

    A hook changes a temperature, another buffer that gradients depend on.
    """

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("size", torch.ones(8))
            self.register_buffer("last", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            self.size.data.mul_(0.9).add_(x.detach().abs().mean(0), alpha=0.1)
            self.last = 0.5 * self.last + x.detach().mean(0)
            return torch.tanh((x - self.mean - 0.1 * self.last) / self.size)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.blocks = nn.ModuleList(self.Layer() for _ in range(6))
        self.register_buffer("temperature", torch.ones(()))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.temperature.fill_(1 + batch_idx / 10)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        for block in self.blocks:
            x = block(x) / self.temperature
        return F.cross_entropy(x, y)


class BackwardHooks(MLP):
    """Blocks that must not be cut, because a hook wants the gradients at both of their ends."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for layer in self.hidden:
            layer.register_full_backward_hook(lambda *args: _scaled(args[1]))
            layer.register_full_backward_pre_hook(lambda *args: _scaled(args[1]))
            layer.register_forward_hook(lambda *args: args[2] * 1.1)


def _scaled(gradients: Any) -> Any:
    return tuple(None if g is None else 0.9 * g for g in gradients)


class _Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).transpose(1, 2)


class Layouts(MLP):
    """What crosses a cut is not contiguous, and is viewed as its layout allows."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.turn = nn.ModuleList(_Turned() for _ in self.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        for turn, layer in zip(self.turn, self.hidden):
            x = layer(turn(x.view(-1, 4, 4)).transpose(1, 2).view(-1, 16))
        return self.out(x)


class Skips(MLP):
    """Early values of the same shape as later ones, and operations that return their own argument."""

    def forward(self, x: Tensor) -> Tensor:
        first = x = torch.tanh(self.inp(x))
        values = [x]
        for layer in self.hidden:  # without anything between, so that what one returns is what the next one takes
            x = layer(x)
            values.append(x)
        mixed = x + first.to(x) + 0.1 * values[2].type_as(x) + 0.1 * torch.broadcast_tensors(values[3], x)[0]
        noise = torch.distributions.Normal(values[1], values[1].exp(), validate_args=False)
        return self.out(mixed + 0.01 * noise.mean.to(x))


class Features(MLP):
    """Hooks keep what modules return, and the loss uses it; a part of the rows is selected by a mask."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.features: dict[str, Tensor] = {}
        self.hidden[0].register_forward_hook(lambda *args: self.features.__setitem__("a", args[2]))
        self.hidden[3].register_forward_hook(lambda *args: self.features.__setitem__("b", args[2]))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        keep = x[:, 0] > -1
        x = torch.tanh(self.inp(x))[keep]
        for layer in self.hidden:
            x = torch.tanh(layer(x))
        difference = F.mse_loss(self.features["a"], self.features["b"])
        return F.cross_entropy(self.out(x), y[keep]) + 0.1 * difference


class Meter:
    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0


class KeepsState(MLP):
    """Reads and changes all kinds of state; some of it is changed back before the step ends."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norm = nn.BatchNorm1d(16)
        self.count, self.with_gain = 0, False
        self.average = torch.zeros(8)
        self.generator, self.rng = torch.Generator().manual_seed(3), numpy.random.default_rng(3)
        self.losses: dict[str, list[Tensor]] = {"train": []}
        self.meter, self.recent, self.array = Meter(), deque(maxlen=5), numpy.zeros(2)  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.inp(x)))
        for layer in self.hidden:
            x = torch.tanh(layer(x)) * (2.0 if self.with_gain else 1.0)
        return self.out(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        self.count += 1
        self.average = 0.9 * self.average + 0.1 * x.mean(0)
        noise = torch.randn(x.shape, generator=self.generator) + float(self.rng.normal())
        self.with_gain = True
        logits = self((x - self.average) * (1 + 1 / self.count) + 0.01 * noise)
        self.with_gain = False
        loss = F.cross_entropy(logits, y) * (1 + self.global_step / 100 + self.current_epoch)
        self.losses["train"].append(loss.detach())
        self.meter.sum += loss.item()
        self.meter.count += 1
        self.recent.append(loss.item())
        self.array += loss.item()
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("train", torch.stack(self.losses["train"]).mean())
        self.log("meter", self.meter.sum / self.meter.count)
        self.log("recent", sum(self.recent) / len(self.recent))
        self.log("array", float(self.array.sum()))
        self.losses["train"].clear()


class KeepsGradients(MLP):
    """Zeroes gradients in every second step alone."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if batch_idx % 2 == 0:
            optimizer.zero_grad()


class ChangesWeights(MLP):
    def loss(self, batch: Any) -> Tensor:
        with torch.no_grad():
            self.hidden[0].weight.clamp_(-0.1, 0.1)
        return super().loss(batch)


class HidesWeights(MLP):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weights = [layer.weight for layer in self.hidden]

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + 0.01 * sum(w.square().sum() for w in self.weights)


class ChangesFrozen(MLP):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.teacher = nn.Linear(8, 4).requires_grad_(False)

    def loss(self, batch: Any) -> Tensor:
        with torch.no_grad():
            self.teacher.weight.mul_(0.99)
        return super().loss(batch) + F.mse_loss(self(batch[0]), self.teacher(batch[0]))
