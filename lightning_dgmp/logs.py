"""The account of a finished run, from the events that it has logged for TensorBoard."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_dgmp.timing import KINDS

__all__ = ["Comparison", "Event", "Run", "as_json", "compare", "describe", "loss_tag", "names_of", "read_run"]


class Event(NamedTuple):
    """A number in the log: the step it is about, when it was logged in seconds, and the number."""

    step: int
    time: float
    value: float


@dataclass(frozen=True)
class Run:
    """A folder of events.

    Attributes:
        folder: Where they are.
        scalars: The numbers, by tag.
    """

    folder: Path
    scalars: Mapping[str, list[Event]]

    @property
    def num_stages(self) -> int:
        """How many stages the monitor has seen; 1 without it."""
        return sum(f"stage_{k}/forward" in self.scalars for k in range(len(self.scalars))) or 1

    @property
    def seconds_per_step(self) -> float:
        """The median over the intervals between entries of the log, of the scalar that has the most of them."""
        longest = max(self.scalars.values(), key=len)
        pairs = [(a, b) for a, b in pairwise(longest) if b.step > a.step]
        if not pairs:
            raise ValueError(
                f"A run must have logged a scalar twice, to tell what a step takes, but {self.folder} has not. Train"
                " longer, or set `Trainer(log_every_n_steps=...)`."
            )
        return statistics.median((b.time - a.time) / (b.step - a.step) for a, b in pairs)

    def median(self, tag: str) -> float | None:
        """Of a scalar over the run, its first entry apart, when the pipeline began to fill."""
        values = [event.value for event in self.scalars.get(tag, [])]
        return statistics.median(values[1:] or values) if values else None

    def mean(self, tag: str) -> float:
        """Of a scalar over the steps of the run, those up to its first entry apart; 0 without it."""
        events = self.scalars.get(tag, [])
        steps = [max(b.step - a.step, 0) for a, b in pairwise(events)]
        if not sum(steps):
            return statistics.fmean([event.value for event in events] or [0.0])
        return statistics.fmean([event.value for event in events[1:]], steps)

    def shares(self) -> list[dict[str, float]]:
        """How each stage has spent its time; none without the monitor."""
        kinds = (*KINDS, "other")
        if "stage_0/forward" not in self.scalars:
            return []
        return [{kind: self.mean(f"stage_{k}/{kind}") for kind in kinds} for k in range(self.num_stages)]


class Comparison(NamedTuple):
    """One run beside another.

    Attributes:
        tag: Of the loss.
        target: The lowest loss that both have reached, in means of neighbouring entries of the log, so that no lucky
            batch decides.
        mean_of: How many entries: a twentieth of those of the shorter log, from 1 to 100.
        steps: How many steps each needs for it.
        faster: How many times faster the first makes a step.
        fewer: How many times fewer steps it needs.
        speedup: The product: how many times sooner it reaches the loss.
    """

    tag: str
    target: float
    mean_of: int
    steps: tuple[int, int]
    faster: float
    fewer: float
    speedup: float

    def table(self, names: Sequence[str], seconds: Sequence[float]) -> str:
        """Both factors and their product.

        Args:
            names: Of the two runs.
            seconds: A step of each takes.
        """
        smoothed = f", mean of {self.mean_of} entries" if self.mean_of > 1 else ""
        rows = [
            (f"`{self.tag}` down to {self.target:.4g}{smoothed}", *names, "the first against the second"),
            ("ms a step", *(f"{1000 * s:.1f}" for s in seconds), f"{self.faster:.2f} times as fast"),
            ("steps", *map(str, self.steps), f"{self.fewer:.2f} times as few"),
            ("both", "", "", f"{self.speedup:.2f} times sooner"),
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def read_run(folder: Path) -> Run:
    """Read a folder of events, or the newest of its subfolders that has some.

    Raises:
        ValueError: If there are none.
    """
    if not folder.is_dir():
        raise ValueError(f"A log folder must exist, but {folder} does not.")
    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ValueError(f"A log folder must hold events of TensorBoard, but {folder} has none, also in subfolders.")
    events = EventAccumulator(str(files[-1].parent), size_guidance={"scalars": 0})
    events.Reload()
    tags: list[str] = events.Tags()["scalars"]
    scalars = {tag: [Event(e.step, e.wall_time, e.value) for e in events.Scalars(tag)] for tag in tags}
    if not scalars:
        raise ValueError(f"A run must have logged scalars, but {files[-1].parent} has none.")
    return Run(files[-1].parent, scalars)


def loss_tag(runs: list[Run], wanted: str | None = None) -> str:
    """The scalar by which runs are compared: the one that is wanted, or a loss that all have, of validation if any.

    Raises:
        ValueError: If there is none.
    """
    common = set.intersection(*(set(run.scalars) for run in runs))
    if wanted is not None:
        if wanted not in common:
            raise ValueError(f"`--loss` must name a scalar of all runs, but {wanted!r} is not in {sorted(common)}.")
        return wanted
    losses = [tag for tag in sorted(common) if "loss" in tag.lower() or "bits" in tag.lower()]
    if not losses:
        raise ValueError(f"No scalar of all runs has 'loss' in its name; choose one with `--loss`: {sorted(common)}.")
    return min(losses, key=lambda tag: ("val" not in tag.lower(), "step" in tag.lower(), tag))


def compare(run: Run, other: Run, tag: str) -> Comparison:
    """``run`` beside ``other``, such as delayed training beside training on one device.

    Raises:
        ValueError: If one has no finite loss.
    """
    mean_of = min(max(min(len(r.scalars[tag]) for r in (run, other)) // 20, 1), 100)
    means = [_means(r.scalars[tag], mean_of) for r in (run, other)]
    lowest = [min((e.value for e in events), default=None) for events in means]
    if lowest[0] is None or lowest[1] is None:
        folder = (run if lowest[0] is None else other).folder
        raise ValueError(f"Runs are compared by a finite `{tag}`, but all of {folder} are NaN or infinite.")
    target = max(lowest[0], lowest[1])
    steps = [next(event.step for event in events if event.value <= target) for events in means]
    faster = other.seconds_per_step / run.seconds_per_step
    fewer = (steps[1] + 1) / (steps[0] + 1)  # steps count from 0
    return Comparison(tag, target, mean_of, (steps[0], steps[1]), faster, fewer, faster * fewer)


def _means(events: Sequence[Event], number: int) -> list[Event]:
    """The finite means of so many entries, each with the step of its last one."""
    windows = [events[end - number : end] for end in range(number, len(events) + 1)]
    means = [window[-1]._replace(value=statistics.fmean(event.value for event in window)) for window in windows]
    return [mean for mean in means if math.isfinite(mean.value)]


def names_of(runs: Sequence[Run]) -> list[str]:
    """The ends of their folders that tell them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    tells = (n for n in range(1, max(map(len, parts))) if len({part[-n:] for part in parts}) == len(runs))
    length = next(tells, 1)
    return ["/".join(part[-length:]) for part in parts]


def describe(run: Run) -> str:
    """The account of a run as text."""
    lines = [f"{run.folder}: {1000 * run.seconds_per_step:.1f} ms a step"]
    busy, speedup = run.median("pipeline/efficiency"), run.median("pipeline/speedup")
    if busy is not None and speedup is not None:
        lines.append(
            f"the slowest stage computes in {100 * busy:.0f} % of the time; {speedup:.2f} times as fast as one device"
        )
    kinds = (*KINDS, "other")
    for k, shares in enumerate(run.shares()):
        if k == 0:
            lines.append("stage  " + "  ".join(kinds))
        cells = (f"{100 * shares[kind]:.0f} %".rjust(len(kind)) for kind in kinds)
        lines.append(f"{k:>5}  " + "  ".join(cells))
    return "\n".join(lines)


def as_json(run: Run) -> dict[str, Any]:
    """The account of a run."""
    return {
        "folder": str(run.folder),
        "num_stages": run.num_stages,
        "seconds_per_step": run.seconds_per_step,
        "efficiency": run.median("pipeline/efficiency"),
        "speedup": run.median("pipeline/speedup"),
        "shares": run.shares(),
    }
