"""What modules keep, change and hook is the same on all stages as in one process."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch import Callback

from lightning_dgmp.stage import skip
from tests import models
from tests.habits import HABITS, SPLITS, CheckpointedDropout
from tests.habits_arguments import HABITS_WITH_ARGUMENTS, ReadsAGlobal, ReadsInALoop
from tests.pool import Failure, WorkerPool
from tests.training import Outcome, assert_equal, fit

RERUN = {
    "CountsInABuffer",
    "ScalesTheBatch",
    "AddsInPlace",
    "UnfreezesWhileInFlight",
    "DetachesAtFirst",
    "CountsInObjects",
    "ChangesAGraph",
    "CutsStatesOff",
}


def run(pool: WorkerPool, model: Callable[..., Any], num_stages: int, virtual: bool = False, **kwargs: Any) -> Outcome:
    strategy = {"num_stages": num_stages, "split_at": SPLITS[num_stages], "virtual": virtual}
    strategy |= {key: kwargs.pop(key) for key in ("backward",) if key in kwargs}
    devices = 1 if virtual else num_stages
    return pool.run(fit, devices, model, models.vectors, strategy, devices, **kwargs)[0]


@pytest.mark.parametrize(
    ("model", "num_stages"),
    [(model, 3 if i % 2 else 2) for i, model in enumerate(HABITS)] + [(model, 3) for model in HABITS_WITH_ARGUMENTS],
)
def test_processes_equal_virtual_stages(pool: WorkerPool, model: Any, num_stages: int) -> None:
    more = {"make_val_loader": models.vectors} if hasattr(model, "validation_step") else {}
    expected = run(pool, model, num_stages, virtual=True, **more)
    assert_equal(run(pool, model, num_stages, **more), expected, 1e-6)
    if model.__name__ in RERUN:
        assert_equal(run(pool, model, num_stages, backward="recompute"), expected, 1e-6)


def test_a_shape_that_cannot_be_known_is_an_error_even_where_no_value_arrives(pool: WorkerPool) -> None:
    results = pool.try_run(fit, 2, ReadsAGlobal, models.vectors, {"num_stages": 2, "split_at": SPLITS[2]}, 2)
    assert "but stage 0 saw another one than stage 1" in results[0].message
    assert all(isinstance(result, Failure) for result in results)


def test_a_loop_that_reads_values_belongs_to_the_last_stage(pool: WorkerPool) -> None:
    assert_equal(run(pool, ReadsInALoop, 2), run(pool, ReadsInALoop, 2, virtual=True), 1e-6)
    results = pool.try_run(fit, 2, ReadsInALoop, models.vectors, {"num_stages": 2, "split_at": ["third"]}, 2)
    assert all(isinstance(result, Failure) for result in results)
    says = (
        r"`third` on stage 1 used .* made by `second` of stage 0, which is not here\. A step may call only modules of"
    )
    says += r".*`item` reads .*habits_arguments\.py:\d+\).*`split_at`"
    assert any(re.search(says, result.message) for result in results), results


@pytest.mark.parametrize("backward", ["stash", "recompute"])
def test_checkpointing_draws_the_same_again(pool: WorkerPool, backward: str) -> None:
    plain = run(pool, CheckpointedDropout, 3, backward=backward, module_args={"checkpointed": False})
    assert_equal(run(pool, CheckpointedDropout, 3, backward=backward), plain, 1e-6)


def fit_and_count_runs(name: str, num_stages: int) -> list[int]:
    """How often this stage ran modules of others on ghosts, by batch."""
    from tests.integration.test_equality import MODELS

    runs, save, batches = Counter[int](), skip.attributes_saved, [0]

    def counted(module: Any) -> Any:  # called whenever a module runs on ghosts
        runs[batches[0]] += 1
        return save(module)

    class Counts(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            batches[0] = batch_idx

    model, loader = MODELS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skip, "attributes_saved", counted)
        fit(model, loader, {"num_stages": num_stages}, num_stages, callbacks=[Counts()], limit_train_batches=12)
    return [runs[i] for i in range(12)]


@pytest.mark.parametrize("name", ["the example", "gpt2", "llama", "residual net"])
def test_ordinary_modules_run_on_ghosts_once_for_each_shape(pool: WorkerPool, name: str) -> None:
    for runs in pool.run(fit_and_count_runs, 2, name, 2):
        assert runs.count(0) >= 6, runs
