"""Ghosts look like tensors, and say so when somebody wants their values."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributions
from torch.nn import functional as F

from lightning_dgmp.ghost import Ghost, GhostRead
from lightning_dgmp.nests import leaves, map_leaves
from lightning_dgmp.operations import GhostMode

CPU = torch.device("cpu")


@pytest.fixture
def ghost() -> Ghost:
    return GhostMode().like(torch.empty(2, 3), "the test", True, CPU)


def test_operations_yield_ghosts_with_the_right_looks(ghost: Ghost) -> None:
    for operation in (
        lambda x: x + torch.ones(3),
        lambda x: torch.ones(4, 2) @ x,
        lambda x: F.layer_norm(x, (3,)),
        lambda x: x.T.reshape(-1).to(torch.bfloat16),
        lambda x: torch.cat([x, torch.zeros(5, 3)]),
        lambda x: x[:, 0] > 0,
        lambda x: F.cross_entropy(x, torch.tensor([0, 2])),
    ):
        real = operation(torch.zeros(2, 3, requires_grad=True))
        fake = operation(ghost)
        assert isinstance(fake, Ghost)
        assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)
        assert fake.requires_grad == real.requires_grad


def test_tensors_that_become_like_a_ghost_stay_real(ghost: Ghost) -> None:
    halves = GhostMode().like(torch.empty(2, dtype=torch.float16), "the test", True, CPU)
    for become in (torch.Tensor.type_as, torch.Tensor.to):
        like = become(torch.arange(3), halves)
        assert type(like) is Tensor
        assert torch.equal(like, torch.arange(3).half())


def test_autocast_decides_the_dtype(ghost: Ghost) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(ghost, torch.zeros(5, 3)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu().detach().numpy(),
        lambda x: f"{x.sum():.3f}",
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.detach().clone().apply_(lambda value: value * 2),
        lambda x: torch.zeros(2, 3).map_(x, lambda a, b: a + b),
        lambda x: torch.zeros(2, 3).map2_(x, x, lambda a, b, c: a + b + c),
        lambda x: 1.0 in x,
        lambda x: torch.equal(x, x),
        lambda x: x.sum().backward(),
        lambda x: copy.deepcopy(x),
        lambda x: pickle.dumps(x),
    ],
)
def test_reading_a_value_is_an_error(ghost: Ghost, read: Callable[[Tensor], Any]) -> None:
    with pytest.raises(GhostRead, match=r"reads the value of a .* tensor made by the test"):
        read(ghost)


@pytest.mark.parametrize(
    "use",
    [
        lambda x: distributions.Normal(x, x.exp()).log_prob(torch.zeros(2, 3)),
        lambda x: distributions.Independent(distributions.Normal(0 * torch.ones(2, 3), 1.0), 1).log_prob(x),
        lambda x: distributions.kl_divergence(distributions.Normal(x, x), distributions.Normal(0.0, 1.0)),
        lambda x: distributions.Categorical(probs=x).entropy(),
        lambda x: distributions.Bernoulli(logits=x).log_prob(torch.ones(2, 3)),
        lambda x: distributions.Geometric(probs=x).log_prob(torch.ones(2, 3)),
        lambda x: distributions.ContinuousBernoulli(probs=x).log_prob(torch.ones(2, 3)),
        lambda x: distributions.MultivariateNormal(x[0], covariance_matrix=x.T @ x).log_prob(torch.zeros(3)),
        lambda x: F.gaussian_nll_loss(x.exp(), torch.zeros(2, 3), x),
        lambda x: F.gaussian_nll_loss(torch.zeros(2, 3), torch.zeros(2, 3), var=x, full=True),
    ],
)
def test_checks_of_torch_need_no_values(ghost: Ghost, use: Callable[[Tensor], Tensor]) -> None:
    assert isinstance(use(ghost), Ghost)
    ghost.bind(lambda: torch.tensor([[torch.nan] * 3, [-1.0] * 3]))
    with pytest.raises((ValueError, RuntimeError), match=r"invalid values|negative"):
        use(ghost)


def test_the_lines_of_torch_that_check() -> None:
    asks = re.compile(r"(?:if|elif) .*(?:\.all\(|\.any\(|all_true\().*:$")
    lines = {
        place: [line.strip() for line in inspect.getsource(code).splitlines() if asks.search(line)]
        for place, code in {
            "distribution.__init__": distributions.Distribution.__init__,
            "distribution._validate_sample": distributions.Distribution._validate_sample,
            "geometric.__init__": distributions.Geometric.__init__,
            "continuous_bernoulli.__init__": distributions.ContinuousBernoulli.__init__,
            "symmetric.check": type(distributions.constraints.symmetric).check,
            "positive_definite.check": type(distributions.constraints.positive_definite).check,
            "gaussian_nll_loss": F.gaussian_nll_loss,
        }.items()
    }
    assert lines == {
        "distribution.__init__": ["if not torch._is_all_true(valid):"],
        "distribution._validate_sample": ["if not torch._is_all_true(valid):"],
        "geometric.__init__": ["if not valid.all():"],
        "continuous_bernoulli.__init__": ['if not self.arg_constraints["probs"].check(self.probs).all():'],
        "symmetric.check": ["if not square_check.all():"],
        "positive_definite.check": ["if not sym_check.all():"],
        "gaussian_nll_loss": ["elif torch.any(var < 0):"],
    }


def test_printing_a_ghost_is_harmless(ghost: Ghost) -> None:
    assert repr(ghost) == "<ghost: a (2, 3) torch.float32 tensor made by the test>"


def test_never_a_silent_zero(ghost: Ghost) -> None:
    result = torch.zeros(2, 3)
    with pytest.raises(GhostRead, match=r"`__setitem__` reads .* to write it into .* `torch.cat`"):
        result[0] = ghost[0]
    with pytest.raises(GhostRead, match="`add_` reads"):
        result.add_(ghost)


def test_a_bound_ghost_computes_with_the_value(ghost: Ghost) -> None:
    calls = []
    ghost.bind(lambda: calls.append(1) or torch.ones(2, 3, requires_grad=True))  # type: ignore[func-returns-value]
    assert ghost.shape == (2, 3)
    assert not calls
    total = (ghost * torch.full((3,), 2.0)).sum() + ghost.sum()
    assert type(total) is Tensor
    assert total.item() == 18
    assert calls == [1]


def test_in_place_operations_keep_the_object(ghost: Ghost) -> None:
    before = ghost + 0
    after = before
    after += 1
    assert after is before


def test_results_are_remembered_by_all_that_decides_them(ghost: Ghost) -> None:
    for _ in range(2):
        assert ghost[:, None].shape == (2, 1, 3)
        assert ghost[None, :].shape == (1, 2, 3)
        assert ghost[None].shape == (1, 2, 3)
        assert ghost.sum(0).shape == (3,)
        assert ghost.sum(1).shape == (2,)
        assert (ghost + 1).dtype == torch.float32
        assert (ghost + torch.zeros(3, dtype=torch.float64)).dtype == torch.float64
        assert ghost.T.reshape(-1).stride() == (1,)
    one, two = ghost * 2, ghost * 2
    one.bind(lambda: torch.ones(2, 3))
    assert not two.bound


def test_ghosts_that_look_alike_are_not_mistaken_for_each_other(ghost: Ghost) -> None:
    for _ in range(2):
        one, two = ghost * 2, ghost * 2
        assert [id(t) for t in torch.atleast_1d(one, two)] == [id(one), id(two)]
        assert one.add_(two) is one
        one.unsqueeze_(0)
        assert one.shape == (1, 2, 3)
        assert (one + 1).shape == (1, 2, 3)
        assert (two + 1).shape == (2, 3)
    assert (ghost * 2).shape == (2, 3)


def test_detached_ghosts_need_no_gradient(ghost: Ghost) -> None:
    assert (ghost * 2).requires_grad
    assert not (ghost.detach() * 2).requires_grad
    with torch.no_grad():
        assert not (ghost * 2).requires_grad


def test_nests() -> None:
    from transformers.modeling_outputs import BaseModelOutput

    one, two = torch.zeros(1), torch.ones(2)
    nest = {"a": [one, (two, None)], "b": BaseModelOutput(last_hidden_state=one), "c": slice(0, 5)}
    assert [leaf for leaf in leaves(nest) if isinstance(leaf, Tensor)] == [one, two, one]
    doubled = map_leaves(lambda leaf: leaf * 2 if isinstance(leaf, Tensor) else leaf, nest)
    assert doubled["a"][1][0].tolist() == [2, 2]
    assert isinstance(doubled["b"], BaseModelOutput)
    assert nest["b"].last_hidden_state is one  # type: ignore[union-attr]
