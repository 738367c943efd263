"""Constructors of all habits, without memory for what they make."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_dgmp.deferred import Recording
from lightning_dgmp.stage.shadow import Shadow, cast_shadow
from tests.deferred_models import TiedGPT


class Habits(nn.Module):
    """What constructors do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.temperature = nn.Parameter(torch.ones([]) * 2.65), nn.Parameter(torch.tensor(0.07))
        self.listed = [nn.Parameter(torch.randn(3)), (torch.ones(2),)]
        self.first = self.listed[0]
        self.first.is_special = True
        self.rates = [x.item() for x in torch.linspace(0, 0.1, 4)] + torch.arange(3).tolist()
        self.identity = nn.Linear(3, 3)
        self.identity.weight.data = torch.from_numpy(numpy.eye(3)).float()
        self.written = nn.Linear(3, 2)
        with torch.no_grad():
            self.written.weight.copy_(torch.tensor([[1.0, 2.0, 3.0]] * 2))
            self.written.bias[:] = 5
            torch._foreach_mul_(list(self.written.parameters()), 2.0)
        file = io.BytesIO()
        torch.save({"weight": torch.tensor([[4.0, 5.0]])}, file)
        file.seek(0)
        self.loaded = nn.Linear(2, 1, bias=False)
        self.loaded.load_state_dict(torch.load(file))
        self.copied = copy.deepcopy(self.written)
        self.tied = nn.Linear(3, 2)
        self.tied.weight = self.written.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
        self.spectral = nn.utils.spectral_norm(nn.Linear(4, 3))
        self.orthogonal = nn.Linear(4, 4)
        nn.init.orthogonal_(self.orthogonal.weight)
        self.lazy = nn.LazyLinear(4)
        self.lazy(torch.zeros(2, 7))
        self.lstm = nn.LSTM(4, 5, 2)
        self.drawn = nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(3)))
        self.register_buffer("wave", torch.arange(10).float().sin())
        self.array = torch.ones(3).numpy()
        if (torch.arange(4) > 2).any():
            self.sum = float(torch.ones(3).sum())


def build(make: Any, is_deferred: bool) -> tuple[Recording, nn.Module]:
    torch.manual_seed(0)
    recording = Recording(7)
    with recording.active():
        module = make()
    recording.settle(partial(cast_shadow, whose="a parameter") if is_deferred else None)
    return recording, module


@pytest.mark.parametrize("make", [Habits, partial(TiedGPT, 3)])
def test_values_come_from_the_constructor(make: Any) -> None:
    torch.manual_seed(0)
    expected = make()
    recording, module = build(make, False)
    assert module.state_dict().keys() == expected.state_dict().keys()
    assert not recording.without_values()
    assert recording.sharing_memory() is None
    for (name, ours), theirs in zip(module.named_parameters(), expected.parameters(), strict=True):
        assert type(ours) is nn.Parameter
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
        if theirs.numel() > 100:
            assert abs(ours.std() / theirs.std() - 1) < 0.3, name
        elif theirs.numel() == 1 or theirs.std() == 0:
            assert torch.equal(ours, theirs), name
    for name, buffer in expected.named_buffers():
        if "weight_" not in name:
            assert torch.equal(module.get_buffer(name), buffer)


def test_what_is_not_random_is_as_ever() -> None:
    expected, (_, module) = Habits(), build(Habits, False)
    for name in ("identity.weight", "written.weight", "written.bias", "loaded.weight", "copied.weight"):
        assert torch.equal(module.get_parameter(name), expected.get_parameter(name))
    ours: Any = module
    assert (ours.rates, ours.sum, ours.array.tolist()) == (expected.rates, 3.0, [1.0, 1.0, 1.0])
    assert ours.listed[0] is ours.first
    assert ours.first.is_special
    assert vars(ours.first) == {"is_special": True}
    assert type(ours.listed[1][0]) is Tensor
    assert ours.tied.weight is ours.written.weight
    assert torch.allclose(ours.orthogonal.weight @ ours.orthogonal.weight.T, torch.eye(4), atol=1e-5)
    ours.lstm(torch.zeros(1, 1, 4))


def test_values_do_not_depend_on_which_are_made() -> None:
    _, whole = build(Habits, False)
    recording, parts = build(Habits, True)
    names = [name for name, parameter in parts.named_parameters() if isinstance(parameter, Shadow)]
    assert len(names) > 25
    for name in reversed(names):
        (value,) = recording.make([parts.get_parameter(name)])
        assert torch.equal(value, whole.get_parameter(name)), name
    assert not any(isinstance(v, FakeTensor) for m in parts.modules() for v in vars(m).values())


def test_random_numbers_of_others_stay_as_they_are() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    recording = Recording(7)
    with recording.active():
        module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    recording.settle()
    assert torch.equal(torch.get_rng_state(), before)
    one, two = module
    assert not torch.equal(one.weight, two.weight)
