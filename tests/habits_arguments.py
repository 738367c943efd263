"""Modules that change what they are passed, or whose outputs have shapes that more than their tensors decides,
or that write into tensors of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.habits import Block, ThreeBlocks
from tests.models import Graph

__all__ = ["HABITS_WITH_ARGUMENTS", "ReadsAGlobal", "ReadsInALoop"]


class Counter:
    """Also callable, as graphs of PyTorch Geometric are."""

    def __init__(self) -> None:
        self.depth, self.sizes = 0, [1.0]

    def __call__(self) -> float:
        return sum(self.sizes)


@dataclass
class State:
    h: Tensor
    depth: int = 0
    history: list[Tensor] = field(default_factory=list)


@dataclass(slots=True)
class Slots:
    depth: int = 0


class CountsInObjects(ThreeBlocks):
    """Blocks count in objects, also in one that refers to itself, and the loss reads them."""

    class kind(Block):
        def forward(self, x: Tensor, objects: list[Any]) -> Tensor:
            for item in objects:
                item.depth += 1
            objects[0].sizes.append(x.shape[0] / 8)
            return super().forward(x) / objects[-1].depth

    kind_of_others = kind

    def features(self, x: Tensor) -> Tensor:
        objects: list[Any] = [Counter(), SimpleNamespace(depth=0), State(x), Slots()]
        objects[1].itself = objects[1]
        for block in (self.first, self.second, self.third):
            x = block(x, objects)
        assert len({item.depth for item in objects}) == 1
        return x * objects[0]() * objects[0].depth


class ChangesADataclass(ThreeBlocks):
    class kind(Block):
        def forward(self, state: State) -> None:  # type: ignore[override]
            state.h = state.h + super().forward(state.h)
            state.depth += 1
            state.history.append(state.h)

    kind_of_others = kind

    def features(self, x: Tensor) -> Tensor:
        state = State(x)
        for block in (self.first, self.second, self.third):
            block(state)
        return state.h / state.depth


class KeepsActivationsInAnObject(ThreeBlocks):
    class kind(Block):
        def forward(self, x: Tensor, cache: Any) -> Tensor:
            y = super().forward(x)
            cache.all.append(y)
            return y

    kind_of_others = kind

    def features(self, x: Tensor) -> Tensor:
        cache = SimpleNamespace(all=[])
        y = self.third(self.second(self.first(x, cache), cache), cache)
        assert cache.all[-1] is y
        return y + sum(cache.all)


class ChangesAGraph(ThreeBlocks):
    """As GraphGym: blocks take the batch, an object, and return it with other activations, one of them in place."""

    class kind(Block):
        def forward(self, graph: Any) -> Any:  # type: ignore[override]
            graph.x, graph.depth = 1 * super().forward(graph.x), graph.depth + 1
            return graph

    class kind_of_others(Block):
        def forward(self, graph: Any) -> Any:  # type: ignore[override]
            graph.x += super().forward(graph.x.clone())
            graph.depth += 1
            return graph

    def loss(self, batch: Any) -> Tensor:
        graph = Graph(x=batch[0], y=batch[1], depth=0)
        graph.itself = graph
        graph = self.features(graph)
        return F.cross_entropy(self.out(graph.x) / graph.depth, graph.y)


class CountsRows(ThreeBlocks):
    """The number of rows of what the first block returns is not that of an argument, and only this number is used."""

    def rows(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        rows = self.rows(x)
        mean = rows.mean(0, keepdim=True).expand(len(x), -1)
        return self.third(self.second(mean)) * rows.shape[0]


class TakesAGraph(CountsRows):
    """... but that of a tensor in an object."""

    class kind(Block):
        def forward(self, graph: Any) -> Tensor:
            return super().forward(graph.nodes[0]["x"])

    def rows(self, x: Tensor) -> Tensor:
        rows: Tensor = self.first(SimpleNamespace(nodes=[{"x": x[: 1 + int((x[:, 0] > 0).sum())]}]))
        return rows


class SelectsRows(CountsRows):
    """... but follows from values in ways that are no reads."""

    class kind(Block):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            places = mask.nonzero().squeeze(1), torch.where(mask)[0], torch.arange(mask.sum())
            return super().forward(torch.cat([x[index] for index in (*places, mask)]))

    def rows(self, x: Tensor) -> Tensor:
        mask = x[:, 0] > 0
        mask[0] = True
        rows: Tensor = self.first(x, mask)
        return rows


class Resizes(CountsRows):
    """... but is that of a tuple, and of a module of torch, which a hook sets, and of a list of numpy's numbers."""

    class kind(Block):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.AdaptiveAvgPool2d((2, 8))
            self.size: Any = None

        def forward(self, x: Tensor, more: list[Any]) -> Tensor:
            x = self.pool(super().forward(x)[None])[0]
            return x.repeat(*self.size) if self.size else torch.cat([x, x.new_zeros(*more)])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.first.pool.output_size = (2 + batch_idx % 2, 8)
        self.first.size = [None, (2, 1), [3, 1]][batch_idx % 3]

    def rows(self, x: Tensor) -> Tensor:
        rows: Tensor = self.first(x, [numpy.int64(1 + self.trainer.fit_loop.batch_idx % 4), 8])
        return rows


class ReadsAGlobal(CountsRows):
    """... but that of something that cannot be known."""

    num_rows = 1

    class kind(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[: ReadsAGlobal.num_rows])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        ReadsAGlobal.num_rows = 1 + batch_idx // 3

    def rows(self, x: Tensor) -> Tensor:
        rows: Tensor = self.first(x)
        return rows


class SumsLosses(ThreeBlocks):
    """In a tensor of the step's own, into which it writes."""

    def loss(self, batch: Any) -> Tensor:
        total, predictions = torch.tensor(0.0), torch.zeros(len(batch[1]), 4)
        logits = self.out(self.features(batch[0]))
        total += F.cross_entropy(logits, batch[1])
        predictions[:] = logits.detach()
        self.log("spread", predictions.std())
        return total


class WritesInALoop(ThreeBlocks):
    """A decoder with teacher forcing writes what it says into a tensor of the step's own.

    A value of the first stage is used only after that.
    """

    class Decoder(Block):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4, 8)

        def forward(self, said: Tensor, h: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(self.embedding(said) + h)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.third = self.Decoder()

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        memory, said, outputs = self.first(x), y, torch.zeros(4, len(x), 4)
        h = self.second(memory)
        for i in range(4):
            h = self.third(said, h + memory / 10 if i else h)
            outputs[i] = self.out(h)
            said = y if i % 2 and self.training else outputs[i].argmax(1)
        return F.cross_entropy(outputs[1:].flatten(0, 1), y.repeat(3))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class SumsLikelihoods(ThreeBlocks):
    """Of distributions along a loop, in a tensor of the step's own."""

    def loss(self, batch: Any) -> Tensor:
        h, loss = self.second(self.first(batch[0])), torch.zeros(1)
        for truth in batch[0].chunk(4, dim=1):
            h = self.third(h)
            mean, scale = self.out(h).chunk(2, dim=1)
            loss += -torch.distributions.Normal(mean, F.softplus(scale) + 0.1).log_prob(truth).mean()
        return loss / 4


class ReadsInALoop(ThreeBlocks):
    def features(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = self.third(self.second(x))
            if x.sum().item() > 1000:
                break
        return x


HABITS_WITH_ARGUMENTS: list[Callable[..., Any]] = [
    CountsInObjects, ChangesADataclass, KeepsActivationsInAnObject, ChangesAGraph, TakesAGraph, SelectsRows, Resizes,
    SumsLosses, WritesInALoop, SumsLikelihoods,
]  # fmt: skip
