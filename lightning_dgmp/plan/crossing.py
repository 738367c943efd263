"""What must travel to a stage so that it can do its part.

A value travels if all stages can point at it: if it is an argument or an output of a module call that all of them see.
If it is not, the operation that made it is repeated where the value is needed, and what that operation takes travels
instead; at runtime nothing needs to be done for that, because an operation on values that have arrived computes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from lightning_dgmp.plan.record import Appearance, Trace

__all__ = ["Crossing", "changed_by", "overwritten_on", "values_to_send"]


class Crossing(NamedTuple):
    """What travels, by value, and the first value that would have to and cannot."""

    appearances: dict[int, Appearance]
    obstacle: int | None


def values_to_send(
    trace: Trace,
    first_use: Mapping[int, float],
    is_elsewhere: Callable[[int], bool],
    is_entered: Callable[[int], bool],
    optional: Mapping[int, float] = {},
) -> Crossing:
    """Find what must travel to a stage.

    Args:
        trace: What the step runs.
        first_use: The values of other stages that the stage uses, and when.
        is_elsewhere: Whether a value is made on another stage.
        is_entered: Whether all stages run the inside of a module call; -1 is the step itself.
        optional: Values that the stage may use, and when; those that cannot travel are left out.
    """
    appearances: dict[int, Appearance] = {}
    obstacle: int | None = None
    for required, uses in ((True, first_use), (False, optional)):
        needed = dict(uses)
        # Operations take older values: from the youngest to the oldest, each is looked at when all its uses are known.
        queue = [-v for v in needed]
        heapq.heapify(queue)
        while queue:
            v = -heapq.heappop(queue)
            value = trace.values[v]
            if v in appearances and appearances[v].time < needed[v]:
                continue
            changes = [time for time in trace.changes.get(value.storage, ()) if time < needed[v]]
            last_change = max(changes, default=-1)  # perhaps through a view of it
            # The last one, so that what comes before it may differ from batch to batch.
            seen = next(
                (
                    a
                    for a in reversed(value.appearances)
                    if last_change < a.time < needed[v] and is_entered(trace.calls[a.call].parent)
                ),
                None,
            )
            if seen is not None:
                appearances[v] = seen
                continue
            op = trace.ops[value.op]
            if op.parameters or op.in_place or not is_entered(op.call) or last_change > op.time:
                if required:
                    obstacle = v if obstacle is None else obstacle
                continue
            for u in op.inputs:
                if is_elsewhere(u):
                    if u not in needed:
                        heapq.heappush(queue, -u)
                    needed[u] = min(needed.get(u, float("inf")), op.time)
    if obstacle is None:
        obstacle = _alias_that_changes(trace, appearances)
    return Crossing(appearances, obstacle)


def changed_by(trace: Trace, stages: Sequence[int]) -> Callable[[int, float], int]:
    """What tells the latest stage that changes a value in place, perhaps through a view of it, before a time.

    Args:
        trace: What the step runs.
        stages: Of each operation; heights do as well.
    """
    stage_at = {op.time: stage for op, stage in zip(trace.ops, stages)}

    def latest(v: int, before: float) -> int:
        value = trace.values[v]
        times = trace.changes.get(value.storage, ())
        return max((stage_at[time] for time in times if trace.ops[value.op].time < time < before), default=-1)

    return latest


def overwritten_on(trace: Trace, op_stages: Sequence[int]) -> set[int]:
    """The stages that see how a later one writes in place into what is theirs, or has arrived there."""
    stages: set[int] = set()
    first: dict[int, int] = {}  # by storage
    for op, stage in zip(trace.ops, op_stages):
        for v in op.outputs:
            earliest = first.setdefault(trace.values[v].storage, stage)
            if op.in_place:
                stages.update(range(earliest, stage))
    return stages


def _alias_that_changes(trace: Trace, appearances: Mapping[int, Appearance]) -> int | None:
    """A value that shares its storage with another one that changes it when both have travelled, and share no more."""
    by_storage: dict[int, list[int]] = {}
    for v in appearances:
        by_storage.setdefault(trace.values[v].storage, []).append(v)
    for storage, aliases in by_storage.items():
        first = min(appearances[v].time for v in aliases)
        if len(aliases) > 1 and any(time > first for time in trace.changes.get(storage, ())):
            return aliases[1]
    return None
