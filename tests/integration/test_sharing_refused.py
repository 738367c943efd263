"""Ways to share weights that cannot be followed, or cut, and the sentence that says so."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from tests import models
from tests.pool import Failure, WorkerPool
from tests.training import fit


class TiedByStorage(models.LanguageModel):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gpt.head.weight.data = self.gpt.tok_emb.weight.data


class TransposeByStorage(models.MLP):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden[3].weight.data = self.hidden[0].weight.data.t()


class Recurrent(models.Base):
    """Some kernels want the weights of a layer in one storage: they lie side by side, and may."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inp, self.out = nn.Linear(8, 16), nn.Linear(16, 4)
        flat = nn.Parameter(self.inp.weight.new_zeros(16 * 16 + 16))
        self.middle = nn.Linear(16, 16)
        self.middle.weight.data = flat.data[: 16 * 16].view(16, 16).copy_(self.middle.weight.data)
        self.middle.bias.data = flat.data[16 * 16 :].copy_(self.middle.bias.data)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.out(self.middle(self.inp(x)).tanh()), y)


@pytest.mark.parametrize(
    ("module", "loader", "text"),
    [
        (TiedByStorage, models.ragged_tokens, "`gpt.tok_emb.weight` and `gpt.head.weight`"),
        (TransposeByStorage, models.vectors, "`hidden.0.weight` and `hidden.3.weight`"),
    ],
)
def test_weights_tied_by_storage(pool: WorkerPool, module: Any, loader: Any, text: str) -> None:
    for result in pool.try_run(fit, 2, module, loader, {"num_stages": 2}, 2):
        assert isinstance(result, Failure)
        assert f"{text} are two that lie in one storage" in result.message
        assert "`head.weight = embedding.weight`" in result.message


def test_weights_side_by_side(pool: WorkerPool) -> None:
    pool.run(fit, 2, Recurrent, models.vectors, {"num_stages": 2}, 2)


class SharedSideBySide(models.MLP):
    def __init__(self, every: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for i in range(4) if every else (2,):
            self.hidden[i].weight = self.hidden[1].weight


@pytest.mark.parametrize(("every", "earlier"), [(False, "hidden.1"), (True, "hidden.0")])
def test_a_cut_between_modules_that_share_a_weight(pool: WorkerPool, every: bool, earlier: str) -> None:
    strategy = {"num_stages": 2, "split_at": ["hidden.2"]}
    for result in pool.try_run(fit, 2, SharedSideBySide, models.vectors, strategy, 2, module_args={"every": every}):
        assert isinstance(result, Failure)
        assert "`split_at` names `hidden.2`, but the step cannot be cut there: it uses " in result.message
        assert f"together with `{earlier}`, which comes right before it" in result.message
