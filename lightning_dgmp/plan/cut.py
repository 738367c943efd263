"""Where a traced step can be cut, what that costs, and which cuts are best.

Parameters are ordered by their first use; those that one operation uses together form a *unit*. A cut before unit ``c``
gives the units below ``c`` to earlier stages. An operation runs on the latest stage among its parameters and inputs, so
with ``height(op) = max(unit of its parameters, heights of its inputs)`` it is late for the cut ``c`` exactly if
``height(op) >= c``: the heights are computed once and answer for every cut.

A parameter that is used again after later ones is *shared*: what follows counts as a use of another parameter, in a
unit of its own, and every stage that has a use of it holds a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import nn

from lightning_dgmp.plan.crossing import changed_by, values_to_send
from lightning_dgmp.plan.record import Trace

__all__ = ["Cuts", "PlanError", "Unit", "choose_cuts", "cuts_before", "stage_cost"]

# Cost is counted in floating point operations. A byte that an operation moves, a byte of a parameter that the optimizer
# updates and a byte that crosses a cut are worth this many of them: figures of a CPU core or an accelerator of today,
# which differ less in these ratios than in speed.
_PER_BYTE = 8
_PER_PARAMETER_BYTE = 20
_PER_SENT_BYTE = 16
_BACKWARD = 2  # a backward costs about two forwards
_MAX_USES = 100  # of one parameter in units of their own

_Use = tuple[str, int]  # a parameter, and how many of its units come before


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
        units_of: The units that use a parameter, in order.
        costs: Forward, backward and update of each unit and of what runs with it.
        nbytes: What crosses each cut, in bytes.
        obstacles: Why a cut is impossible; no entry if it is possible.
        op_heights: Of each operation of the trace.
        value_heights: Of each value of the trace.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._sources = trace.sources()
        self._uses: list[tuple[_Use, ...]] = [tuple((name, 0) for name in op.parameters) for op in trace.ops]
        while again := self._used_again():
            for name, first in again.items():
                for op in range(first, len(trace.ops)):
                    self._uses[op] = tuple((n, i + (n == name)) for n, i in self._uses[op])
        self.units, self._unit_of = _units(trace, self._uses)
        self.units_of: dict[str, list[int]] = {}
        for (name, _), unit in self._unit_of.items():
            if unit not in self.units_of.setdefault(name, []):
                self.units_of[name].append(unit)
        self.op_heights: list[int] = []
        self.value_heights: list[int] = [0] * len(trace.values)
        self.obstacles: dict[int, str] = {}
        self.costs = [0.0] * len(self.units)
        self.nbytes = [0] * (len(self.units) + 1)
        if self.units:
            self._measure_heights()
            self._forbid_cuts_inside()
            self._measure_crossings()
            for name, units in self.units_of.items():
                parameter = trace.parameters[name]
                for unit in units if parameter.requires_grad else []:
                    self.costs[unit] += _PER_PARAMETER_BYTE * parameter.nbytes
                for cut in range(units[0] + 1, units[-1] + 1):
                    self.nbytes[cut] += 2 * parameter.nbytes  # its gradient, and what becomes of it

    @property
    def possible(self) -> list[int]:
        """The cuts that nothing forbids."""
        return [c for c in range(1, len(self.units)) if c not in self.obstacles]

    def call_span(self, call: int) -> tuple[int, int]:
        """Lowest and highest height inside ``call``; ``(1, 0)`` if it touches no value."""
        heights = [self.op_heights[op] for op in self.trace.calls[call].ops]
        return (min(heights), max(heights)) if heights else (1, 0)

    def first_unit(self, call: int) -> int | None:
        """The first unit that is used inside ``call``; ``None`` if no parameter is."""
        uses = (use for op in self.trace.calls[call].ops for use in self._uses[op])
        return min((self._unit_of[use] for use in uses), default=None)

    def begins_inside(self, unit: int, call: int) -> bool:
        """Whether a unit is used first inside of ``call``."""
        inner = self.units[unit].call
        while inner >= 0 and inner != call:
            inner = self.trace.calls[inner].parent
        return inner == call

    def _used_again(self) -> dict[str, int]:
        """The parameters that are used after later ones, and the first operation that does so."""
        _, unit_of = _units(self.trace, self._uses)
        heights: list[int] = [0] * len(self.trace.values)
        again: dict[str, int] = {}
        for index, (op, uses) in enumerate(zip(self.trace.ops, self._uses)):
            inputs = max((heights[v] for v in self._sources[index]), default=0)
            for name, count in uses if op.time < self.trace.read_at else ():
                if unit_of[name, count] < inputs and count < _MAX_USES:
                    again.setdefault(name, index)
            height = max([inputs] + [unit_of[use] for use in uses])
            for v in op.outputs:
                heights[v] = height
        return again

    def _measure_heights(self) -> None:
        trace, last = self.trace, len(self.units) - 1
        for op, uses, sources in zip(trace.ops, self._uses, self._sources):
            is_last = op.time >= trace.read_at
            inputs = last if is_last else max((self.value_heights[v] for v in sources), default=0)
            for use in uses:
                reason = "after a value was read" if is_last else f"and again, more than {_MAX_USES} times"
                self._forbid(self._unit_of[use], inputs, f"the parameter `{use[0]}` is used again {reason}")
            height = max([inputs] + [self._unit_of[use] for use in uses])
            self.op_heights.append(height)
            self.costs[height] += (1 + _BACKWARD) * (op.flops + _PER_BYTE * op.nbytes)
            for v in op.outputs:
                self.value_heights[v] = height

    def _measure_crossings(self) -> None:
        trace, heights = self.trace, self.value_heights
        spans = [self.call_span(call) for call in range(len(trace.calls))]
        changed = changed_by(trace, self.op_heights)
        first_use: list[dict[int, float]] = [{} for _ in range(len(self.units))]  # at each cut: value -> time
        for op, op_height in zip(trace.ops, self.op_heights):
            for v in op.inputs:
                for cut in range(heights[v] + 1, op_height + 1):
                    first_use[cut].setdefault(v, min(op.time, trace.read_at))
                for cut in range(heights[v] + 1, changed(v, op.time) + 1):
                    made_by = trace.ops[trace.values[v].op].name
                    self.obstacles.setdefault(
                        cut,
                        f"a result of `{made_by}` before it, which `{op.name}` takes, is changed in place behind it",
                    )
        for cut in range(1, len(self.units)):
            crossing = values_to_send(
                trace,
                first_use[cut],
                lambda v, cut=cut: heights[v] < cut,  # type: ignore[misc]
                lambda call, cut=cut: _straddles(spans, call, cut),  # type: ignore[misc]
                {v: time for v, time in trace.wanted.items() if heights[v] < cut and changed(v, time) < cut},
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
        reached: dict[str, int] = {}  # by calls of modules that change their buffers
        for index, call in enumerate(self.trace.calls):
            if call.has_state and call.ops:
                low, high = self.call_span(index)
                between = f"it lies between calls of `{call.path}`, which changes its buffers"
                self._forbid(reached.get(call.path, low), low, between)
                reached[call.path] = max(high, reached.get(call.path, high))
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


def choose_cuts(
    cuts: Cuts,
    num_stages: int,
    cost: Callable[[int, int, int], float] | None = None,
    fits: Callable[[int, int, int], bool] = lambda *_: True,
) -> list[int] | None:
    """The ``num_stages - 1`` possible cuts for which the slowest stage is fastest; ``None`` if none fit.

    Exact dynamic programming over the possible cuts: ``best[k][c]`` is the least cost of the slowest among ``k`` stages
    that hold the units below ``c``.

    Args:
        cuts: Those of the trace.
        num_stages: How many stages to make.
        cost: Of the stage ``k`` that holds ``units[start:end]``, as ``cost(start, end, k)``; by default its time.
        fits: In the same way, whether there can be such a stage.

    Raises:
        PlanError: If there are too few possible cuts.
    """
    ends = [0, *cuts.possible, len(cuts.units)]
    if num_stages < 1:
        raise PlanError(f"`num_stages` must be at least 1, but is {num_stages}.")
    if num_stages > len(ends) - 1:
        reasons = "; ".join(
            f"{reason} [{count} place{'s' * (count > 1)}]" for reason, count in _common(cuts.obstacles.values())
        )
        raise PlanError(
            f"`num_stages={num_stages}` needs {num_stages - 1} cuts, but `training_step` can be cut in"
            f" {len(ends) - 2} places.{_about_read(cuts.trace)} Use at most {len(ends) - 1}"
            f" stage{'s' * (len(ends) > 2)}, or change the model."
            + (f" Elsewhere it cannot be cut because {reasons}." if reasons else "")
        )
    total = [0.0, *accumulate(cuts.costs)]

    def time(start: int, end: int, stage: int) -> float:
        return total[end] - total[start] + _PER_SENT_BYTE * (cuts.nbytes[start] + cuts.nbytes[end])

    cost = time if cost is None else cost

    best = [[math.inf] * len(ends) for _ in range(num_stages + 1)]
    origin = [[0] * len(ends) for _ in range(num_stages + 1)]
    best[0][0] = 0.0
    for k in range(1, num_stages + 1):
        for j in range(k, len(ends)):
            for i in range(k - 1, j):
                if best[k - 1][i] >= best[k][j]:
                    continue
                stage = ends[i], ends[j], k - 1
                slowest = max(best[k - 1][i], cost(*stage))
                if slowest < best[k][j] and fits(*stage):
                    best[k][j], origin[k][j] = slowest, i
    if best[num_stages][-1] == math.inf:
        return None
    chosen: list[int] = []
    j = len(ends) - 1
    for k in range(num_stages, 0, -1):
        j = origin[k][j]
        chosen.append(ends[j])
    return chosen[::-1][1:]


def cuts_before(cuts: Cuts, root: nn.Module, num_stages: int, split_at: list[str]) -> list[int]:
    """The ``num_stages - 1`` cuts before modules of ``root`` that the user names.

    Raises:
        PlanError: If they are not as many, not modules with parameters in order, or if there cannot be a cut.
    """
    if len(split_at) != num_stages - 1:
        raise PlanError(
            f"`split_at` must name the first module of each stage but the first, {num_stages - 1} for"
            f" `num_stages={num_stages}`, but it has {len(split_at)}: {split_at}."
        )
    known = {path for path, _ in root.named_modules()}
    positions: list[int] = []
    for path in split_at:
        if path not in known:
            near = [name for name in sorted(known) if name.endswith(path.rsplit(".", 1)[-1])][:5]
            raise PlanError(
                f"`split_at` must name modules of the LightningModule, but it has no `{path}`."
                + (f" Did you mean one of {near}?" if near else " See `named_modules()`.")
            )
        call = next((i for i, c in enumerate(cuts.trace.calls) if c.path == path), None)
        if call is None:
            raise PlanError(
                f"`split_at` must name modules that `training_step` calls, but it does not call `{path}`."
                f"{_about_read(cuts.trace)} Name a module inside it, or the one that contains it."
            )
        position = cuts.first_unit(call)
        if position is None:
            raise PlanError(
                f"`split_at` must name modules with parameters, but `{path}` has none. Name the module after it."
            )
        if not cuts.begins_inside(position, call):
            together = ", ".join(f"`{name}`" for name in cuts.units[position].parameters)
            where = cuts.units[position].call
            earlier = cuts.trace.calls[where].path if where >= 0 else "training_step"
            raise PlanError(
                f"`split_at` names `{path}`, but the step cannot be cut there: it uses {together} together with"
                f" `{earlier}`, which comes right before it. Name another module."
            )
        if position == 0:
            raise PlanError(
                f"`split_at` names `{path}`, but it is the first module with parameters: nothing is before it."
            )
        if positions and position <= positions[-1]:
            raise PlanError(
                f"`split_at` must follow the order in which modules are first called, but `{path}` is not after"
                f" `{split_at[len(positions) - 1]}`. Reorder it."
            )
        if position in cuts.obstacles:
            raise PlanError(
                f"`split_at` names `{path}`, but the step cannot be cut there: {cuts.obstacles[position]}."
                f"{_about_read(cuts.trace)}"
            )
        positions.append(position)
    return positions


def _about_read(trace: Trace) -> str:
    return "" if trace.read is None else f" What comes after a value is read belongs to the last stage: {trace.read}."


def _units(trace: Trace, uses: Sequence[tuple[_Use, ...]]) -> tuple[list[Unit], dict[_Use, int]]:
    parent: dict[_Use, _Use] = {}
    first: dict[_Use, int] = {}
    order: dict[_Use, int] = {}

    def find(use: _Use) -> _Use:
        while parent[use] != use:
            use = parent[use]
        return use

    for op, used in zip(trace.ops, uses):
        for use in used:
            if use not in parent:
                parent[use] = use
                first[use], order[use] = op.call, len(order)
        for use in used[1:]:
            a, b = sorted((find(used[0]), find(use)), key=order.__getitem__)
            parent[b] = a
    members: dict[_Use, list[_Use]] = {}
    for use in parent:
        members.setdefault(find(use), []).append(use)
    units = [Unit(tuple(name for name, _ in together), first[root]) for root, together in members.items()]
    return units, {use: unit for unit, together in enumerate(members.values()) for use in together}


def _straddles(spans: Sequence[tuple[int, int]], call: int, cut: int) -> bool:
    return call < 0 or spans[call][0] < cut <= spans[call][1]


def _common(reasons: object) -> list[tuple[str, int]]:
    from collections import Counter

    return Counter(reasons).most_common(3)  # type: ignore[call-overload, no-any-return]
