"""A hang is a failed test that says where each process hangs."""

from __future__ import annotations

import time

import pytest

from tests import models
from tests.pool import WorkerPool
from tests.training import fit


def hang_for_good() -> None:
    time.sleep(100)


def test_a_hang_prints_the_stacks_of_all_also_after_a_fit() -> None:
    workers = WorkerPool()
    workers.run(fit, 2, models.MLP, models.vectors, {"num_stages": 2}, 2, limit_train_batches=3)
    with pytest.raises(AssertionError, match="Rank 0 did not end within 1 s") as error:
        workers.run(hang_for_good, 2, timeout=1)
    assert str(error.value).count("in hang_for_good") == 2
