"""The trace sees what runs, and leaves nothing behind."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from lightning_dgmp.ghost import GhostError
from lightning_dgmp.plan.record import Trace
from lightning_dgmp.plan.trace import trace_step
from tests import models, traps

CPU = torch.device("cpu")


def trace(module: nn.Module, *args: Any) -> Trace:
    return trace_step(lambda _: module(*args), module, CPU)


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("steps", torch.zeros(()))
        self.history: list[Tensor] = []
        self.calls = 0
        self.seen = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps += 1
        self.seen += 1
        x = self.norm(self.linear(x))
        self.history.append(x)
        self.last = x
        torch.rand(3), random.random(), numpy.random.rand()
        return torch.dropout(x, 0.5, True)


def test_who_reads_what_was_kept_elsewhere_is_told() -> None:
    module, kept = nn.Linear(4, 4), list[Tensor]()
    trace_step(lambda _: kept.append(module(torch.ones(4)).sum()), module, CPU)
    assert kept[0].shape == ()
    for read in (float, lambda value: value + 1):
        with pytest.raises(GhostError, match=r"has left .* made by .* where that is not undone"):
            read(kept[0])


def test_nothing_stays_behind() -> None:
    module = Stateful()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    attributes = {k: dict(m.__dict__) for k, m in module.named_modules()}
    history = module.history
    states = (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state())
    trace(module, torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    for k, m in module.named_modules():
        assert m.__dict__.keys() == attributes[k].keys()
        assert all(m.__dict__[name] is value for name, value in attributes[k].items())
    assert module.history is history
    assert (module.calls, history, module.seen.tolist()) == (0, [], [0, 0, 0])
    assert all(isinstance(p, nn.Parameter) and p.grad is None for p in module.parameters())
    assert random.getstate() == states[0]
    assert numpy.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


class Writes(nn.Module):
    def __init__(self, write: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.write = nn.Linear(4, 4), write
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        self.write(self.mean, x.detach().mean(0))
        return x - self.mean


def add_to_data(mean: Tensor, _: Tensor) -> None:
    mean.data += 1


def set_data(mean: Tensor, _: Tensor) -> None:
    mean.data = mean + 1


def copy_ghost(mean: Tensor, new: Tensor) -> None:
    mean.copy_(new)


def copy_ghost_to_data(mean: Tensor, new: Tensor) -> None:
    mean.data.copy_(new)


def set_data_to_ghost(mean: Tensor, new: Tensor) -> None:
    mean.data = new
    assert mean.sum() == 4  # not the memory of a ghost, of which there is none


def copy_ghost_to_view(mean: Tensor, new: Tensor) -> None:
    mean[0].copy_(new[1])


GHOSTLY = [copy_ghost, copy_ghost_to_data, set_data_to_ghost, copy_ghost_to_view]


@pytest.mark.parametrize("write", [add_to_data, set_data, *GHOSTLY])
def test_writes_past_the_version_are_seen_and_undone(write: Callable[[Tensor, Tensor], Any]) -> None:
    module = Writes(write)
    buffer, place = module.mean, module.mean.data_ptr()
    assert trace(module, torch.zeros(2, 4)).calls[0].has_state
    assert module.mean is buffer
    assert (buffer.data_ptr(), buffer.tolist()) == (place, [1] * 4)


def set_data_to_another_shape(mean: Tensor, new: Tensor) -> None:
    mean.data = new[:2]


def test_a_ghost_of_another_shape_cannot_be_the_data_of_a_buffer() -> None:
    with pytest.raises(
        GhostError, match=r"one of \(4,\) and torch.float32 was assigned a \(2,\) .* Assign the attribute"
    ):
        trace(Writes(set_data_to_another_shape), torch.zeros(2, 4))


def test_calls_flops_and_parameters() -> None:
    module = models.MLP(depth=1)
    seen = trace(module, torch.randn(5, 8))
    assert [call.path for call in seen.calls] == ["", "inp", "hidden.0", "out"]
    assert [call.parent for call in seen.calls] == [-1, 0, 0, 0]
    linear = [op for op in seen.ops if op.name == "linear"]
    assert [op.parameters for op in linear] == [(f"{n}.weight", f"{n}.bias") for n in ("inp", "hidden.0", "out")]
    assert [op.flops for op in linear] == [2 * 5 * 8 * 16, 2 * 5 * 16 * 16, 2 * 5 * 16 * 4]
    assert seen.stopped is None


def test_a_parameter_read_by_a_container_belongs_to_the_containers_call() -> None:
    module = models.GPT(2, 16, 20)
    seen = trace(module, torch.zeros(2, 5, dtype=torch.long))
    op = next(op for op in seen.ops if "pos_emb" in op.parameters)
    assert seen.calls[op.call].path == ""


def test_what_depends_on_the_batch_alone_is_real() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            mask = (x > 0).float()
            assert mask.sum().item() >= 0
            return self.linear(x) * mask

    assert [op.name for op in trace(Masked(), torch.randn(2, 4)).ops] == ["linear", "mul"]


def test_the_trace_stops_where_a_value_is_read() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            if x.sum() > 0:
                x = self.two(x)
            return x

    seen = trace(Reads(), torch.randn(2, 4))
    assert seen.stopped is not None
    assert "`__bool__` reads the value of a () torch.bool tensor made by one" in seen.stopped
    assert "test_trace.py" in seen.stopped
    assert [call.path for call in seen.calls] == ["", "one"]


def test_metrics_are_not_updated() -> None:
    from torchmetrics import Metric
    from torchmetrics.classification import MulticlassAccuracy

    class Measured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.accuracy = nn.Linear(4, 3), MulticlassAccuracy(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            self.accuracy(x, torch.zeros(len(x), dtype=torch.long))
            return x

    module = Measured()
    seen = trace_step(lambda _: module(torch.randn(2, 4)), module, CPU, readers=(Metric,))
    assert "MulticlassAccuracy" in (seen.stopped or "")
    assert module.accuracy.update_count == 0


def test_custom_functions_are_themselves_again() -> None:
    before = torch.autograd.Function.__dict__["apply"]
    made = []
    layer = traps.CustomFunction.Layer()
    layer.register_forward_hook(lambda _, __, out: made.append(out))
    trace(layer, torch.randn(2, 8))
    assert torch.autograd.Function.__dict__["apply"] is before
    assert "data" not in torch.Tensor.__dict__
    assert made[0].requires_grad


def test_recurrent_networks() -> None:
    module = nn.LSTM(4, 8, num_layers=2)
    seen = trace(module, torch.randn(3, 2, 4))
    assert {name for op in seen.ops for name in op.parameters} == {name for name, _ in module.named_parameters()}
    assert all(isinstance(weight, nn.Parameter) for weight in module._flat_weights)


def test_costs_and_memory_do_not_depend_on_what_was_traced_before() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            rows = x[0]
            rows += 1.0
            return (x.view(-1) * 2).sum()

    first, second = (trace(Views(), torch.randn(2, 4)) for _ in range(2))
    assert [(op.name, op.flops, op.nbytes) for op in first.ops] == [(op.name, op.flops, op.nbytes) for op in second.ops]
    assert first.ops[0].flops == 2 * 2 * 4 * 4
    for seen in (first, second):
        out, rows, changed, flat = [value.storage for value in seen.values[:4]]
        assert out == rows == changed == flat
        assert seen.values[4].storage != out
        assert list(seen.changes) == [out]


@torch.library.custom_op("dgmp_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    raise RuntimeError("Expected inputs of another type.")


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Applies(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.linear, self.inner = nn.Linear(4, 4), Function(function)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.linear(x))


def test_an_operation_without_a_rule_for_shapes(caplog: pytest.LogCaptureFixture) -> None:
    text = r"`.*twice.*` in `inner` cannot run on the shape alone of a \(2, 4\) .* made by linear"
    with pytest.raises(GhostError, match=text) as error:
        trace(Applies(twice), torch.randn(2, 4))
    assert "Expected inputs of another type." in str(error.value)
    assert not caplog.records


def test_errors_of_the_user_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="same reduction dim") as error:
        trace(Applies(lambda x: x @ torch.randn(3, 5)), torch.randn(2, 4))
    assert not isinstance(error.value, GhostError)


def test_writing_into_a_fresh_tensor() -> None:
    index = torch.tensor([1, 0])
    seen = trace(Applies(lambda x: torch.zeros(x.shape).index_add_(0, index, x).exp()), torch.randn(2, 4))
    assert seen.read is not None
    assert re.search(r"`index_add_` reads .* made by linear to write it.*`x.new_zeros.*test_trace.py", seen.read)
    assert seen.stopped is None
    assert [op.name for op in seen.ops if op.time >= seen.read_at] == ["index_add_", "exp"]
    assert trace(Applies(lambda x: x.new_zeros(x.shape).index_add_(0, index, x)), torch.randn(2, 4)).read is None


@pytest.mark.parametrize(
    "read", [Tensor.tolist, lambda x: float(x[1, 0]), lambda x: x.view(-1).numpy(), lambda x: copy.deepcopy(x)]
)
def test_a_fresh_tensor_has_no_values_once_it_has_been_written_into(read: Callable[[Tensor], Any]) -> None:
    def write(x: Tensor) -> Tensor:
        fresh = torch.zeros(3, 4)
        row = fresh[1]
        assert read(fresh) is not None
        fresh[0] = x[0]
        row *= 2
        read(fresh)
        raise AssertionError("A value that is not there has been read.")

    stopped = trace(Applies(write), torch.randn(2, 4)).stopped
    assert stopped is not None
    assert "reads the value of a" in stopped
    assert "to write it" not in stopped
