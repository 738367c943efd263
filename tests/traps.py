"""Modules that do what a pipeline finds hard."""

from __future__ import annotations

from typing import Any

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
    """Blocks that normalise by a running mean, updated in the forward, and renew one buffer by assignment."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("last", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            self.last = 0.5 * self.last + x.detach().mean(0)
            return torch.tanh(x - self.mean - 0.1 * self.last)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.blocks = nn.ModuleList(self.Layer() for _ in range(6))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        for block in self.blocks:
            x = block(x)
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
