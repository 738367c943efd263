"""What a schedule takes, without running it: when each stage does what, and how often it waits.

A schedule is data: for each stage the actions that it runs one after another. An action begins when its stage is free
and what it needs has arrived: the activation for a forward, the error for a backward. Links between neighbours take
time for each byte and for each message, and run beside the stages. The same engine plays the delayed schedule of this
project and the synchronous ones:

- GPipe (Huang et al., NeurIPS 2019), all forwards of a batch's microbatches, then all backwards;
- 1F1B (PipeDream-Flush, Narayanan et al., ICML 2021), which takes turns as soon as it can;
- zero-bubble ZB-H1 (Qi et al., ICLR 2024), which fills the gaps of 1F1B with the gradients of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lightning_dgmp.schedule import delayed_schedule, delays_of
from lightning_dgmp.timing import Span

__all__ = [
    "SCHEDULES", "Action", "Link", "Prediction", "StageCost", "delayed", "gpipe", "one_f_one_b", "predict",
    "simulate", "zero_bubble",
]  # fmt: skip

Kind = Literal["forward", "backward", "inputs", "weights", "update"]


class Action(NamedTuple):
    """What a stage does at a time.

    Attributes:
        kind: ``"forward"``; ``"backward"``, or its halves, the gradients of the ``"inputs"``, for which the stage
            before waits, and of the ``"weights"``; ``"update"``, the step of the optimizer.
        batch: Its number, or that of the microbatch if a batch has several, counted through.
    """

    kind: Kind
    batch: int


@dataclass(frozen=True)
class StageCost:
    """What one batch costs a stage, in seconds, and what it sends.

    Attributes:
        forward: Its forward.
        backward: Its whole backward.
        update: The step of the optimizer, and what else is done once a batch, as hooks and logging.
        nbytes: What it sends to the next stage; as much comes back as errors.
        weights: The share of the backward that makes gradients of weights.

    Raises:
        ValueError: If one is negative or infinite, or the share over 1.
    """

    forward: float
    backward: float
    update: float = 0.0
    nbytes: float = 0.0
    weights: float = 0.5

    def __post_init__(self) -> None:
        for name in ("forward", "backward", "update", "nbytes", "weights"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` of a stage must be at least 0 and finite, but is {getattr(self, name)}.")
        if self.weights > 1:
            raise ValueError(f"`weights` is a share of the backward, from 0 to 1, but is {self.weights}.")

    @property
    def total(self) -> float:
        """Seconds for a batch without any waiting."""
        return self.forward + self.backward + self.update

    def seconds(self, kind: str, microbatches: int) -> float:
        """What an action takes if a batch has so many microbatches."""
        if kind == "update":
            return self.update
        whole = self.forward if kind == "forward" else self.backward
        part = {"weights": self.weights, "inputs": 1 - self.weights}.get(kind, 1.0)
        return part * whole / microbatches


@dataclass(frozen=True)
class Link:
    """What connects neighbours, in each direction.

    Attributes:
        latency: From the last byte sent to the receipt, in seconds.
        bandwidth: Bytes a second.

    Raises:
        ValueError: If the latency is negative or infinite, or the bandwidth not positive.
    """

    latency: float = 0.0
    bandwidth: float = float("inf")

    def __post_init__(self) -> None:
        if not 0 <= self.latency < float("inf"):
            raise ValueError(f"`latency` must be at least 0 seconds and finite, but is {self.latency}.")
        if not self.bandwidth > 0:
            raise ValueError(f"`bandwidth` must be more than 0 bytes a second, but is {self.bandwidth}.")


_PERFECT = Link()


class Prediction(NamedTuple):
    """What a schedule comes to in its steady state.

    Attributes:
        period: Seconds from one batch to the next.
        efficiency: The time that the slowest stage is at work, as a share of the period.
        speedup: How many times faster than one device that runs all stages one after another.
        timeline: The spans of each stage.
    """

    period: float
    efficiency: float
    speedup: float
    timeline: list[list[Span]]


# ----- schedules


def delayed(num_stages: int, num_batches: int, slack: int = 0) -> list[list[Action]]:
    """The delayed schedule of :mod:`lightning_dgmp.schedule`, an update after each backward."""
    stages = []
    for iterations in delayed_schedule(delays_of(num_stages, slack), num_batches):
        actions: list[Action] = []
        for forward, backward in iterations:
            if forward is not None:
                actions.append(Action("forward", forward))
            if backward is not None:
                actions += [Action("backward", backward), Action("update", backward)]
        stages.append(actions)
    return stages


def gpipe(num_stages: int, num_batches: int, microbatches: int) -> list[list[Action]]:
    """All forwards of a batch, then all its backwards, then the update."""

    def one(numbers: range) -> Iterator[Action]:
        yield from (Action("forward", i) for i in numbers)
        yield from (Action("backward", i) for i in numbers)

    return _synchronous(lambda stage, numbers: one(numbers), num_stages, num_batches, microbatches)


def one_f_one_b(num_stages: int, num_batches: int, microbatches: int) -> list[list[Action]]:
    """As many forwards as there are stages from here on, then a backward and a forward in turns."""
    return _alternating(num_stages, num_batches, microbatches, weights_apart=False)


def zero_bubble(num_stages: int, num_batches: int, microbatches: int) -> list[list[Action]]:
    """As 1F1B, but the gradients of the weights come ``stage`` microbatches later, when nothing else is to be done."""
    return _alternating(num_stages, num_batches, microbatches, weights_apart=True)


#: The synchronous schedules by their names: functions of the number of stages, of batches and of microbatches.
SCHEDULES = {"GPipe": gpipe, "1F1B": one_f_one_b, "zero-bubble": zero_bubble}


def _alternating(num_stages: int, num_batches: int, microbatches: int, weights_apart: bool) -> list[list[Action]]:
    def one(stage: int, numbers: range) -> Iterator[Action]:
        ahead = min(num_stages - stage, microbatches)
        yield from (Action("forward", i) for i in numbers[:ahead])
        for place, i in enumerate(numbers):
            yield Action("inputs" if weights_apart else "backward", i)
            if weights_apart and place >= stage:
                yield Action("weights", i - stage)
            yield from (Action("forward", j) for j in numbers[place + ahead :][:1])
        if weights_apart:
            yield from (Action("weights", i) for i in numbers[max(microbatches - stage, 0) :])

    return _synchronous(one, num_stages, num_batches, microbatches)


def _synchronous(one, num_stages: int, num_batches: int, microbatches: int) -> list[list[Action]]:  # type: ignore[no-untyped-def]
    if microbatches < 1:
        raise ValueError(f"`microbatches` must be at least 1, but is {microbatches}.")
    stages: list[list[Action]] = [[] for _ in range(num_stages)]
    for number in range(num_batches):
        for stage, actions in enumerate(stages):
            actions += one(stage, range(number * microbatches, (number + 1) * microbatches))
            actions.append(Action("update", number))
    return stages


# ----- the engine


def simulate(
    schedule: Sequence[Sequence[Action]], costs: Sequence[StageCost], link: Link = _PERFECT, microbatches: int = 1
) -> list[list[Span]]:
    """Play a schedule.

    Args:
        schedule: The actions of each stage, input first.
        costs: Of each stage, for a whole batch.
        link: Between neighbours.
        microbatches: How many of the schedule's numbers make a batch.

    Returns:
        The spans of each stage, in order.

    Raises:
        ValueError: If there are not as many costs as stages, or if the stages would wait for each other for ever.
    """
    if len(costs) != len(schedule):
        raise ValueError(f"There must be a cost for each of the {len(schedule)} stages, but there are {len(costs)}.")
    timeline: list[list[Span]] = [[] for _ in schedule]
    arrivals: dict[tuple[int, bool, int], float] = {}  # (at which stage, whether an error, of which batch)
    free: dict[tuple[int, bool], float] = {}  # when the link out of a stage is
    last, progress = len(schedule) - 1, True
    while progress:
        progress = False
        for stage, (actions, spans) in enumerate(zip(schedule, timeline)):
            while len(spans) < len(actions):
                kind, batch = actions[len(spans)]
                start = spans[-1].end if spans else 0.0
                is_error = kind in ("backward", "inputs")
                if (kind == "forward" and stage > 0) or (is_error and stage < last):
                    if (stage, is_error, batch) not in arrivals:
                        break
                    start = max(start, arrivals.pop((stage, is_error, batch)))
                end = start + costs[stage].seconds(kind, microbatches)
                spans.append(Span(kind, batch, start, end))
                progress = True
                target = stage + 1 if kind == "forward" else stage - 1
                if (kind == "forward" or is_error) and 0 <= target <= last:
                    nbytes = costs[min(stage, target)].nbytes / microbatches
                    sent = max(end, free.get((stage, is_error), 0.0)) + nbytes / link.bandwidth
                    free[stage, is_error] = sent
                    arrivals[target, is_error, batch] = sent + link.latency
    stuck = [stage for stage, (actions, spans) in enumerate(zip(schedule, timeline)) if len(spans) < len(actions)]
    if stuck:
        stage = stuck[0]
        kind, batch = schedule[stage][len(timeline[stage])]
        raise ValueError(f"The schedule cannot go on: stage {stage} waits for ever to run the {kind} of batch {batch}.")
    return timeline


def predict(
    schedule: Sequence[Sequence[Action]], costs: Sequence[StageCost], link: Link = _PERFECT, microbatches: int = 1
) -> Prediction:
    """What a schedule of several batches comes to, as :func:`simulate` plays it.

    The period is measured between the updates of the first stage in the second and third quarter of the schedule, where
    neither the beginning nor the flush is felt.
    """
    timeline = simulate(schedule, costs, link, microbatches)
    updates = [span.end for span in timeline[0] if span.kind == "update"]
    if len(updates) < 4:
        raise ValueError(f"A prediction needs a schedule of at least 4 batches, but it has {len(updates)}.")
    first, end = len(updates) // 4, 3 * len(updates) // 4
    period = (updates[end] - updates[first]) / (end - first)
    if not period > 0:
        raise ValueError("A prediction needs stages that take time, but all of these take 0 seconds.")
    work = [cost.total for cost in costs]
    return Prediction(period, max(work) / period, sum(work) / period, timeline)


def costs_of(
    forward: Sequence[float], backward: Sequence[float], update: Sequence[float] = (0,), nbytes: Sequence[float] = (0,)
) -> list[StageCost]:
    """The costs of stages from lists of milliseconds and bytes; one of a single number holds for all.

    Raises:
        ValueError: If they are not equally long, or a number is negative or infinite.
    """
    number = len(forward)
    columns = []
    for name, column in (("forward", forward), ("backward", backward), ("update", update), ("bytes", nbytes)):
        if len(column) not in (1, number):
            raise ValueError(
                f"There must be as many numbers of each kind as stages, {number} for `forward`, but there are"
                f" {len(column)} for `{name}`."
            )
        unit = "bytes" if name == "bytes" else "ms"
        for one in column:
            if not 0 <= one < float("inf"):
                raise ValueError(f"`{name}` of a stage must be at least 0 and finite, but is {one:g} {unit}.")
        columns.append(column if len(column) == number else [column[0]] * number)
    return [StageCost(f / 1000, b / 1000, u / 1000, n) for f, b, u, n in zip(*columns)]


def beside_each_other(
    costs: Sequence[StageCost], link: Link = _PERFECT, slack: int = 0, microbatches: int = 8
) -> list[tuple[str, Prediction]]:
    """The delayed schedule and then the synchronous ones, by name."""
    number = len(costs)
    rounds = 8 * number * (1 + slack) + 16
    rows = [(f"delayed, slack={slack}" if slack else "delayed", predict(delayed(number, rounds, slack), costs, link))]
    for name, schedule in SCHEDULES.items():
        prediction = predict(schedule(number, 8, microbatches), costs, link, microbatches)
        rows.append((f"{name}, {microbatches} microbatches", prediction))
    return rows
