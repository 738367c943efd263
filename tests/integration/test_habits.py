"""What modules keep, change and hook is the same on all stages as in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests import models
from tests.habits import HABITS, SPLITS, CheckpointedDropout
from tests.pool import WorkerPool
from tests.training import Outcome, assert_equal, fit

RERUN = {"CountsInABuffer", "ScalesTheBatch", "AddsInPlace", "UnfreezesWhileInFlight", "DetachesAtFirst"}


def run(pool: WorkerPool, model: Callable[..., Any], num_stages: int, virtual: bool = False, **kwargs: Any) -> Outcome:
    strategy = {"num_stages": num_stages, "split_at": SPLITS[num_stages], "virtual": virtual}
    strategy |= {key: kwargs.pop(key) for key in ("backward",) if key in kwargs}
    devices = 1 if virtual else num_stages
    return pool.run(fit, devices, model, models.vectors, strategy, devices, **kwargs)[0]


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("model", HABITS)
def test_processes_equal_virtual_stages(pool: WorkerPool, model: Any, num_stages: int) -> None:
    expected = run(pool, model, num_stages, virtual=True)
    assert_equal(run(pool, model, num_stages), expected, 1e-6)
    if model.__name__ in RERUN:
        assert_equal(run(pool, model, num_stages, backward="recompute"), expected, 1e-6)


@pytest.mark.parametrize("backward", ["stash", "recompute"])
def test_checkpointing_draws_the_same_again(pool: WorkerPool, backward: str) -> None:
    plain = run(pool, CheckpointedDropout, 3, backward=backward, module_args={"checkpointed": False})
    assert_equal(run(pool, CheckpointedDropout, 3, backward=backward), plain, 1e-6)
