"""The simulator against closed forms and hand-made timelines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from lightning_dgmp.simulator import (
    SCHEDULES,
    Action,
    Link,
    StageCost,
    delayed,
    gpipe,
    one_f_one_b,
    predict,
    simulate,
    zero_bubble,
)
from lightning_dgmp.timing import Span

EVEN = StageCost(forward=1.0, backward=2.0)


def text(actions: Sequence[Action]) -> str:
    letters = {"forward": "F", "backward": "B", "inputs": "I", "weights": "W", "update": "U"}
    return " ".join(f"{letters[action.kind]}{action.batch}" for action in actions)


def test_the_delayed_schedule() -> None:
    first, last = delayed(2, 3)
    assert text(first) == "F0 F1 B0 U0 F2 B1 U1 B2 U2"
    assert text(last) == "F0 B0 U0 F1 B1 U1 F2 B2 U2"
    assert text(delayed(2, 3, slack=1)[0]) == "F0 F1 F2 B0 U0 B1 U1 B2 U2"


def test_the_synchronous_schedules() -> None:
    assert text(gpipe(2, 2, 2)[0]) == "F0 F1 B0 B1 U0 F2 F3 B2 B3 U1"
    assert [text(stage) for stage in one_f_one_b(3, 1, 4)] == [
        "F0 F1 F2 B0 F3 B1 B2 B3 U0",
        "F0 F1 B0 F2 B1 F3 B2 B3 U0",
        "F0 B0 F1 B1 F2 B2 F3 B3 U0",
    ]
    assert [text(stage) for stage in zero_bubble(3, 1, 4)] == [
        "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3 U0",
        "F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3 U0",
        "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3 U0",
    ]
    assert text(one_f_one_b(2, 2, 1)[0]) == "F0 B0 U0 F1 B1 U1"


def test_a_timeline_by_hand() -> None:
    """Two stages: the first must wait for the error of batch 0, which is there after 1 + 1/2 + 3 + 1/2."""
    first, last = simulate(delayed(2, 2), [EVEN, EVEN], Link(latency=0.5))
    assert last[:2] == [Span("forward", 0, 1.5, 2.5), Span("backward", 0, 2.5, 4.5)]
    assert first[:3] == [Span("forward", 0, 0, 1), Span("forward", 1, 1, 2), Span("backward", 0, 5, 7)]


@pytest.mark.parametrize("num_stages", [1, 2, 4, 8, 11])
def test_equal_stages_never_wait(num_stages: int) -> None:
    prediction = predict(delayed(num_stages, 12 * num_stages), [EVEN] * num_stages)
    assert prediction.period == pytest.approx(3)
    assert prediction.efficiency == pytest.approx(1)
    assert prediction.speedup == pytest.approx(num_stages)


@pytest.mark.parametrize("slack", [0, 1, 3])
@pytest.mark.parametrize("latency", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("seconds", [[3, 3, 3, 3], [3, 5, 3, 1.5], [5, 1, 4]])
def test_the_period_is_that_of_the_slowest_circle(seconds: list[float], latency: float, slack: int) -> None:
    """A batch goes forward from stage i to j and back; meanwhile stage i runs (1 + slack) (j - i) others."""
    circles = [
        (sum(seconds[i : j + 1]) + 2 * latency * (j - i)) / ((1 + slack) * (j - i) + 1)
        for i in range(len(seconds))
        for j in range(i, len(seconds))
    ]
    costs = [StageCost(s / 3, 2 * s / 3) for s in seconds]
    schedule = delayed(len(seconds), 420, slack)
    assert predict(schedule, costs, Link(latency)).period == pytest.approx(max(circles), rel=1e-2)


def test_slack_does_not_widen_a_link() -> None:
    costs, link = [StageCost(1, 2, nbytes=10)] * 3, Link(bandwidth=2.5)
    assert predict(delayed(3, 80, slack=4), costs, link).period == pytest.approx(4)


@pytest.mark.parametrize("num_stages", [2, 4, 8])
@pytest.mark.parametrize("microbatches", [8, 16])
@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b])
def test_the_bubble_of_synchronous_schedules(
    schedule: Callable[..., list[list[Action]]], num_stages: int, microbatches: int
) -> None:
    """(M + K - 1) / M, as in the papers."""
    prediction = predict(schedule(num_stages, 8, microbatches), [EVEN] * num_stages, microbatches=microbatches)
    assert prediction.period == pytest.approx(3 * (microbatches + num_stages - 1) / microbatches)


def test_zero_bubble_has_a_third_of_the_bubble() -> None:
    """``(K - 1) (F + I - W)``, by Table 2 of the paper."""
    num_stages, microbatches = 4, 8
    costs = [StageCost(1.0, 2.0)] * num_stages
    period = predict(zero_bubble(num_stages, 8, microbatches), costs, microbatches=microbatches).period
    assert period == pytest.approx(3 + (num_stages - 1) * 1 / microbatches)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("microbatches", [1, 2, 3, 9])
def test_all_schedules_do_everything_once(name: str, microbatches: int) -> None:
    num_stages, num_batches = 4, 5
    schedule = SCHEDULES[name](num_stages, num_batches, microbatches)
    simulate(schedule, [EVEN] * num_stages, microbatches=microbatches)
    for actions in schedule:
        for kind in {action.kind for action in actions} - {"update"}:
            done = [action.batch for action in actions if action.kind == kind]
            assert sorted(done) == list(range(num_batches * microbatches))


def test_updates_count() -> None:
    assert predict(delayed(2, 40), [EVEN, StageCost(1, 2, update=0.5)]).period == pytest.approx(3.5)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="`forward` of a stage must be at least 0 and finite, but is -1"):
        StageCost(-1, 2)
    with pytest.raises(ValueError, match="`backward` of a stage must be at least 0 and finite, but is nan"):
        StageCost(1, math.nan)
    with pytest.raises(ValueError, match="from 0 to 1, but is 2"):
        StageCost(1, 2, weights=2)
    with pytest.raises(ValueError, match=r"`latency` must be at least 0 seconds and finite, but is -0\.1"):
        Link(-0.1)
    with pytest.raises(ValueError, match="`bandwidth` must be more than 0"):
        Link(bandwidth=0)
    with pytest.raises(ValueError, match="a cost for each of the 3 stages, but there are 2"):
        simulate(delayed(3, 9), [EVEN] * 2)
    with pytest.raises(ValueError, match="at least 4 batches, but it has 2"):
        predict(delayed(2, 2), [EVEN] * 2)
    with pytest.raises(ValueError, match="`microbatches` must be at least 1, but is 0"):
        gpipe(2, 2, 0)
    with pytest.raises(ValueError, match="`slack` must be at least 0, but is -1"):
        delayed(2, 2, slack=-1)
    with pytest.raises(ValueError, match="stage 0 waits for ever to run the backward of batch 0"):
        simulate([[Action("backward", 0)], [Action("forward", 0)]], [EVEN] * 2)
