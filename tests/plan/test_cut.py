"""The chosen cuts are the best ones."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dgmp.plan.cut import Cuts, PlanError, choose_cuts, stage_cost
from lightning_dgmp.plan.plan import make_plan
from lightning_dgmp.plan.trace import trace_step
from tests import models

CPU = torch.device("cpu")


class Uneven(nn.Sequential):
    """Blocks of very unequal width."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def transformer() -> tuple[nn.Module, tuple[Any, ...]]:
    return models.GPT(12, 16, 50), (torch.zeros(2, 16, dtype=torch.long),)


def uneven() -> tuple[nn.Module, tuple[Any, ...]]:
    return Uneven([8, 512, 4, 4, 1024, 16, 16, 16, 700, 2]), (torch.randn(4, 8),)


def one_giant() -> tuple[nn.Module, tuple[Any, ...]]:
    return Uneven([8, 8, 8, 8, 2000, 2000, 8, 8]), (torch.randn(4, 8),)


def cuts_of(module: nn.Module, args: tuple[Any, ...]) -> Cuts:
    return Cuts(trace_step(lambda _: module(*args), module, CPU))


@pytest.mark.parametrize("make", [transformer, uneven, one_giant])
@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_the_slowest_stage_is_the_optimum_of_brute_force(make: Callable[..., Any], num_stages: int) -> None:
    cuts = cuts_of(*make())

    def slowest(positions: tuple[int, ...]) -> float:
        bounds = [0, *positions, len(cuts.units)]
        return max(stage_cost(cuts, a, b) for a, b in pairwise(bounds))

    best = min(slowest(positions) for positions in combinations(cuts.possible, num_stages - 1))
    assert slowest(tuple(choose_cuts(cuts, num_stages))) == pytest.approx(best, rel=1e-12)


def test_a_transformer_is_cut_between_its_parts_and_evenly() -> None:
    module, args = transformer()
    plan = make_plan(trace_step(lambda _: module(*args), module, CPU), module, 4)
    costs = [stage.cost for stage in plan.stages]
    assert max(costs) < 1.15 * sum(costs) / 4


def test_places_between_the_blocks_of_a_decoder_need_one_tensor() -> None:
    module, args = transformer()
    cuts = cuts_of(module, args)
    first = {unit.parameters[0]: c for c, unit in enumerate(cuts.units)}
    between = [first[f"blocks.{i}.ln_1.weight"] for i in range(1, 12)]
    assert set(between) <= set(cuts.possible)
    assert {cuts.nbytes[c] for c in between} == {2 * 16 * 16 * 4}


def test_no_cut_through_a_value_that_nobody_can_name() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.a + 1) * self.b

    cuts = cuts_of(Opaque(), (torch.randn(4),))
    assert cuts.possible == []
    with pytest.raises(PlanError, match="a result of `mul` in `the step` would cross it"):
        choose_cuts(cuts, 2)


def test_stage_of_and_table() -> None:
    module = models.MLP(depth=2)
    trace = trace_step(lambda _: module(torch.randn(4, 8)), module, CPU)
    plan = make_plan(trace, module, 2, split_at=["hidden.1"])
    assert plan.num_stages == 2
    assert [plan.stage_of(name) for name in ("inp.weight", "hidden.0.bias", "hidden.1.bias", "out.bias")] == [
        (0,), (0,), (1,), (1,),
    ]  # fmt: skip
    with pytest.raises(KeyError):
        plan.stage_of("nowhere")
    table = plan.table().splitlines()
    assert table[0].split() == ["stage", "first", "module", "last", "module", "compute", "parameters", "sends"]
    assert table[2].split()[:3] == ["0", "inp", "hidden.0"]
    assert table[2].split()[-3:] == ["416", "256", "B"]
    assert table[3].split()[:3] == ["1", "hidden.1", "out"]


def test_the_plan_is_the_same_every_time_and_differs_with_the_cut() -> None:
    def digest(split_at: list[str]) -> str:
        module = models.MLP(depth=2)
        return make_plan(trace_step(lambda _: module(torch.randn(4, 8)), module, CPU), module, 2, split_at).digest()

    assert digest(["hidden.1"]) == digest(["hidden.1"]) != digest(["hidden.0"])


def test_a_u_nets_skips_go_straight_to_where_they_are_needed() -> None:
    module = models.UNet()
    batch = (torch.randn(2, 1, 8, 8), None)
    plan = make_plan(trace_step(lambda _: module.loss(batch), module, CPU), module, 4, ["down_3", "up_2", "up_1"])
    assert plan.edges() == [(0, 1), (0, 2), (0, 3), (1, 2), (2, 3)]


def test_no_cut_through_a_view_of_what_is_changed_in_place() -> None:
    class Changing(nn.Module):
        def __init__(self, change: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.act = nn.ReLU(inplace=change)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            view = h[:, :2]
            h = self.act(h)
            return self.b(h)[:, :2] + view

    assert cuts_of(Changing(False), (torch.randn(4, 4),)).possible != []
    assert cuts_of(Changing(True), (torch.randn(4, 4),)).possible == []


class Normed(nn.Module):
    def __init__(self, tracks: bool) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False, track_running_stats=tracks)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class CalledTwice(nn.Module):
    def __init__(self, tracks: bool) -> None:
        super().__init__()
        self.layer, self.other, self.last = Normed(tracks), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.other(self.layer(x))))


def test_a_layer_that_is_called_again_may_be_on_two_stages_unless_it_keeps_statistics() -> None:
    args = (torch.randn(4, 8),)
    free, bound = cuts_of(CalledTwice(False), args), cuts_of(CalledTwice(True), args)
    assert [unit.parameters for unit in free.units] == [
        ("layer.linear.weight", "layer.linear.bias"),
        ("other.weight", "other.bias"),
        ("layer.linear.weight", "layer.linear.bias"),
        ("last.weight", "last.bias"),
    ]
    assert free.possible == [1, 2, 3]
    assert bound.possible == [3]
    assert "calls of `layer.norm`, which changes its buffers" in bound.obstacles[1]
    assert free.units_of["layer.linear.weight"] == [0, 2]
    assert free.nbytes[1] - bound.nbytes[3] == 2 * (8 * 8 + 8) * 4


def test_too_many_uses_of_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_dgmp.plan.cut._MAX_USES", 3)

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(10):
                x = self.two(self.one(x))
            return x

    cuts = cuts_of(Loop(), (torch.randn(4, 8),))
    assert len(cuts.units) == 8
    assert "`one.weight` is used again and again, more than 3 times" in " ".join(cuts.obstacles.values())


class Keeps(nn.Module):
    """Of each part an attribute with what it has made inside, as attention blocks do, and hooks that make a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(KeepsInside() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x.mean()


class KeepsInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.utils.weight_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        self.attention = self.linear(x).softmax(-1)
        return self.attention * x


def test_a_read_behind_the_network_changes_no_plan() -> None:
    module, x = Keeps(), torch.ones(2, 8)
    ends: list[Callable[[Tensor], Any]] = [lambda loss: loss, Tensor.item, lambda loss: loss.detach().numpy()]
    plans = [make_plan(trace_step(lambda _, end=end: end(module(x)), module, CPU), module, 3) for end in ends]
    assert plans[0].table() == plans[1].table() == plans[2].table()


class Experts(nn.Module):
    """Chooses by values who computes what, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 4), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        chosen, out = self.gate(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = torch.where(chosen == i)
            out = out.index_put(rows, expert(x[rows]), accumulate=True)
        return out


class DenseAndExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        self.more = nn.Sequential(*(Experts() for _ in range(4)))
        self.teacher = nn.Linear(8, 800).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.more(self.dense(x)).mean()


def test_what_follows_a_read_inside_of_the_network_is_guessed() -> None:
    module = DenseAndExperts()
    trace = trace_step(lambda _: module(torch.ones(2, 8)), module, CPU)
    plan = make_plan(trace, module, 2)
    assert plan.stages[1].first_module == "more.0.gate"
    assert plan.stages[1].cost > 3 * plan.stages[0].cost
    line = plan.table().splitlines()[-1]
    assert line.startswith("of the last stage 1,260 parameters follow a read, so its compute is a guess: `where`"), line
    behind = trace_step(lambda _: float(module.dense(torch.ones(2, 8)).mean()), module, CPU)
    assert "follow a read" not in make_plan(behind, module, 2).table()


class Decodes(nn.Module):
    """Calls the same modules again after it has written into a tensor of its own, or read a value."""

    def __init__(self, num_steps: int = 5, reads: bool = False) -> None:
        super().__init__()
        self.encoder, self.embedding, self.cell = nn.Linear(4, 4), nn.Embedding(4, 4), nn.GRUCell(4, 4)
        self.num_steps, self.reads = num_steps, reads

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = self.encoder(x), torch.zeros(self.num_steps, *x.shape)
        for i in range(self.num_steps):
            h = self.cell(self.embedding(torch.arange(len(x)) % 4), h)
            outputs[i] = h
            if self.reads and h.sum() > 100:
                break
        return outputs.mean()


def test_a_loop_that_writes_into_a_tensor_of_its_own_is_one_stage() -> None:
    plans = {}
    for num_steps in (2, 20):
        module = Decodes(num_steps)
        trace = trace_step(lambda _, module=module: module(torch.randn(8, 4)), module, CPU)  # type: ignore[misc]
        plans[num_steps] = make_plan(trace, module, 2)
        assert plans[num_steps].stage_of("embedding.weight") == plans[num_steps].stage_of("cell.bias_hh") == (1,)
        with pytest.raises(PlanError, match=r"can be cut in 1 places. What comes after a value is read .*test_cut.py:"):
            make_plan(trace, module, 3)
        with pytest.raises(PlanError, match=r"`embedding.weight` is used again after a value was read. What comes"):
            make_plan(trace, module, 2, ["cell"])
    few, many = (plans[num_steps].stages[1].cost for num_steps in (2, 20))
    assert many > 5 * few


def test_a_module_that_is_called_only_after_a_value_is_read_cannot_be_known() -> None:
    class Reads(models.MLP):
        def forward(self, x: Tensor) -> Tensor:
            x = self.hidden[0](self.inp(x))
            assert x.sum().item() < 1000
            return self.out(self.hidden[1](x))

    module = Reads()
    trace = trace_step(lambda _: module(torch.randn(4, 8)), module, CPU)
    with pytest.raises(PlanError, match=r"it does not call `out`. What comes after a value is read .*`item` reads"):
        make_plan(trace, module, 2, ["out"])
