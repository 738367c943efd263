"""Snapshots keep old values and lead gradients to today's parameters, also those of buffers that a graph needs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_dgmp.calls import ParameterSlots
from lightning_dgmp.stage.snapshot import buffers_kept, take_snapshot


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


def test_a_graph_keeps_the_buffers_that_it_needs() -> None:
    module = nn.Module()
    for name in ("scale", "matrix", "mask", "shared"):
        module.register_buffer(name, torch.full((2, 2), 2.0))
    buffers, shared = dict(module.named_buffers()), module.shared[0]
    places = {name: buffer.data_ptr() for name, buffer in buffers.items()}
    x = torch.ones(2, 2, requires_grad=True)
    with buffers_kept([module]):
        module.scale.add_(1)
        y = (x / module.scale) @ module.matrix.t() + module.mask
        z = x * module.shared
    assert all(getattr(module, name) is buffer for name, buffer in buffers.items())
    assert [name for name, buffer in buffers.items() if buffer.data_ptr() != places[name]] == ["scale", "matrix"]
    assert module.scale.tolist() == [[3, 3], [3, 3]]
    module.scale.fill_(100)
    module.matrix.data.fill_(100)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2, 2), 4 / 3))
    module.shared.add_(1)
    assert shared.tolist() == [3, 3]  # who has a view of a buffer sees it change, and torch what the graph needs
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
