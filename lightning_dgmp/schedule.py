"""When each stage does what, as data.

The delayed schedule of Ouroboros (Yang et al., NeurIPS 2019, arXiv 1909.06695; DDG, Huo et al., ICML 2018): at its
iteration ``t`` stage ``k`` of ``K`` runs the forward of batch ``t``, then the backward of batch ``t - d_k``, where the
delay ``d_k = K - 1 - k`` grows towards the input. With ``K = 3``, F4 the forward of batch 4 and B2 the backward of
batch 2, one column an iteration of stage 0::

    stage 0 | F0      F1      F2 B0   F3 B1   F4 B2   F5 B3
    stage 1 |   F0      F1 B0   F2 B1   F3 B2   F4 B3
    stage 2 |     F0 B0   F1 B1   F2 B2   F3 B3
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

__all__ = ["Iteration", "delayed_schedule", "delays_of", "draw"]


class Iteration(NamedTuple):
    """What a stage does in one iteration: the batches of its forward and of its backward, if any."""

    forward: int | None
    backward: int | None

    def __str__(self) -> str:
        parts = [f"{letter}{batch}" for letter, batch in zip("FB", self) if batch is not None]
        return " ".join(parts)


def delays_of(num_stages: int, slack: int = 0) -> list[int]:
    """The delay of each stage in iterations: ``[K - 1, ..., 1, 0]``, and so many times ``1 + slack``.

    Raises:
        ValueError: If ``slack`` is negative.
    """
    if slack < 0:
        raise ValueError(f"`slack` must be at least 0, but is {slack}.")
    return [(num_stages - 1 - stage) * (1 + slack) for stage in range(num_stages)]


def delayed_schedule(delays: Sequence[int], num_batches: int) -> Iterator[list[Iteration]]:
    """Yield the iterations of each stage in turn, input first, flush included.

    Args:
        delays: How many iterations later than its forward a batch's backward runs, for each stage. Must not increase
            from one stage to the next.
        num_batches: How many batches run before the flush.

    Raises:
        ValueError: If a delay is negative or increases: a stage would wait for an error that comes later.
    """
    if any(d < 0 for d in delays) or any(a < b for a, b in pairwise(delays)):
        raise ValueError(
            f"`delays` must be at least 0 and must not increase from stage to stage, but are {list(delays)}."
        )
    for delay in delays:
        yield [
            Iteration(t if t < num_batches else None, t - delay if t >= delay else None)
            for t in range(num_batches + delay if num_batches else 0)
        ]


def draw(schedule: Sequence[Sequence[Iteration]], columns: int | None = None) -> str:
    """The table of a schedule as text, as in the module docstring.

    Args:
        schedule: The iterations of each stage.
        columns: Show the first so many iterations of stage 0, and what the other stages can have done by then; by
            default all.
    """
    width = 3 + max((len(str(i)) for stage in schedule for i in stage), default=0)
    lines = []
    for k, stage in enumerate(schedule):
        shown = stage if columns is None else stage[: max(columns - k, 0)]
        cells = "".join(str(i).ljust(width) for i in shown)
        lines.append(f"stage {k} | {'  ' * k}{cells}".rstrip())
    return "\n".join(lines)
