"""What stages hold, by where they begin and end.

A stage with the delay ``d`` holds the most at one of three moments: at the end of a forward, when the graphs and
snapshots of ``d + 1`` batches are there, and the gradients of the last step still are; while the backward takes one of
these graphs apart and gradients come instead; or in the step of the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from lightning_dgmp.plan.cut import Cuts

if TYPE_CHECKING:
    from lightning_dgmp.plan.plan import Plan

__all__ = ["Budget", "Memory", "Parts", "Sizes", "memory_at_peak", "memory_of", "table_of_memory"]

_TEMPORARIES = 2  # that an optimizer has of the parameter that it updates, as Adam's denominator


@dataclass(frozen=True)
class Budget:
    """What a stage may hold, and what decides how much it does apart from its part of the step.

    Attributes:
        limit: In bytes; ``None``: any amount.
        backward: How batches are kept until their backward: ``"stash"``, ``"recompute"`` or ``"replay"``.
        state: The bytes of the optimizer's state for each parameter, by name.
        num_gradients: How many there are of each parameter: two where replicas add them up elsewhere.
        at_once: Whether the optimizer has temporaries for all parameters at once, not for one after the other.
        is_single: Whether all is computed in 32 bits.
    """

    limit: int | None = None
    backward: str = "stash"
    state: Mapping[str, int] = field(default_factory=dict)
    num_gradients: int = 1
    at_once: bool = False
    is_single: bool = True


class Sizes(NamedTuple):
    """What there is of a part of the step, in bytes.

    Attributes:
        parameters: Its weights.
        trained: Those of them that are trained.
        gradients: Of these, in all places.
        state: What the optimizer keeps.
        temporaries: What the optimizer has besides in a step.
        graph: What the forward of one batch keeps for its backward.
        backward: The most that this graph and gradients come to in a backward.
        forward: What an operation of a forward takes at most.
        received: What a batch needs from earlier parts, and from the batch itself.
        sent: What later parts need of it.
        shared: Parameters that other parts have too.
    """

    parameters: int = 0
    trained: int = 0
    gradients: int = 0
    state: int = 0
    temporaries: int = 0
    graph: int = 0
    backward: int = 0
    forward: int = 0
    received: int = 0
    sent: int = 0
    shared: int = 0

    def times(self, activations: float, parameters: float = 1) -> Sizes:
        """With so many times the activations and the parameters."""
        excess = self.backward - self.gradients
        weights = {name: int(parameters * getattr(self, name)) for name in (*self._fields[:5], "shared")}
        others = {name: int(activations * getattr(self, name)) for name in ("graph", "forward", "received", "sent")}
        return Sizes(**weights, **others, backward=weights["gradients"] + int(activations * excess))


class Memory(NamedTuple):
    """What a stage holds at the moment when it holds most, in bytes.

    Attributes:
        parameters: Its weights.
        gradients: Of the weights that are trained, and while a backward runs of what passes through it.
        optimizer: What the optimizer keeps, and in its step what it has besides.
        snapshots: The old weights of the batches in flight.
        activations: What the forwards of the batches in flight keep for their backwards.
        messages: What goes to other stages and comes from them.
    """

    parameters: int
    gradients: int
    optimizer: int
    snapshots: int
    activations: int
    messages: int

    @property
    def total(self) -> int:
        """All together."""
        return sum(self)


def memory_at_peak(sizes: Sizes, delay: int, backward: str = "stash") -> Memory:
    """What a stage holds at most.

    Args:
        sizes: Of its part of the step.
        delay: How many batches stay in flight on it between two iterations.
        backward: How they are kept until their backward.
    """
    runs_twice = backward != "stash" and delay > 0
    snapshot = sizes.trained if delay > 0 and backward != "replay" else 0
    kept = sizes.received if runs_twice else sizes.graph  # of a batch in flight
    # What is sent stays for its graph until the backward, which begins with its errors; a message each way comes ahead.
    messages = (3 if runs_twice else delay + 3) * sizes.sent + sizes.received + 2 * sizes.shared
    all_snapshots, in_forward = (delay + 1) * snapshot, sizes.forward if runs_twice else 0
    in_backward = delay * kept + sizes.graph
    weights, gradients, state = sizes.parameters, sizes.gradients, sizes.state
    moments = (
        Memory(weights, gradients, state, all_snapshots, (delay + 1) * kept + in_forward, messages),
        Memory(weights, sizes.backward - sizes.graph, state, all_snapshots, in_backward, messages),
        Memory(weights, gradients, state + sizes.temporaries, delay * snapshot, delay * kept, messages),
    )
    return max(moments, key=lambda moment: moment.total)


def memory_of(plan: Plan, backward: str = "stash") -> list[Memory]:
    """What each stage holds at most, if batches are kept in such a way until their backward."""
    return [memory_at_peak(stage.sizes, delay, backward) for stage, delay in zip(plan.stages, plan.delays)]


def table_of_memory(memory: list[Memory]) -> str:
    """One row a stage."""
    rows: list[tuple[str, ...]] = [("stage", *Memory._fields, "total")]
    for k, one in enumerate(memory):
        rows.append((str(k), *(f"{nbytes / 1e6:.1f} MB" for nbytes in (*one, one.total))))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


class Parts:
    """The sizes of all parts of a step that stages may be.

    Args:
        cuts: Where it can be cut.
        budget: What decides besides.
    """

    def __init__(self, cuts: Cuts, budget: Budget) -> None:
        self.cuts, self.budget = cuts, budget
        trace, num_units = cuts.trace, len(cuts.units)
        self._kept: list[dict[int, int]] = [{} for _ in range(num_units)]  # by memory
        self._working = [0] * num_units  # gradients of what an operation takes and makes, and of what passes by it
        self._taken: list[set[int]] = [set() for _ in range(num_units)]
        self._made: list[list[int]] = [[] for _ in range(num_units)]
        self._last_use = list(cuts.value_heights)
        regions: dict[int, dict[int, int]] = {}  # of activation checkpointing: what they keep while they run again
        last_ops = {v: index for index, op in enumerate(trace.ops) for v in op.inputs}
        passing: set[int] = set()
        for index, (op, height) in enumerate(zip(trace.ops, cuts.op_heights)):
            working = sum(trace.values[v].nbytes for v in passing.union(op.inputs, op.outputs))
            passing = {v for v in passing.union(op.outputs) if last_ops.get(v, 0) > index}
            self._taken[height].update(op.inputs)
            self._made[height] += op.outputs
            for v in op.inputs:
                self._last_use[v] = max(self._last_use[v], height)
            if op.checkpoint is None:
                self._kept[height].update(op.kept)
            else:
                region = regions.setdefault(op.checkpoint, {})
                region.update(op.kept)
                working += sum(region.values())
                outside = (trace.values[v] for v in op.inputs)
                outside = (value for value in outside if trace.ops[value.op].checkpoint != op.checkpoint)
                self._kept[height].update({value.storage: value.nbytes for value in outside})
            self._working[height] = max(self._working[height], working)
        self._from = lru_cache(maxsize=None)(self._sizes_from)

    def sizes(self, start: int, end: int) -> Sizes:
        """Of the part that holds ``units[start:end]``."""
        return self._from(start)[end - start - 1]

    def memory(self, start: int, end: int, delay: int) -> Memory:
        """Of a stage that holds ``units[start:end]``."""
        return memory_at_peak(self.sizes(start, end), delay, self.budget.backward)

    def _sizes_from(self, start: int) -> list[Sizes]:
        """Of all parts that begin with a unit: each is the one before it and a unit more."""
        cuts, budget, values = self.cuts, self.budget, self.cuts.trace.values
        names: set[str] = set()
        kept: dict[int, int] = {}
        taken: set[int] = set()
        weights = trained = state = largest = graph = working = received = sent = 0
        excess = 0  # by which a backward holds more than the gradients of all its parameters
        leaving: dict[int, int] = {}  # bytes that are sent until a unit has them
        found = []
        for unit in range(start, len(cuts.units)):
            before = trained
            for name in set(cuts.units[unit].parameters) - names:
                parameter = cuts.trace.parameters[name]
                names.add(name)
                weights += parameter.nbytes
                state += budget.state.get(name, 0)
                if parameter.requires_grad:
                    trained += parameter.nbytes
                    largest = max(largest, parameter.nbytes)
            for number, nbytes in self._kept[unit].items():
                if number not in kept:
                    graph += nbytes
                    received += nbytes if number < 0 else 0
                kept[number] = nbytes
            working = max(working, self._working[unit])
            excess = max(excess, graph + self._working[unit] - before)
            for v in self._taken[unit] - taken:
                taken.add(v)
                received += values[v].nbytes if cuts.value_heights[v] < start else 0
            sent -= leaving.pop(unit, 0)
            for v in self._made[unit]:
                if (last := self._last_use[v]) > unit:
                    sent += values[v].nbytes
                    leaving[last] = leaving.get(last, 0) + values[v].nbytes
            shared = sum(
                cuts.trace.parameters[name].nbytes
                for name in names
                if cuts.units_of[name][0] < start or cuts.units_of[name][-1] > unit
            )
            gradients = budget.num_gradients * trained
            temporaries = trained if budget.at_once else _TEMPORARIES * largest
            of_backward = gradients + excess
            found.append(
                Sizes(
                    weights, trained, gradients, state, temporaries, graph, of_backward, working, received, sent, shared
                )
            )
        return found
