"""Modules that keep, change and hook things on their way, in two stages or three."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models import Base

__all__ = ["HABITS", "SPLITS", "CheckpointedDropout"]

SPLITS = {2: ["second"], 3: ["second", "third"]}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class ThreeBlocks(Base):
    """``first`` is what a habit is about; ``SPLITS`` cut behind it."""

    kind: type[nn.Module] = Block
    kind_of_others: type[nn.Module] = Block

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.first, self.second, self.third = self.kind(), self.kind_of_others(), self.kind_of_others()
        self.out = nn.Linear(8, 4)

    def features(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.out(self.features(batch[0])), batch[1])


class RealMask(ThreeBlocks):
    """What a module returns has as many rows as a mask of the batch says."""

    class kind(Block):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x)[mask]

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        mask = x[:, 0] > 0
        mask[0] = True
        h = self.first(x, mask)
        num_rows = h.shape[0]
        return F.cross_entropy(self.out(self.third(self.second(h))), y[mask], reduction="sum") / num_rows


class Kind(Enum):
    SUM = 1
    ROWS = 2


class ByEnum(ThreeBlocks):
    class kind(Block):
        def forward(self, x: Tensor, what: Kind) -> Tensor:
            h = super().forward(x)
            return h.sum(0) if what is Kind.SUM else h

    def features(self, x: Tensor) -> Tensor:
        total, rows = self.first(x, Kind.SUM), self.first(x, Kind.ROWS)
        assert total.dim() == 1
        return self.third(self.second(rows + 0.1 * total))


class KeepsMask(ThreeBlocks):
    """An attribute of an early module, computed from the batch, is read behind the network."""

    class kind(Block):
        def __init__(self) -> None:
            super().__init__()
            self.mask = torch.ones(1, 8)

        def forward(self, x: Tensor) -> Tensor:
            self.mask = (x > 0).float()
            return super().forward(x)

    def features(self, x: Tensor) -> Tensor:
        return super().features(x) * self.first.mask


class CountsInABuffer(ThreeBlocks):
    class kind(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) / self.calls.sqrt()

    def features(self, x: Tensor) -> Tensor:
        return super().features(x) * (1 + self.first.calls / 10)


class Shared:
    def __init__(self) -> None:
        self.sizes: list[float] = []


class FillsAList(ThreeBlocks):
    """Blocks leave numbers in an object that they share."""

    class kind(Block):
        shared: Shared

        def forward(self, x: Tensor) -> Tensor:
            self.shared.sizes.append(float(x.shape[0]))
            return super().forward(x)

    kind_of_others = kind

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shared = self.first.shared = self.second.shared = self.third.shared = Shared()

    def features(self, x: Tensor) -> Tensor:
        self.shared.sizes.clear()
        return super().features(x) * sum(self.shared.sizes)


class ChangesADict(ThreeBlocks):
    class kind(Block):
        def forward(self, batch: dict[str, Tensor]) -> None:  # type: ignore[override]
            batch["x"] = super().forward(batch["x"])

    kind_of_others = kind

    def features(self, x: Tensor) -> Tensor:
        batch = {"x": x}
        self.first(batch)
        self.second(batch)
        self.third(batch)
        return batch["x"]


class ReturnsADict(ThreeBlocks):
    class kind(Block):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
            batch["h"] = super().forward(batch.get("h", batch["x"]))
            return batch

    kind_of_others = kind

    def features(self, x: Tensor) -> Tensor:
        batch = {"x": x}
        assert self.third(self.second(self.first(batch))) is batch
        return batch["h"]


class AppendsSizes(ThreeBlocks):
    class kind(Block):
        def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
            sizes.append(x.shape[0])
            return super().forward(x)

    def features(self, x: Tensor) -> Tensor:
        sizes: list[int] = []
        h = self.third(self.second(self.first(x, sizes)))
        return h * sum(sizes)


class ScalesTheBatch(ThreeBlocks):
    """An early module changes a tensor of the batch in place, and later code reads it."""

    class kind(Block):
        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x * 1.0)
            x.mul_(2)
            return h

    def features(self, x: Tensor) -> Tensor:
        return super().features(x) + 0.1 * x


class AddsInPlace(ThreeBlocks):
    """A residual in place is the first thing behind a cut."""

    class kind(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    class kind_of_others(Block):
        def forward(self, x: Tensor) -> Tensor:
            x += super().forward(x.clone())
            return x

    def features(self, x: Tensor) -> Tensor:
        h = self.first(x.view(-1, 1, 8).expand(-1, 2, -1)).transpose(0, 1)
        return self.third(self.second(h)).mean(0)


class ReturnsTwice(ThreeBlocks):
    """The same tensor stands in two places of an output, and the second is used."""

    class kind(Block):
        def forward(self, x: Tensor) -> Any:
            h = super().forward(x)
            return {"last": h, "all": [x, h]}

    def features(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)["all"][-1]))


class HooksActivations(ThreeBlocks):
    """Scales gradients on their way back, at once and later in the step."""

    def features(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h.register_hook(lambda grad: -0.5 * grad)
        z = self.second(h)
        h.register_hook(lambda grad: 3 * grad)
        return self.third(z)


class CountsAtTheEnd(ThreeBlocks):
    """Anneals by a number that the end of the step changes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.count = 0

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        loss = super().loss((x / (1 + self.count / 5), y))
        self.count += 1
        return loss


class CarriesStates(ThreeBlocks):
    """Truncated back-propagation through time: each layer goes on with its state of the batch before."""

    class kind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(8, 8, batch_first=True)

        def forward(self, x: Tensor, state: Tensor | None) -> Any:
            return self.rnn(x, state)

    kind_of_others = kind

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.states: Any = None

    def features(self, x: Tensor) -> Tensor:
        h, new = x[:, None].expand(-1, 3, -1), []
        old = self.states if self.states is not None and self.states[0].shape[1] == len(x) else [None] * 3
        for layer, state in zip((self.first, self.second, self.third), old):
            h, state = layer(h, state)
            new.append(state)
        self.states = [state.detach() for state in new]
        return h.mean(1)


class CutsStatesOff(CarriesStates):
    """At the start of the next step."""

    def features(self, x: Tensor) -> Tensor:
        if self.states is None or self.pair[1].shape[1] != len(x):
            self.pair, self.states = x.new_zeros(2, 1, len(x), 8), {"second": [x.new_zeros(1, len(x), 8)]}
        self.pair = self.first(x[:, None].expand(-1, 3, -1), tuple(kept.detach() for kept in self.pair)[1])
        h, self.states["second"][0] = self.second(self.pair[0], self.states["second"][0].detach())
        return self.third(h, None)[0].mean(1)


class UnfreezesWhileInFlight(ThreeBlocks):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.first.requires_grad_(False)
        self.second.requires_grad_(False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx in (5, 15):
            self.requires_grad_(True)
        elif batch_idx == 10:
            self.first.requires_grad_(False)


class DetachesAtFirst(ThreeBlocks):
    def features(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.third(self.second(h.detach() if self.trainer.fit_loop.batch_idx < 5 else h))


class LoopsOverCells(ThreeBlocks):
    """Later batches make fewer calls than the first, and a value is read at the end."""

    def features(self, x: Tensor) -> Tensor:
        for _ in range(3 if self.trainer.fit_loop.batch_idx == 0 else 2):
            x = self.first(x)
        return self.third(self.second(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("item", loss.item())
        return loss


class CountsValues(ThreeBlocks):
    """What a module returns beside its tensor depends on values of the batch."""

    class kind(Block):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), int((x > 0).sum())

    def features(self, x: Tensor) -> Tensor:
        h, count = self.first(x)
        return self.third(self.second(h)) / (1 + count)


class Trims(ThreeBlocks):
    """The number of columns depends on values of the batch, and only the number is used behind the network."""

    class kind(Block):
        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x)
            return h[:, None].expand(-1, 2 + int(x[:, 0].max() > 1.2), -1)

    def features(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.third(self.second(h.mean(1))) / h.size(1)


class Anneals(ThreeBlocks):
    """A hook sets a temperature of an early module, which returns it."""

    class kind(Block):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = 1.0

        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.temperature

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.first.temperature = 1 / (1 + batch_idx)

    def features(self, x: Tensor) -> Tensor:
        h, temperature = self.first(x)
        return self.third(self.second(h)) * temperature


class CarriesInADict(ThreeBlocks):
    """Values of a stage are kept at the end of the step, in a container or in a module, for its next one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cache: dict[str, Any] = {"mean": torch.zeros(8)}
        self.first.state = torch.zeros(8)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        h = self.first(x) + 0.5 * self.cache["mean"] + 0.5 * self.first.state
        loss = F.cross_entropy(self.out(self.third(self.second(h))), y)
        self.cache["mean"] = h.detach().mean(0).tanh()
        self.first.state = -h.detach().mean(0).square().tanh()
        return loss


HABITS: list[Callable[..., Any]] = [
    RealMask, ByEnum, KeepsMask, CountsInABuffer, FillsAList, ChangesADict, ReturnsADict, AppendsSizes, ScalesTheBatch,
    AddsInPlace, ReturnsTwice, HooksActivations, CountsAtTheEnd, CarriesStates, UnfreezesWhileInFlight, DetachesAtFirst,
    LoopsOverCells, CountsValues, Trims, Anneals, CarriesInADict, CutsStatesOff,
]  # fmt: skip


class CheckpointedDropout(ThreeBlocks):
    """The second run of a checkpointed block must draw what the first drew."""

    class kind(Block):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.4)

    kind_of_others = kind

    def __init__(self, checkpointed: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.checkpointed = checkpointed

    def features(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second, self.third):
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x
