"""The clock counts everything once."""

from __future__ import annotations

import pytest

from lightning_dgmp import timing
from lightning_dgmp.timing import KINDS, Clock


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as a list of one number."""
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "time", lambda: now[0] + 1000)
    return now


def test_what_is_inside_counts_once(ticks: list[float]) -> None:
    clock = Clock()
    with clock.measuring("forward", 3):
        ticks[0] += 1
        with clock.measuring("wait_activation", 3):
            ticks[0] += 10
        ticks[0] += 2
    ticks[0] += 4
    with clock.measuring("backward", 2):
        ticks[0] += 5
    seconds, total = clock.take()
    assert seconds == {**dict.fromkeys(KINDS, 0.0), "forward": 3, "wait_activation": 10, "backward": 5}
    assert total == 22
    assert [tuple(span) for span in clock.spans] == [
        ("wait_activation", 3, 1101, 1111),
        ("forward", 3, 1100, 1113),
        ("backward", 2, 1117, 1122),
    ]


def test_each_interval_counts_for_itself(ticks: list[float]) -> None:
    clock = Clock()
    with clock.measuring("update"):
        ticks[0] += 1
    assert clock.take()[0]["update"] == 1
    ticks[0] += 3
    assert clock.take() == (dict.fromkeys(KINDS, 0.0), 3)


def test_an_error_ends_a_measurement(ticks: list[float]) -> None:
    clock = Clock()

    def fail() -> None:
        with clock.measuring("forward"):
            ticks[0] += 1
            with clock.measuring("wait_error"):
                ticks[0] += 2
                raise KeyError

    with pytest.raises(KeyError):
        fail()
    with clock.measuring("update"):
        ticks[0] += 4
    seconds, _ = clock.take()
    assert (seconds["forward"], seconds["wait_error"], seconds["update"]) == (1, 2, 4)
