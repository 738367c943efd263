"""The schedule is the table in its module's docstring."""

from __future__ import annotations

import pytest

from lightning_dgmp import schedule
from lightning_dgmp.schedule import Iteration, delayed_schedule, delays_of, draw

PICTURE = """
    stage 0 | F0      F1      F2 B0   F3 B1   F4 B2   F5 B3
    stage 1 |   F0      F1 B0   F2 B1   F3 B2   F4 B3
    stage 2 |     F0 B0   F1 B1   F2 B2   F3 B3
"""


def test_the_schedule_is_the_picture() -> None:
    picture = PICTURE.strip("\n").replace("    stage", "stage")
    assert draw(list(delayed_schedule(delays_of(3), 10)), columns=6) == picture
    assert PICTURE.strip("\n") in (schedule.__doc__ or "")


def test_the_flush_runs_backwards_alone() -> None:
    expected = """
stage 0 | F0      F1      F2 B0   B1      B2
stage 1 |   F0      F1 B0   F2 B1   B2
stage 2 |     F0 B0   F1 B1   F2 B2
"""
    assert draw(list(delayed_schedule([2, 1, 0], 3))) == expected.strip("\n")


@pytest.mark.parametrize("num_stages", [1, 2, 5, 11])
@pytest.mark.parametrize("num_batches", [0, 1, 4, 30])
def test_every_batch_goes_forward_and_back_once_on_every_stage(num_stages: int, num_batches: int) -> None:
    delays = delays_of(num_stages)
    for delay, stage in zip(delays, delayed_schedule(delays, num_batches)):
        assert [i.forward for i in stage if i.forward is not None] == list(range(num_batches))
        assert [i.backward for i in stage if i.backward is not None] == list(range(num_batches))
        for t, iteration in enumerate(stage):
            assert iteration == Iteration(t if t < num_batches else None, t - delay if t >= delay else None)


def test_other_delays() -> None:
    stages = list(delayed_schedule([4, 1, 0], 9))
    assert stages[0][4] == Iteration(4, 0)
    assert stages[1][4] == Iteration(4, 3)


@pytest.mark.parametrize("delays", [[0, 1], [1, -1]])
def test_impossible_delays(delays: list[int]) -> None:
    with pytest.raises(ValueError, match="must be at least 0 and must not increase"):
        list(delayed_schedule(delays, 3))
