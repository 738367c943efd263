"""Modules after real projects: K processes do what K virtual stages in one process do, or refuse with a reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.compat.harness import compare, whole_story
from tests.compat.modules import ACCEPTED, CASES, REFUSED
from tests.pool import Failure, WorkerPool

# What refusals are raised as; anything else is a failure.
REFUSALS = {"PlanError", "GhostError", "MisconfigurationException"}


# The suite runs those modules that also test and predict with two stages and with four, the others with one of these;
# the command that makes the README's table runs all with both.
WITH_FOUR = {"Distillation", "GathersReplicas", "SimCLR", "CollectsOutputs"}
RUNS = [
    (name, k)
    for name, case in sorted(ACCEPTED.items())
    for k in (2, 4)
    if case.is_complete or k == (4 if name in WITH_FOUR else 2)
]


def stories(pool: WorkerPool, name: str, strategy: dict[str, Any] | None, devices: int, folder: Path) -> list[Any]:
    """The story on each rank, or its :class:`~tests.pool.Failure`."""
    return pool.try_run(whole_story, devices, name, strategy, devices, str(folder), timeout=120)


@pytest.mark.parametrize(("name", "num_stages"), RUNS)
def test_processes_do_what_virtual_stages_do(pool: WorkerPool, tmp_path: Path, name: str, num_stages: int) -> None:
    case = ACCEPTED[name]
    results = stories(pool, name, {"num_stages": num_stages}, num_stages, tmp_path / "processes")
    failures = {rank: result for rank, result in enumerate(results) if isinstance(result, Failure)}
    refusals = [failure.message for failure in failures.values() if failure.type in REFUSALS]
    if case.may_work and refusals and all(failure.type in REFUSALS | {"PeerError"} for failure in failures.values()):
        pytest.xfail(refusals[0])
    assert not failures, "\n".join(f"rank {rank}:\n{failure.traceback}" for rank, failure in failures.items())
    strategy = {"num_stages": num_stages, "virtual": True}
    expected = stories(pool, name, strategy, 1, tmp_path / "virtual")[0]
    assert not isinstance(expected, Failure), expected.traceback
    compare(results[0], expected, case.tolerance)
    for key in ("validate", "test", "callback_metrics", "best", "best_score", "resumed_state"):
        assert len({str(result.get(key)) for result in results}) == 1, f"the stages differ in {key!r}"


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    case, num_stages = REFUSED[name], 2
    results = stories(pool, name, {"num_stages": num_stages}, num_stages, tmp_path / "processes")
    if case.may_work and not any(isinstance(result, Failure) for result in results):
        strategy = {"num_stages": num_stages, "virtual": True}
        compare(results[0], stories(pool, name, strategy, 1, tmp_path / "virtual")[0], case.tolerance)
        return
    assert all(isinstance(result, Failure) for result in results), results
    assert case.refusal is not None
    for rank, result in enumerate(results):
        assert re.search(case.refusal, result.message), f"rank {rank} says: {result.traceback}"


def test_twenty_modules_do_everything_with_two_and_four_stages() -> None:
    names = [name for name, case in ACCEPTED.items() if case.is_complete and not case.may_work]
    assert len(names) >= 20
    assert {(name, k) for name in names for k in (2, 4)} <= set(RUNS)


def test_the_readme_has_all_modules() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    assert re.findall(r"^\| (\w+) \| [^|]+ \| (?:works|\w+Error|\w+Exception)", text, re.MULTILINE) == list(CASES)
