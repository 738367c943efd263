"""Modules that change what they are passed, or whose outputs have shapes that more than their tensors decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from tests.habits import Block, ThreeBlocks

__all__ = ["HABITS_WITH_ARGUMENTS"]


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


HABITS_WITH_ARGUMENTS: list[Callable[..., Any]] = [CountsInObjects, ChangesADataclass, KeepsActivationsInAnObject]
