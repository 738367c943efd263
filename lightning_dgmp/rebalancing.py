"""Cuts by measured times: floating point operations are a guess at what takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_dgmp.calls import ParameterSlots
from lightning_dgmp.ghost import Ghost, realised
from lightning_dgmp.learned import Key, attributes_in, is_plain, put_attributes
from lightning_dgmp.nests import is_same, marks, tensors_in
from lightning_dgmp.plan.cut import Cuts, stage_cost
from lightning_dgmp.plan.memory import Budget
from lightning_dgmp.plan.plan import Plan, make_plan
from lightning_dgmp.plan.record import Trace
from lightning_dgmp.stage.shadow import Shadow, restore
from lightning_dgmp.timing import Span
from lightning_dgmp.world import World

__all__ = ["MIN_BATCHES", "KeptState", "Measurement", "better_plan", "busy_in", "move_parameters", "wait_for_device"]

_GAIN = 0.05  # of the slowest stage's time, for which it is worth to move
MIN_BATCHES = 8  # to be measured
_INSIDE = ("wait_activation", "wait_error", "wait_send")  # of what is measured


class Measurement(NamedTuple):
    """What one stage has measured of itself.

    Attributes:
        busy: Seconds a batch, without waiting; ``None`` if it has seen too few.
        calls: Seconds of the forward calls of its modules, by path.
    """

    busy: float | None
    calls: dict[str, float]


def busy_in(spans: Iterable[Span], first_batch: int) -> float | None:
    """The seconds in which a stage computes for a batch, of those from ``first_batch`` on; ``None`` for too few."""
    counted = [span for span in spans if span.batch >= first_batch]
    num_batches = sum(span.kind == "forward" for span in counted)
    if num_batches < MIN_BATCHES:
        return None
    signs = {"forward": 1, "backward": 1, "update": 1, **dict.fromkeys(_INSIDE, -1)}
    return sum(signs.get(span.kind, 0) * (span.end - span.start) for span in counted) / num_batches


def wait_for_device(device: torch.device) -> None:
    """While times are measured: until what has been asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def better_plan(
    trace: Trace,
    root: nn.Module,
    plan: Plan,
    measured: Sequence[Measurement],
    slack: int = 0,
    budget: Budget | None = None,
) -> tuple[Plan, float] | None:
    """The best plan by what was measured, and by how much its slowest stage is faster; ``None`` if it is not worth it.

    Args:
        trace: From which ``plan`` was made.
        root: The module that was traced.
        plan: With which the stages were measured.
        measured: By each of them.
        slack: As for ``plan``.
        budget: As for ``plan``.
    """
    busy = [one.busy for one in measured]
    if any(seconds is None or seconds <= 0 for seconds in busy):
        return None
    cuts = Cuts(trace)
    costs = _costs(cuts, plan, [float(seconds or 0) for seconds in busy], measured)
    new = make_plan(trace, root, plan.num_stages, None, slack, costs, budget)
    cuts.costs = costs
    old_slowest, new_slowest = (
        max(stage_cost(cuts, a, b) for a, b in pairwise(bounds)) for bounds in (plan.bounds, new.bounds)
    )
    gain = 1 - new_slowest / old_slowest
    return (new, gain) if gain > _GAIN else None


def _costs(cuts: Cuts, plan: Plan, busy: Sequence[float], measured: Sequence[Measurement]) -> list[float]:
    """The costs of the units, such that those of each stage add up to what it has measured.

    Inside of a stage they are in proportion to the time of the calls that they belong to. The unit of the result is
    that of the trace, so that costs of messages stay in proportion.
    """
    scale = sum(cuts.costs) / sum(busy)
    costs = list(cuts.costs)
    for (begin, end), seconds, one in zip(pairwise(plan.bounds), busy, measured):
        paths = [_measured_path(cuts.trace, cuts.units[unit].call, one.calls) for unit in range(begin, end)]
        guessed: dict[str | None, float] = {}
        for unit, path in zip(range(begin, end), paths):
            guessed[path] = guessed.get(path, 0.0) + costs[unit]
        known = {path: one.calls[path] for path in guessed if path is not None}
        of_known = sum(guessed[path] for path in known)
        for unit, path in zip(range(begin, end), paths):
            if path in known and sum(known.values()) > 0 and guessed[path] > 0:
                costs[unit] *= known[path] / sum(known.values()) * of_known / guessed[path]
        total = sum(costs[begin:end])
        for unit in range(begin, end):
            costs[unit] *= seconds * scale / total if total > 0 else 1.0
    return costs


def _measured_path(trace: Trace, call: int, calls: Mapping[str, float]) -> str | None:
    while call >= 0:
        if trace.calls[call].path in calls:
            return trace.calls[call].path
        call = trace.calls[call].parent
    return None


def move_parameters(
    slots: ParameterSlots, optimizers: Sequence[Optimizer], old: Plan, new: Plan, stage: int, ranks: Sequence[int],
    world: World,
) -> None:  # fmt: skip
    """Give each stage what ``new`` lets it have, with what optimizers know of it. All stages must call it.

    Args:
        slots: The parameters of the module.
        optimizers: With the parameters of this stage.
        old: Who has what.
        new: Who should.
        stage: The stage of this process.
        ranks: The global rank of each stage.
        world: All processes.
    """
    for name, parameter in slots.parameters.items():
        source = old.stage_of(name)[0]
        for target in new.stage_of(name):
            if target in old.stage_of(name) or stage not in (source, target):
                continue
            mine: Any = None
            if stage == source:
                states = [optimizer.state.get(parameter, {}) for optimizer in optimizers]
                mine = parameter.detach(), [dict(state) for state in states]
            pair = [ranks[source], ranks[target]]
            received = world.gather(mine, f"the move of `{name}`", pair, ranks[target])
            if received is not None:
                _take(parameter, received[0], optimizers)


class KeptState:
    """What modules keep from batch to batch in plain attributes, which moves with the cuts.

    Args:
        root: The LightningModule, as it is on all stages.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._before = {key: _mark(value) for key, value in self._attributes()}
        self._mine: dict[Key, Any] = {}
        self._known: list[tuple[set[Key], dict[Key, str]]] = []

    def _attributes(self) -> Iterator[tuple[Key, Any]]:
        return attributes_in(self._root.named_modules())

    def look(self, gather: Callable[[Any, str], list[Any]]) -> None:
        """See what has changed. All stages must call it.

        Args:
            gather: ``gather(item, what)`` gives all stages the ``item`` of each.
        """
        changed = {key: value for key, value in self._attributes() if not _is_as_before(self._before.get(key), value)}
        self._mine = {key: realised(value) for key, value in changed.items() if is_plain(value)}
        self._mine = {key: value for key, value in self._mine.items() if not tensors_in(value, Ghost)}
        others = {key: type(value).__name__ for key, value in changed.items() if not is_plain(value)}
        self._known = gather((set(self._mine), others), "what modules keep")

    def obstacles(self, old: Plan, new: Plan) -> list[str]:
        """What would have to move, but cannot be sent."""
        return [
            f"`{'.'.join(filter(None, key))}` of type `{kind}`"
            for stage, (_, others) in enumerate(self._known)
            for key, kind in sorted(others.items())
            if old.modules.get(key[0]) == stage != new.modules.get(key[0])
        ]

    def share(self, old: Plan, ranks: Sequence[int], world: World, device: torch.device) -> None:
        """Give all stages what the one has that ran the module. All stages must call it.

        What several have entered was changed last on the latest that has values of it: later ones have ghosts.
        """
        sources = {key: stage for stage, (keys, _) in enumerate(self._known) for key in keys}
        sources |= {key: owner for key in sources if (owner := old.modules.get(key[0])) is not None}
        for stage, rank in enumerate(ranks):
            given = {key: value for key, value in self._mine.items() if sources[key] == stage}
            put_attributes(self._root, world.share(given, "the move of what modules keep", ranks, rank, device))


def _mark(value: Any) -> Any:
    return marks(value) if is_plain(value) else value


def _is_as_before(before: Any, value: Any) -> bool:
    if is_plain(value):
        return isinstance(before, list) and is_same(before, value)
    return before is value or callable(value)


@torch.no_grad()
def _take(parameter: nn.Parameter, received: Any, optimizers: Sequence[Optimizer]) -> None:
    value, states = received
    if isinstance(parameter, Shadow):
        restore(parameter)
    parameter.copy_(value)
    for optimizer, state in zip(optimizers, states):
        if state:
            optimizer.state[parameter] = {key: _placed(key, value, parameter.device) for key, value in state.items()}


def _placed(key: str, value: Any, device: torch.device) -> Any:
    """Counters stay on the host, where optimizers have them unless they are fused or capturable."""
    return value.to(device) if isinstance(value, torch.Tensor) and key != "step" else value
