"""Parameters of other stages look like parameters, and say whose they are when somebody wants their values."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_dgmp.ghost import GhostError
from lightning_dgmp.stage.shadow import cast_shadow, restore


@pytest.fixture
def layer() -> nn.Linear:
    layer = nn.Linear(7, 5)
    layer(torch.ones(7)).sum().backward()
    cast_shadow(layer.weight, "`weight` of stage 3")
    return layer


def test_a_shadow_has_the_looks_and_one_element(layer: nn.Linear) -> None:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    assert weight.shape == (5, 7)
    assert weight.numel() == 35
    assert (weight.dtype, weight.device, weight.dim(), len(weight)) == (torch.float32, torch.device("cpu"), 2, 5)
    with torch._C.DisableTorchFunctionSubclass():
        assert weight.untyped_storage().nbytes() == 4
    assert weight.grad is None
    assert weight.is_leaf
    assert weight in {weight}
    assert "`weight` of stage 3" in repr(layer.weight)
    assert torch.equal(weight, layer.weight)
    assert not torch.equal(layer.bias, weight)


def test_questions_of_shape_are_answered(layer: nn.Linear) -> None:
    weight = layer.weight
    zeros = torch.zeros_like(weight)
    zeros += 1
    assert float(zeros.sum()) == 35
    assert weight.new_zeros(2).sum() == 0
    assert (weight.T.shape, weight.flatten().shape, weight.view(-1).shape) == ((7, 5), (35,), (35,))
    with pytest.raises(GhostError, match="`weight` of stage 3"):
        weight.T.sum()


def test_a_shadow_can_be_frozen_and_moved(layer: nn.Linear) -> None:
    layer.requires_grad_(False)
    assert not layer.weight.requires_grad
    layer.cpu()
    layer.zero_grad()
    layer.weight.requires_grad_(True)
    assert layer.state_dict()["weight"].shape == (5, 7)


@pytest.mark.parametrize(
    "use",
    [
        lambda layer: layer.weight + 1,
        lambda layer: layer.weight.norm(),
        lambda layer: layer.weight.sum().item(),
        lambda layer: layer.weight.detach().clone(),
        lambda layer: layer.weight.data.mul_(2),
        lambda layer: layer.weight.data.cpu().numpy(),
        lambda layer: torch.ones(5, 7).lerp_(layer.weight, 0.1),
        lambda layer: layer.weight.fill_(0),
        lambda layer: {key: value.clone() for key, value in layer.state_dict().items()},
        lambda layer: torch.save(layer.state_dict(), io.BytesIO()),
        lambda layer: copy.deepcopy(layer),
        lambda layer: torch.optim.swa_utils.AveragedModel(layer),
        lambda layer: torch.nn.utils.parameters_to_vector(layer.parameters()),
        lambda layer: layer(torch.ones(7)),
        lambda layer: print(layer.weight[0]),
    ],
)
def test_the_values_of_a_shadow_are_an_error(layer: nn.Linear, use: Callable[[nn.Linear], Any]) -> None:
    with torch.no_grad(), pytest.raises(GhostError, match=r"of parameters of its own stage alone.*`weight` of stage 3"):
        use(layer)


def test_a_shadow_becomes_what_it_was(layer: nn.Linear) -> None:
    before = layer.weight
    layer.weight.requires_grad_(False)
    restore(layer.weight)
    assert layer.weight is before
    assert type(layer.weight) is nn.Parameter
    assert not vars(layer.weight)
    assert not layer.weight.requires_grad
    assert layer.weight.is_contiguous()
    assert layer.weight.untyped_storage().nbytes() == 4 * 35
    layer(torch.ones(7))
