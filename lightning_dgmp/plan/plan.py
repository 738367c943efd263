"""The plan: which stage owns what, and which values travel."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from torch import nn

from lightning_dgmp.plan.crossing import changed_by, overwritten_on, values_to_send
from lightning_dgmp.plan.cut import Cuts, PlanError, cuts_before
from lightning_dgmp.plan.limit import cuts_that_fit
from lightning_dgmp.plan.memory import Budget, Parts, Sizes
from lightning_dgmp.plan.record import Trace
from lightning_dgmp.plan.table import StageSummary, table_of
from lightning_dgmp.schedule import delays_of

__all__ = ["Event", "Plan", "Transfer", "make_evaluation_plan", "make_plan"]


class Event(NamedTuple):
    """A moment that all stages recognise without a message: the start or the end of the n-th call of a module."""

    path: str
    occurrence: int
    kind: str  # "arg": its arguments are known; "out": its outputs are known


@dataclass(frozen=True)
class Transfer:
    """A value that travels from one stage to a later one: leaf ``leaf`` of what ``event`` shows."""

    source: int
    target: int
    event: Event
    leaf: int
    nbytes: int


class Plan:
    """How a model is divided among stages. Equal on all ranks.

    Attributes:
        num_stages: How many stages there are.
        modules: The stage that runs the calls of a module, by its path; ``None`` if they must be entered because parts
            of them belong to different stages, or to all.
        visible: The modules of which a call is seen from outside of any module that one stage runs as a whole.
        transfers: What travels in every step, in order.
        last_events: For each stage the last moment of the step that concerns it; ``None``: the step's end.
        runs_on: The stages that run a step to its end, without computing, because it keeps something after their
            last event. A stage's own affair, which others need not agree on: code for rank 0 keeps things on rank 0.
        toggled: Attributes of modules, by path and name, that the step changes and changes back.
        overwritten: The stages that see how a later one writes in place into a value of theirs.
        stopped: Where and why the trace of the step ended before its end, if it did.
        num_guessed: How many parameters follow then, by which the rest of the computation is guessed.
        calls: The same for single calls, by path and occurrence, of modules with shared parameters whose calls differ;
            their first call stands in ``modules``.
        stages: One summary a stage.
        delays: How many iterations later than its forward a batch's backward runs on each stage.
        bounds: Where each stage begins and the last one ends among the units of the trace; empty for evaluation.
    """

    def __init__(
        self,
        parameters: dict[str, tuple[int, ...]],
        modules: dict[str, int | None],
        visible: set[str],
        transfers: list[Transfer],
        last_events: list[Event | None],
        stages: list[StageSummary],
        toggled: Sequence[tuple[str, str]] = (),
        runs_on: Set[int] = frozenset(),
        calls: Mapping[tuple[str, int], int | None] = {},
        slack: int = 0,
        bounds: Sequence[int] = (),
        overwritten: Set[int] = frozenset(),
        stopped: str | None = None,
        num_guessed: int = 0,
    ) -> None:
        self.num_stages = len(stages)
        self.delays, self.bounds = delays_of(self.num_stages, slack), list(bounds)
        self.modules = modules
        self.calls = calls
        self.visible = visible
        self.transfers = transfers
        self.last_events = last_events
        self.toggled = list(toggled)
        self.runs_on = runs_on
        self.overwritten, self.stopped, self.num_guessed = overwritten, stopped, num_guessed
        self.stages = stages
        self._parameters = parameters

    def owner(self, path: str, occurrence: int) -> int | None:
        """The stage that runs a call of a module; ``None`` if it must be entered."""
        return self.calls.get((path, occurrence), self.modules.get(path))

    def stage_of(self, parameter_name: str) -> tuple[int, ...]:
        """The stages on which a parameter lives, several if it is shared; the first of them is its *home*.

        Args:
            parameter_name: As in ``named_parameters()`` of the LightningModule.

        Raises:
            KeyError: If the model has no such parameter.
        """
        return self._parameters[parameter_name]

    def why_missing(self) -> str:
        """What may be the matter with a step that lacks a value, for messages."""
        cure = "make its module calls the same for all batches, or let the one with most calls come first (the longest)"
        if self.stopped is None:
            return (
                f"The step ran differently from the first batch, on which the plan was made: {cure}, or choose other"
                " cuts with `split_at`"
            )
        return (
            "A step may call only modules of the last stage after it has read a value, and the plan knows what the"
            f" first batch did before: {self.stopped}. Read values after the last call of the network, or name the"
            f" first module that is called again after that, as in a loop, in `split_at`; else {cure}"
        )

    @property
    def shared(self) -> dict[str, tuple[int, ...]]:
        """The parameters that live on several stages, with these."""
        return {name: stages for name, stages in self._parameters.items() if len(stages) > 1}

    def edges(self) -> list[tuple[int, int]]:
        """Pairs of stages that exchange messages: neighbours always, others where a value or gradient skips stages."""
        neighbours = {(k, k + 1) for k in range(self.num_stages - 1)}
        shared = {pair for stages in self.shared.values() for pair in pairwise(stages)}
        return sorted(neighbours | shared | {(t.source, t.target) for t in self.transfers})

    def digest(self) -> str:
        """A fingerprint, to check that all ranks made the same plan."""
        owners = [sorted(d.items(), key=str) for d in (self._parameters, self.modules, self.calls)]
        content = repr((self.delays, owners, sorted(self.visible), self.transfers, self.last_events))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def table(self) -> str:
        """The plan as text: one row a stage."""
        guess = f"of the last stage {self.num_guessed:,} parameters follow a read, so its compute is a guess"
        return table_of(self.stages, self.shared, [f"{guess}: {self.stopped}"] if self.num_guessed else [])

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_stages={self.num_stages})\n{self.table()}"


def make_plan(
    trace: Trace,
    root: nn.Module,
    num_stages: int,
    split_at: Sequence[str] | None = None,
    slack: int = 0,
    costs: Sequence[float] | None = None,
    budget: Budget | None = None,
) -> Plan:
    """Divide what ``trace`` shows among ``num_stages`` stages.

    Args:
        trace: Of the step to be divided.
        root: The module that was traced.
        num_stages: How many stages to make.
        split_at: Paths of the modules with which the stages 1, 2, ... begin; by default the best ones are found.
        slack: How many batches more than necessary are in flight between neighbours.
        costs: Of each unit of the trace, if they are better known than from the trace.
        budget: What a stage may hold, and what decides how much it does.

    Raises:
        PlanError: If the step cannot be divided so, or if stages would hold too much.
    """
    if trace.returned_none:
        raise PlanError(
            "`training_step` must return a loss on every batch, but it returned None. The stages work on several"
            " batches at once and cannot skip one: return a loss, for example multiplied by zero."
        )
    cuts = Cuts(trace)
    if not cuts.units:
        raise PlanError(
            "`training_step` must use parameters of the LightningModule, but it uses none"
            + (f" before the point where the trace stopped: {trace.stopped}." if trace.stopped else ".")
            + " Move the reading of values behind the network."
        )
    if costs is not None:
        cuts.costs = list(costs)
    parts = Parts(cuts, budget or Budget())
    given = None if split_at is None else cuts_before(cuts, root, num_stages, list(split_at))
    positions = cuts_that_fit(parts, given, num_stages, slack)

    def stage(height: int) -> int:
        return bisect_right(positions, height)

    bounds = [0, *positions, len(cuts.units)]
    return _lay_out(
        trace,
        root,
        [stage(height) for height in cuts.op_heights],
        [stage(height) for height in cuts.value_heights],
        {
            name: tuple(sorted({stage(unit) for unit in cuts.units_of.get(name, [len(cuts.units)])}))
            for name in trace.parameters
        },
        [sum(cuts.costs[a:b]) for a, b in pairwise(bounds)],
        slack,
        bounds,
        [parts.sizes(a, b) for a, b in pairwise(bounds)],
    )


def make_evaluation_plan(trace: Trace, root: nn.Module, training: Plan) -> Plan:
    """Divide what ``trace`` shows as the parameters are divided already.

    Args:
        trace: Of a step without a backward.
        root: The module that was traced.
        training: Says where each parameter is.

    Raises:
        PlanError: If a value would have to travel back.
    """
    last = training.num_stages - 1
    value_stages = [0] * len(trace.values)
    op_stages: list[int] = []
    for op, sources in zip(trace.ops, trace.sources()):
        stage = last if op.time >= trace.read_at else max((value_stages[v] for v in sources), default=0)
        homes = {name: training.stage_of(name) for name in op.parameters}
        stage = max([stage, *(min((k for k in stages if k >= stage), default=stages[-1]) for stages in homes.values())])
        for name, stages in homes.items():
            if stage not in stages:
                raise PlanError(
                    f"`{trace.calls[op.call].path if op.call >= 0 else 'the step'}` uses `{name}` of stage"
                    f" {stages[-1]} after stage {stage}, so a value would have to travel back"
                )
        op_stages.append(stage)
        for v in op.outputs:
            value_stages[v] = stage
    parameters = {name: training.stage_of(name) for name in trace.parameters}
    costs = [0.0] * training.num_stages
    return _lay_out(trace, root, op_stages, value_stages, parameters, costs)


def _lay_out(
    trace: Trace,
    root: nn.Module,
    op_stages: list[int],
    value_stages: list[int],
    parameters: dict[str, tuple[int, ...]],
    costs: list[float],
    slack: int = 0,
    bounds: Sequence[int] = (),
    sizes: Sequence[Sizes] = (),
) -> Plan:
    num_stages = len(costs)
    modules, owners = _owners(trace, root, op_stages, parameters)
    visible = _visible_calls(trace, owners)
    transfers, times = _transfers(trace, op_stages, value_stages, visible, owners, num_stages - 1)

    # A stage is done after its last own call and the last value that it sends.
    latest: list[tuple[int, Event | None]] = [(-1, None)] * num_stages
    for index, call in enumerate(trace.calls):
        if index in visible and (owner := owners[index]) is not None and call.ops:
            last_event = Event(call.path, visible[index], "out")
            latest[owner] = max(latest[owner], (call.end, last_event), key=lambda x: x[0])
    for transfer, time in zip(transfers, times):
        latest[transfer.source] = max(latest[transfer.source], (time, transfer.event), key=lambda x: x[0])
    last_events = [event for _, event in latest[:-1]] + [None]
    entered = {-1} | {i for i in visible if owners[i] is None}
    runs_on = {
        k
        for k, (end, _) in enumerate(latest[:-1])
        for time, call, value in trace.touched
        if time > end and call in entered and (value is None or value_stages[value] == k)
    }

    held = [[trace.parameters[name] for name, stages in parameters.items() if k in stages] for k in range(num_stages)]
    summaries = []
    for k in range(num_stages):
        own = [trace.calls[i].path for i in sorted(visible) if owners[i] == k and trace.calls[i].ops]
        own = own or [name for name, stages in parameters.items() if k in stages] or ["-"]
        summaries.append(
            StageSummary(
                own[0],
                own[-1],
                costs[k],
                sum(p.numel for p in held[k]),
                sum(t.nbytes for t in transfers if t.source == k),
                sizes[k] if sizes else Sizes(),
            )
        )
    paths = {trace.calls[i].path for i in visible}
    calls = {
        (path, occurrence): owners[index]
        for index, occurrence in visible.items()
        if owners[index] != modules[path := trace.calls[index].path]
    }
    more = trace.toggled, runs_on, calls, slack, bounds, overwritten_on(trace, op_stages)
    rest = trace.stopped, trace.num_guessed
    return Plan(parameters, modules, paths, transfers, last_events, summaries, *more, *rest)


def _owners(
    trace: Trace, root: nn.Module, op_stages: list[int], parameters: dict[str, tuple[int, ...]]
) -> tuple[dict[str, int | None], list[int | None]]:
    """The stage of each module and of each call."""
    names = {id(p): name for name, p in root.named_parameters()}
    own: dict[str, list[tuple[int, ...]]] = {
        path: [parameters[names[id(p)]] for p in module.parameters()] for path, module in root.named_modules()
    }
    ran: dict[str, set[int]] = {}
    for call in trace.calls:
        ran.setdefault(call.path, set()).update(op_stages[op] for op in call.ops)

    def together(stages: set[int]) -> int | None:
        return stages.pop() if len(stages) == 1 else None

    modules = {
        path: together(ran.get(path, set()) | {stages[0] for stages in of_parameters})
        for path, of_parameters in own.items()
    }
    owners: list[int | None] = []
    first: dict[str, int | None] = {}
    for call in trace.calls:
        if all(len(stages) == 1 for stages in own[call.path]):
            owners.append(modules[call.path])
        else:
            single = {stages[0] for stages in own[call.path] if len(stages) == 1}
            owners.append(together({op_stages[op] for op in call.ops} | single))
            first.setdefault(call.path, owners[-1])
    return modules | first, owners


def _visible_calls(trace: Trace, owners: list[int | None]) -> dict[int, int]:
    """Calls that every stage sees, because every call around them is entered, and how many of the same come before."""
    visible: dict[int, int] = {}
    counts: Counter[str] = Counter()
    for index, call in enumerate(trace.calls):
        if call.parent < 0 or (call.parent in visible and owners[call.parent] is None):
            visible[index] = counts[call.path]
            counts[call.path] += 1
    return visible


def _transfers(
    trace: Trace,
    op_stages: list[int],
    value_stages: list[int],
    visible: dict[int, int],
    owners: list[int | None],
    last: int,
) -> tuple[list[Transfer], list[int]]:
    changed = changed_by(trace, op_stages)
    first_use: dict[int, dict[int, float]] = {}  # stage -> value -> time
    for op, op_stage in zip(trace.ops, op_stages):
        for v in op.inputs:
            if (writer := changed(v, op.time)) > value_stages[v]:  # only in evaluation, since no cut allows it
                maker = trace.ops[trace.values[v].op].name
                raise PlanError(
                    f"A result of `{maker}` on stage {value_stages[v]}, which `{op.name}` takes, is changed in place on"
                    f" stage {writer}: build a new tensor, as by `x = x + y` instead of `x += y`."
                )
            if op_stage > value_stages[v]:
                first_use.setdefault(op_stage, {}).setdefault(v, min(op.time, trace.read_at))
    first_use.setdefault(last, {})
    found: list[tuple[int, Transfer]] = []
    for target, uses in first_use.items():
        appearances, obstacle = values_to_send(
            trace,
            uses,
            lambda v, target=target: value_stages[v] != target,  # type: ignore[misc]
            lambda call: call < 0 or (call in visible and owners[call] is None),
            {v: time for v, time in trace.wanted.items() if changed(v, time) <= value_stages[v] < last}
            if target == last
            else {},
        )
        if obstacle is not None:
            value = trace.values[obstacle]
            raise PlanError(
                f"A result of `{trace.ops[value.op].name}` would have to travel from stage {value_stages[obstacle]} to"
                f" stage {target} without being an argument or an output of a module call. Choose other cuts with"
                " `split_at`."
            )
        for v, seen in appearances.items():
            call, value = trace.calls[seen.call], trace.values[v]
            event = Event(call.path, visible[seen.call], seen.kind)
            transfer = Transfer(value_stages[v], target, event, seen.leaf, value.nbytes)
            found.append((seen.time, transfer))
    found.sort(key=lambda item: (item[0], item[1].target))
    return [transfer for _, transfer in found], [time for time, _ in found]
