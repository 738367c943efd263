"""Snapshots keep old values and lead gradients to today's parameters; shadows keep nothing."""

from __future__ import annotations

import torch
from torch import nn

from lightning_dgmp.calls import ParameterSlots
from lightning_dgmp.stage.snapshot import take_snapshot


def test_a_snapshot_survives_an_update_and_passes_gradients_on() -> None:
    linear = nn.Linear(3, 2)
    slots = ParameterSlots(linear)
    x = torch.randn(4, 3)
    snapshot = take_snapshot(slots.parameters)
    with slots.holding(snapshot):
        loss = linear(x).square().sum()
    expected = torch.autograd.grad(linear(x).square().sum(), list(linear.parameters()))
    fired = []
    linear.weight.register_hook(lambda grad: fired.append(1))
    with torch.no_grad():
        for p in linear.parameters():
            p.mul_(100)
    loss.backward()
    assert fired == [1]
    for p, grad in zip(linear.parameters(), expected):
        torch.testing.assert_close(p.grad, grad)


def test_frozen_parameters_are_not_copied() -> None:
    linear = nn.Linear(3, 2)
    linear.weight.requires_grad_(False)
    snapshot = take_snapshot(dict(linear.named_parameters()))
    assert snapshot["weight"].data_ptr() == linear.weight.data_ptr()
    assert not snapshot["weight"].requires_grad
    assert snapshot["bias"].data_ptr() != linear.bias.data_ptr()
