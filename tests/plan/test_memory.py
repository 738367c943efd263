"""What stages hold is known before they are there, and cuts keep to a limit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dgmp.optim import RotatedAdamW
from lightning_dgmp.plan.cut import Cuts, PlanError, choose_cuts, stage_cost
from lightning_dgmp.plan.memory import Budget, Memory, Parts, memory_of
from lightning_dgmp.plan.plan import make_plan
from lightning_dgmp.plan.record import Trace
from lightning_dgmp.plan.state import state_bytes
from lightning_dgmp.plan.trace import trace_step
from lightning_dgmp.schedule import delays_of
from tests import models

CPU = torch.device("cpu")
IMAGES = torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
TOKENS = torch.randint(0, 20, (4, 17))


class Checkpointed(models.LanguageModel):
    def loss(self, batch: Tensor) -> Tensor:
        x = self.gpt.tok_emb(batch)
        for block in self.gpt.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return self.gpt.head(x).mean()


def trace_of(module: models.Base, batch: Any) -> Trace:
    return trace_step(lambda _: module.loss(batch), module, CPU)


@pytest.mark.parametrize(
    ("module", "batch"),
    [
        (models.MLP(), (torch.randn(4, 8), torch.zeros(4, dtype=torch.long))),
        (models.LanguageModel(), TOKENS),
        (Checkpointed(), TOKENS),
        (models.ResidualNet(), IMAGES),
        (models.UNet(), IMAGES),
        (models.HuggingFace("llama"), TOKENS),
    ],
)
@pytest.mark.parametrize("is_mixed", [False, True])
def test_what_a_graph_keeps_is_what_autograd_saves(module: models.Base, batch: Any, is_mixed: bool) -> None:
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
        cuts = Cuts(trace_of(module, batch))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = module.loss(batch)
    real = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    expected = Parts(cuts, Budget()).sizes(0, len(cuts.units)).graph
    assert loss.requires_grad
    assert expected == pytest.approx(real, rel=0.1 if isinstance(module, Checkpointed) else 0.01)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
        torch.optim.Adam,
        lambda p: torch.optim.AdamW(p, amsgrad=True, foreach=True),
        torch.optim.Adafactor,
        lambda p: torch.optim.Muon(p[:1]),
        RotatedAdamW,
    ],
)
def test_the_state_of_an_optimizer_is_known_before_it_exists(make: Callable[..., torch.optim.Optimizer]) -> None:
    parameters = [nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6))]
    optimizer = make(parameters)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    expected = state_bytes(optimizer)
    assert not optimizer.state
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p in expected:
        real = [v.nbytes for v in optimizer.state[p].values() if isinstance(v, Tensor) and v.dim()]
        assert expected[p] == sum(real)


def test_an_optimizer_of_the_user_counts_as_adam() -> None:
    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise AssertionError

    Own.__module__ = "project"
    parameter = nn.Parameter(torch.randn(6, 8))
    assert state_bytes(Own([parameter])) == {parameter: 2 * parameter.nbytes}


def test_snapshots_and_graphs_by_delay() -> None:
    module = models.LanguageModel(layers=4, optimizer="adamw")
    state = {name: 2 * p.nbytes for name, p in module.named_parameters()}
    plan = make_plan(trace_of(module, TOKENS), module, 4, slack=1, budget=Budget(state=state))
    for mode in ("stash", "recompute", "replay"):
        for stage, one, delay in zip(plan.stages, memory_of(plan, mode), [6, 4, 2, 0]):
            sizes = stage.sizes
            assert one.parameters == sizes.trained == sizes.state / 2
            assert one.snapshots == (0 if mode == "replay" or delay == 0 else (delay + 1) * sizes.trained)
            if mode == "stash" or delay == 0:
                assert one.activations == (delay + 1) * sizes.graph
            else:
                assert 0 < one.activations - sizes.graph < delay * sizes.graph / 2
    sent, received = (
        [sum(t.nbytes for t in plan.transfers if getattr(t, end) == k) for k in range(4)]
        for end in ("source", "target")
    )
    assert [stage.sizes.sent for stage in plan.stages] == sent
    assert [stage.sizes.received for stage in plan.stages[1:-1]] == received[1:-1]


def test_other_ways_to_hold_more() -> None:
    """Buckets of replicas, temporaries for all parameters at once, frozen parameters, shared ones."""
    module = models.MLP(depth=2, width=64)
    module.hidden[0].requires_grad_(False)
    batch = torch.randn(2, 8), torch.zeros(2, dtype=torch.long)
    cuts = Cuts(trace_of(module, batch))
    plain = Parts(cuts, Budget()).sizes(0, len(cuts.units))
    more = Parts(cuts, Budget(num_gradients=2, at_once=True)).sizes(0, len(cuts.units))
    assert plain.parameters - plain.trained == 4 * (64 * 64 + 64)
    assert plain.gradients == plain.trained == more.gradients / 2 == more.temporaries
    assert plain.temporaries == 2 * 4 * 64 * 64


# ----- a limit


class Wide(models.MLP):
    """Wide layers come early, where a stage has the longer delay."""

    def __init__(self, widths: tuple[int, ...] = (8, 128, 64, 16, 16, 16, 64, 64, 4), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inp, self.out = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))


CASES = [
    (Wide(), (torch.randn(64, 8), torch.zeros(64, dtype=torch.long))),
    (models.LanguageModel(layers=3), TOKENS),
    (models.UNet(), IMAGES),
]


@pytest.mark.parametrize(("module", "batch"), CASES)
@pytest.mark.parametrize(("num_stages", "slack", "backward"), [(2, 0, "stash"), (3, 1, "stash"), (3, 0, "recompute")])
def test_cuts_under_a_limit_are_the_optimum_of_brute_force(
    module: models.Base, batch: Any, num_stages: int, slack: int, backward: str
) -> None:
    trace, delays = trace_of(module, batch), delays_of(num_stages, slack)
    cuts = Cuts(trace)
    parts = Parts(cuts, Budget(backward=backward))

    def stages(positions: tuple[int, ...]) -> list[tuple[int, int]]:
        return list(pairwise([0, *positions, len(cuts.units)]))

    def slowest(positions: tuple[int, ...]) -> float:
        return max(stage_cost(cuts, a, b) for a, b in stages(positions))

    def need(positions: tuple[int, ...]) -> int:
        return max(parts.memory(a, b, delay).total for (a, b), delay in zip(stages(positions), delays))

    everything = list(combinations(cuts.possible, num_stages - 1))
    needs = sorted({need(positions) for positions in everything})
    free = make_plan(trace, module, num_stages, slack=slack)
    assert free.bounds[1:-1] == choose_cuts(cuts, num_stages)
    assert isinstance(module, Wide) or need(tuple(free.bounds[1:-1])) > needs[0]  # or the limit changes nothing
    for limit in (needs[0], needs[len(needs) // 4], needs[-1]):
        best = min(slowest(positions) for positions in everything if need(positions) <= limit)
        budget = Budget(limit, backward)
        plan = make_plan(trace, module, num_stages, slack=slack, budget=budget)
        found = tuple(plan.bounds[1:-1])
        assert need(found) <= limit
        assert slowest(found) == pytest.approx(best, rel=1e-12)
        assert [one.total for one in memory_of(plan, backward)] == [
            parts.memory(a, b, delay).total for (a, b), delay in zip(stages(found), delays)
        ]
    with pytest.raises(PlanError, match="No stage may need more than") as error:
        make_plan(trace, module, num_stages, slack=slack, budget=Budget(needs[0] - 1, backward))
    assert f"with the cuts that need least stages need up to {needs[0] / 1e6:.1f} MB" in str(error.value)


def refusal(limit: int, split_at: list[str] | None = None, **kwargs: Any) -> str:
    module = models.LanguageModel(layers=6, width=64)
    batch = torch.randint(0, 20, (64, 33))
    slack = kwargs.pop("slack", 0)
    with pytest.raises(PlanError, match="`memory_limit` or the memory of a device") as error:
        make_plan(trace_of(module, batch), module, 3, split_at, slack, budget=Budget(limit, **kwargs))
    return str(error.value)


def test_a_refusal_says_what_would_do() -> None:
    text = refusal(32_000_000)
    for cure in ("`num_stages=6` (", "`backward='recompute'` (", "half of the batch (", "`precision='bf16-true'` ("):
        assert cure in text.partition("What would do: ")[2]
    assert text.splitlines()[1].split() == ["stage", *Memory._fields, "total"]
    assert len(text.splitlines()) == 5


def test_a_refusal_says_no_more_than_what_helps() -> None:
    assert "What would help, but is not enough alone: " in refusal(1_000_000)
    text = refusal(1_000_000, backward="recompute", is_single=False)
    assert "recompute" not in text
    assert "bf16" not in text
    assert "slack" not in text
    assert "`slack=0` (" in refusal(36_000_000, slack=2)


def test_cuts_of_the_user_are_checked_too() -> None:
    text = refusal(36_000_000, ["gpt.blocks.1", "gpt.blocks.2"])
    assert "with the cuts of `split_at` stages need up to" in text
    assert "other cuts, without `split_at` (" in text
