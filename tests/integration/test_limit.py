"""A limit of memory holds for every stage, or all processes say why not before they begin."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

from lightning_dgmp import DelayedMPStrategy
from lightning_dgmp.plan.memory import Budget, memory_of
from lightning_dgmp.plan.plan import make_plan
from lightning_dgmp.plan.trace import trace_step
from lightning_dgmp.rebalancing import Measurement, better_plan
from tests import models
from tests.pool import Failure, WorkerPool
from tests.training import fit

CPU = torch.device("cpu")
NARROW = {"depth": 4, "width": 256, "optimizer": "adamw"}


def largest_and_cuts(**strategy: Any) -> tuple[int, list[str]]:
    """The largest need of a stage, and where stages begin."""
    made: list[Any] = []

    def keep(*args: Any, **kwargs: Any) -> Any:
        made.append(make_plan(*args, **kwargs))
        return made[-1]

    with patch("lightning_dgmp.starting.make_plan", keep):
        fit(models.MLP, models.vectors, {"num_stages": 3, **strategy}, 3, module_args=NARROW, max_epochs=1)
    needs = [one.total for one in memory_of(made[0], strategy.get("backward", "stash"))]
    return max(needs), [stage.first_module for stage in made[0].stages]


def test_a_limit_moves_cuts_on_all_stages(pool: WorkerPool) -> None:
    free, cuts = pool.run(largest_and_cuts, 3)[0]
    for need, moved in pool.run(largest_with_limit, 3, free - 1):
        assert need < free
        assert moved != cuts


def largest_with_limit(limit: int) -> tuple[int, list[str]]:
    return largest_and_cuts(memory_limit=limit)


@pytest.mark.parametrize("cuts", [None, ["hidden.1", "hidden.3"]])
def test_what_does_not_fit_is_refused_in_every_process(pool: WorkerPool, cuts: list[str] | None) -> None:
    results = pool.try_run(fit_with, 3, {"num_stages": 3, "split_at": cuts, "memory_limit": 1_000_000})
    where = "that need least" if cuts is None else "of `split_at`"
    for result in results:
        assert isinstance(result, Failure)
        assert result.type == "PlanError"
        assert result.message.startswith(
            "No stage may need more than 1.0 MB, by `memory_limit` or the memory of a device"
        )
        assert f"but with the cuts {where} stages need up to " in result.message
        assert "`precision='bf16-true'` (" in result.message


def fit_with(strategy: dict[str, Any]) -> None:
    fit(models.MLP, models.vectors, strategy, 3, module_args=NARROW, max_epochs=1)


def test_cuts_that_move_keep_to_the_limit() -> None:
    module = models.LanguageModel(layers=6)
    trace = trace_step(lambda _: module.loss(torch.zeros(4, 17, dtype=torch.long)), module, CPU)
    plan = make_plan(trace, module, 2)
    measured = [Measurement(1.0, {}), Measurement(9.0, {})]
    free = better_plan(trace, module, plan, measured)
    assert free is not None
    budget = Budget(limit=max(one.total for one in memory_of(free[0])) - 1)
    assert budget.limit is not None
    bound = better_plan(trace, module, plan, measured, budget=budget)
    assert bound is not None
    assert max(one.total for one in memory_of(bound[0])) <= budget.limit


@pytest.mark.parametrize(
    ("limit", "error", "text"),
    [
        (0, ValueError, "`memory_limit` must be at least 1 byte, but is 0"),
        (-5, ValueError, "`memory_limit` must be at least 1 byte, but is -5"),
        (2e9, TypeError, "`memory_limit` must be an integer, of bytes, but is 2000000000.0. For 20 GB: `20 "),
        ("2GB", TypeError, "`memory_limit` must be an integer, of bytes, but is '2GB'"),
        (True, TypeError, "`memory_limit` must be an integer, of bytes, but is True"),
    ],
)
def test_limits_that_are_none(limit: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        DelayedMPStrategy(num_stages=2, memory_limit=limit)


def test_virtual_stages_have_no_limit() -> None:
    with pytest.raises(ValueError, match="`memory_limit` is for processes that hold one stage each"):
        DelayedMPStrategy(num_stages=2, virtual=True, memory_limit=10**9)
