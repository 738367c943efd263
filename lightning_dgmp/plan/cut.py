"""Where a traced step can be cut, what that costs, and which cuts are best.

Parameters are ordered by their first use; those that one operation uses together form a *unit*. A cut before unit ``c``
gives the units below ``c`` to earlier stages. An operation runs on the latest stage among its parameters and inputs, so
with ``height(op) = max(unit of its parameters, heights of its inputs)`` it is late for the cut ``c`` exactly if
``height(op) >= c``: the heights are computed once and answer for every cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from lightning_dgmp.plan.crossing import values_to_send
from lightning_dgmp.plan.record import Trace

__all__ = ["Cuts", "PlanError", "Unit", "choose_cuts", "stage_cost"]

# Cost is counted in floating point operations. A byte that an operation moves, a byte of a parameter that the optimizer
# updates and a byte that crosses a cut are worth this many of them: figures of a CPU core or an accelerator of today,
# which differ less in these ratios than in speed.
_PER_BYTE = 8
_PER_PARAMETER_BYTE = 20
_PER_SENT_BYTE = 16
_BACKWARD = 2  # a backward costs about two forwards


class PlanError(RuntimeError):
    """The model cannot be cut as asked. States the rule, the offending value and the cure."""


@dataclass(frozen=True)
class Unit:
    """Parameters that must live together, and the module call that uses them first."""

    parameters: tuple[str, ...]
    call: int


class Cuts:
    """The possible cuts of a trace.

    Attributes:
        units: In order of first use. The cut ``c`` lies before ``units[c]``, ``0 < c < len(units)``.
        costs: Forward, backward and update of each unit and of what runs with it.
        nbytes: What crosses each cut, in bytes.
        obstacles: Why a cut is impossible; no entry if it is possible.
        op_heights: Of each operation of the trace.
        value_heights: Of each value of the trace.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.units = _units(trace)
        self.unit_of = {name: u for u, unit in enumerate(self.units) for name in unit.parameters}
        self.op_heights: list[int] = []
        self.value_heights: list[int] = [0] * len(trace.values)
        self.obstacles: dict[int, str] = {}
        self.costs = [0.0] * len(self.units)
        self.nbytes = [0] * (len(self.units) + 1)
        if self.units:
            self._measure_heights()
            self._forbid_cuts_inside()
            self._measure_crossings()
            for name, parameter in trace.parameters.items():
                if parameter.requires_grad and name in self.unit_of:
                    self.costs[self.unit_of[name]] += _PER_PARAMETER_BYTE * parameter.nbytes

    @property
    def possible(self) -> list[int]:
        """The cuts that nothing forbids."""
        return [c for c in range(1, len(self.units)) if c not in self.obstacles]

    def call_span(self, call: int) -> tuple[int, int]:
        """Lowest and highest height inside ``call``; ``(1, 0)`` if it touches no value."""
        heights = [self.op_heights[op] for op in self.trace.calls[call].ops]
        return (min(heights), max(heights)) if heights else (1, 0)

    def _measure_heights(self) -> None:
        trace, last = self.trace, len(self.units) - 1
        for op in trace.ops:
            inputs = max((self.value_heights[v] for v in op.inputs), default=0)
            for name in op.parameters:
                for cut in range(self.unit_of[name] + 1, inputs + 1):
                    self.obstacles.setdefault(cut, self._backwards(name, op.call))
            height = max([inputs] + [self.unit_of[name] for name in op.parameters])
            if op.name == "read" and trace.stopped is not None:
                height = last
            self.op_heights.append(height)
            self.costs[height] += (1 + _BACKWARD) * (op.flops + _PER_BYTE * op.nbytes)
            for v in op.outputs:
                self.value_heights[v] = height

    def _backwards(self, name: str, call: int) -> str:
        first = self.trace.calls[self.units[self.unit_of[name]].call].path
        again = self.trace.calls[call].path
        if first == again:
            return (
                f"`{first or 'the step'}` is called again after later modules have run, so a value would have to travel"
                f" back to the stage of its parameter `{name}`"
            )
        return (
            f"the parameter `{name}` is used by `{first or 'the step'}` and again by `{again or 'the step'}` after"
            " later modules have run; a parameter on two stages is not supported yet, so untie them (for Hugging Face"
            " models: `tie_word_embeddings=False`; where that is not enough, give the head a weight of its own)"
        )

    def _measure_crossings(self) -> None:
        trace, heights = self.trace, self.value_heights
        spans = [self.call_span(call) for call in range(len(trace.calls))]
        first_use: list[dict[int, float]] = [{} for _ in range(len(self.units))]  # at each cut: value -> time
        for op, op_height in zip(trace.ops, self.op_heights):
            for v in op.inputs:
                for cut in range(heights[v] + 1, op_height + 1):
                    first_use[cut].setdefault(v, op.time)
        for cut in range(1, len(self.units)):
            crossing = values_to_send(
                trace,
                first_use[cut],
                lambda v, cut=cut: heights[v] < cut,  # type: ignore[misc]
                lambda call, cut=cut: _straddles(spans, call, cut),  # type: ignore[misc]
                {v: time for v, time in trace.wanted.items() if heights[v] < cut},
            )
            self.nbytes[cut] = sum(trace.values[v].nbytes for v in crossing.appearances)
            if crossing.obstacle is not None:
                maker = trace.ops[trace.values[crossing.obstacle].op]
                where = trace.calls[maker.call].path if maker.call >= 0 else ""
                self.obstacles.setdefault(
                    cut,
                    f"a result of `{maker.name}` in `{where or 'the step'}` would cross it, which is neither an"
                    " argument nor an output of a module call there",
                )

    def _forbid_cuts_inside(self) -> None:
        for index, call in enumerate(self.trace.calls):
            if call.is_hooked:
                where = f"`{call.path or 'the step'}`, whose backward hooks need all of it on one stage"
                self._forbid(*self.call_span(index), f"it lies in {where}")
        spans: dict[int, tuple[int, int]] = {}
        for op, height in zip(self.trace.ops, self.op_heights):
            if op.checkpoint is not None:
                low, high = spans.get(op.checkpoint, (height, height))
                spans[op.checkpoint] = min(low, height), max(high, height)
        for low, high in spans.values():
            self._forbid(low, high, "it lies in a function of `torch.utils.checkpoint`, which runs again as a whole")

    def _forbid(self, low: int, high: int, reason: str) -> None:
        for cut in range(low + 1, high + 1):
            self.obstacles.setdefault(cut, reason)


def stage_cost(cuts: Cuts, start: int, end: int) -> float:
    """Cost of a stage that holds ``units[start:end]``: its work and what it receives and sends."""
    return sum(cuts.costs[start:end]) + _PER_SENT_BYTE * (cuts.nbytes[start] + cuts.nbytes[end])


def choose_cuts(cuts: Cuts, num_stages: int) -> list[int]:
    """The ``num_stages - 1`` possible cuts for which the slowest stage is fastest.

    Exact dynamic programming over the possible cuts: ``best[k][c]`` is the least cost of the slowest among ``k`` stages
    that hold the units below ``c``.
    """
    ends = [0, *cuts.possible, len(cuts.units)]
    if num_stages > len(ends) - 1:
        reasons = "; ".join(f"{reason} [{count} places]" for reason, count in _common(cuts.obstacles.values()))
        stopped = f" The step could be read only up to a point: {cuts.trace.stopped}." if cuts.trace.stopped else ""
        raise PlanError(
            f"`num_stages={num_stages}` needs {num_stages - 1} cuts, but `training_step` can be cut in"
            f" {len(ends) - 2} places.{stopped} Use at most {len(ends) - 1} stage{'s' * (len(ends) > 2)}, or change the"
            " model." + (f" Elsewhere it cannot be cut because {reasons}." if reasons else "")
        )
    total = [0.0, *accumulate(cuts.costs)]

    def cost(i: int, j: int) -> float:
        start, end = ends[i], ends[j]
        return total[end] - total[start] + _PER_SENT_BYTE * (cuts.nbytes[start] + cuts.nbytes[end])

    best = [[math.inf] * len(ends) for _ in range(num_stages + 1)]
    origin = [[0] * len(ends) for _ in range(num_stages + 1)]
    best[0][0] = 0.0
    for k in range(1, num_stages + 1):
        for j in range(k, len(ends)):
            for i in range(k - 1, j):
                slowest = max(best[k - 1][i], cost(i, j))
                if slowest < best[k][j]:
                    best[k][j], origin[k][j] = slowest, i
    chosen: list[int] = []
    j = len(ends) - 1
    for k in range(num_stages, 0, -1):
        j = origin[k][j]
        chosen.append(ends[j])
    return chosen[::-1][1:]


def _units(trace: Trace) -> list[Unit]:
    parent: dict[str, str] = {}
    first: dict[str, int] = {}

    def find(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for op in trace.ops:
        for name in op.parameters:
            if name not in parent:
                parent[name] = name
                first[name] = op.call
        for name in op.parameters[1:]:
            a, b = find(op.parameters[0]), find(name)
            order = list(parent)
            if order.index(a) > order.index(b):
                a, b = b, a
            parent[b] = a
    members: dict[str, list[str]] = {}
    for name in parent:
        members.setdefault(find(name), []).append(name)
    return [Unit(tuple(names), first[root]) for root, names in members.items()]


def _straddles(spans: Sequence[tuple[int, int]], call: int, cut: int) -> bool:
    return call < 0 or spans[call][0] < cut <= spans[call][1]


def _common(reasons: object) -> list[tuple[str, int]]:
    from collections import Counter

    return Counter(reasons).most_common(3)  # type: ignore[call-overload, no-any-return]
