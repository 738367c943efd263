"""Stand-ins for tensors of a batch: read late, and as if they had been read at once."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor

from lightning_dgmp.ghost import Ghost
from lightning_dgmp.nests import split
from lightning_dgmp.withheld import Lender, StandIns

VALUE = torch.arange(24.0).reshape(2, 3, 4)


class Asked:
    def __init__(self, value: Tensor = VALUE) -> None:
        self.value, self.requests = value, list[tuple[int, int, bool]]()
        self.stand_ins = StandIns(self)

    def __call__(self, number: int, leaf: int, always: bool) -> Tensor:
        self.requests.append((number, leaf, always))
        return self.value.clone()

    def tensor(self, number: int = 0) -> Tensor:
        return self.stand_ins.fill(number, split([self.value])[0], [None])[0]


def test_looks_are_known_and_views_wait() -> None:
    asked = Asked()
    x = asked.tensor()
    y = x.to("cpu").view(2, -1)[:, 1:].double()
    assert (x.shape, x.dtype, y.shape, y.dtype, len(y)) == ((2, 3, 4), torch.float32, (2, 11), torch.float64, 2)
    assert not asked.requests
    assert torch.equal(y + 0, VALUE.view(2, -1)[:, 1:].double())
    assert torch.equal(x * 2, 2 * VALUE)
    assert asked.requests == [(0, 0, True)]


def test_changes_in_place_come_after_what_was_asked_before() -> None:
    asked = Asked()
    x = asked.tensor()
    before, view = x.double(), x.flatten()
    x.mul_(3)
    x[0] = 0
    expected = VALUE * 3
    expected[0] = 0
    assert torch.equal(before + 0, VALUE.double())
    assert torch.equal(view + 0, expected.flatten())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), torch.Tensor.numpy])
def test_copies_are_real(copied: object) -> None:
    value = copied(Asked().tensor())  # type: ignore[operator]
    assert not isinstance(value, Ghost)
    assert torch.equal(torch.as_tensor(value), VALUE)


def test_gradients_with_respect_to_a_leaf() -> None:
    x = Asked().tensor()
    x.requires_grad_()
    assert x.requires_grad
    (x**2).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * VALUE)


def test_layouts_arrive() -> None:
    asked = Asked(VALUE.transpose(0, 2))
    x = asked.tensor()
    assert x.stride() == (1, 4, 12)
    assert torch.equal(x + 0, asked.value)


def test_what_is_held_is_fetched_before_it_is_too_late() -> None:
    asked = Asked()
    held, _, read = asked.tensor(0), asked.tensor(1), asked.tensor(2)
    assert read.sum() == VALUE.sum()
    del _
    gc.collect()
    asked.stand_ins.settle(5)
    assert asked.requests == [(2, 0, True), (0, 0, False)]
    assert torch.equal(held + 0, VALUE)


def test_the_lender_keeps_what_may_be_asked_for() -> None:
    lender, large, small = Lender([1, 2]), torch.zeros(4096), torch.zeros(2)
    shares = lender.share(0, 7, [large, small])
    assert [[t is None for t in shares[stage]] for stage in (1, 2)] == [[True, False]] * 2
    assert lender.lend(2, 0, 0, always=True) is large
    shares = lender.share(1, 7, [large, small])
    assert [[t is None for t in shares[stage]] for stage in (1, 2)] == [[True, False], [False, False]]
    assert all(t is None for t in [lender.share(2, 8, [large])[2][0]])  # of another loader
    lender.release(1, 1)
    assert lender.lend(2, 0, 0, always=False) is large
    lender.release(2, 1)
    with pytest.raises(KeyError):
        lender.lend(2, 0, 0, always=False)
    lender.release(1, 2)  # stage 2 has got all of this batch
    with pytest.raises(KeyError):
        lender.lend(1, 1, 0, always=False)
