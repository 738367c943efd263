"""Steps that differ from the first batch, on which the plan was made: all processes end with what is missing where."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import models
from tests.pool import Failure, WorkerPool
from tests.training import fit


class Changes(models.MLP):
    """From the sixth batch on it runs otherwise. The cut is before the third of the hidden layers."""

    @property
    def is_changed(self) -> bool:
        return self.trainer.fit_loop.batch_idx >= 5


class Reverses(Changes):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        for layer in reversed(self.hidden) if self.is_changed else self.hidden:
            x = torch.tanh(layer(x))
        return self.out(x)


class SwapsBranches(Changes):
    """What is sent last comes first, and then the first stage has done all that it planned."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        first, second = torch.tanh(self.hidden[0](x)), torch.tanh(self.hidden[1](x))
        if self.is_changed:
            second, first = self.hidden[3](second), self.hidden[2](first)
        else:
            first, second = self.hidden[2](first), self.hidden[3](second)
        return self.out(first + second)


class EndsEarly(Changes):
    def loss(self, batch: Any) -> Tensor:
        return self.inp(batch[0]).square().mean() if self.is_changed else super().loss(batch)


_IS_NARROW = [False]


class Layer(nn.Linear):
    """The shape of what it returns follows from a global variable; it takes any."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x.mean(1, keepdim=True).expand(-1, 16))
        return x[:, :8] if _IS_NARROW[0] else x


class Shrinks(Changes):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden = nn.ModuleList(Layer(16, 16) for _ in range(4))
        self.out = Layer(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        _IS_NARROW[0] = self.is_changed
        return super().forward(x)


SAYS = "The step ran differently from the first batch, on which the plan was made"


@pytest.mark.parametrize(
    ("module", "texts"),
    [
        (
            Reverses,
            [
                rf"Stage 0 should send leaf 0 of `hidden\.2` to stage 1, but it is <ghost.*{SAYS}",
                rf"`hidden\.3` on stage 1 used a \(8, 16\) .* made by `inp` of stage 0, which is not here.*{SAYS}",
            ],
        ),
        (SwapsBranches, [rf"Stage 0 did not make the value of `hidden\.2` that stage 1 needs.*{SAYS}"]),
        (
            EndsEarly,
            [
                rf"`training_step` returned a value that depends on .* did not travel to the last stage.*{SAYS}"
                ".* let the one with most calls come first .*choose other cuts with `split_at`"
            ],
        ),
        (Shrinks, [r"A \(8, 16\) torch.float32 tensor made by `hidden\.1` of stage 0 arrived with the shape \(8, 8\)"]),
    ],
)
def test_what_is_missing(pool: WorkerPool, module: type[Changes], texts: list[str]) -> None:
    """Each stage says what it has noticed itself, or else what another has."""
    strategy = {"split_at": ["hidden.2"]}
    failures = pool.try_run(fit, 2, module, models.vectors, strategy, 2)
    assert all(isinstance(failure, Failure) for failure in failures), failures
    for text in texts:
        assert any(re.search(text, failure.message) for failure in failures), failures
