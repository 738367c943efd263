"""A stage's part of the forward: its own calls run, others are skipped, values arrive and leave."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_dgmp.ghost import Ghost, GhostError, realised
from lightning_dgmp.nests import tensors_in, values_in
from lightning_dgmp.plan.plan import Event, Plan, Transfer
from lightning_dgmp.stage.overwritten import Overwritten
from lightning_dgmp.stage.randomness import StepRandomness, aligned
from lightning_dgmp.stage.skip import Skips
from lightning_dgmp.stage.wiring import Wiring
from lightning_dgmp.wire import Message

__all__ = ["Forward", "InFlight", "StepDone"]


@dataclass
class InFlight:
    """A batch between its forward and its backward on this stage."""

    batch: int
    step: Callable[[], Any]
    parameters: dict[str, Tensor]
    attributes: Callable[[], AbstractContextManager[None]] = nullcontext  # of the modules at that time, to run it again
    received: dict[int, Message] = field(default_factory=dict)  # by source stage
    entries: dict[tuple[int, int], Arrived] = field(default_factory=dict)  # by source stage and slot
    exits: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # by target stage and slot
    shapes: list[int] = field(default_factory=list)  # digests of the shapes of all outputs, before each call


class StepDone(BaseException):
    """This stage has nothing more to do in the step: unwinds the user's frames.

    Raised at the next module call, so that what the step does with a result of this stage, such as to keep it, is done.
    """


class Forward:
    """One forward pass of a step on one stage.

    Args:
        stage: The stage.
        plan: Who owns what.
        wiring: What the stage sends and receives.
        skips: For the calls of other stages.
        randomness: Of this batch on this stage.
        receive: Waits for the activations of this batch from a stage.
        record: What is kept of the batch.
        keeps_inputs: Whether the pass is repeated later, so that what has arrived must not change.
        timing: Around the calls of this stage, by path, if they are measured.
    """

    def __init__(
        self,
        stage: int,
        plan: Plan,
        wiring: Wiring,
        skips: Skips,
        randomness: StepRandomness,
        receive: Callable[[int], Message],
        record: InFlight,
        keeps_inputs: bool,
        timing: Callable[[str], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.stage, self.plan, self.wiring, self.skips = stage, plan, wiring, skips
        self.randomness, self.receive, self.record, self.keeps_inputs = randomness, receive, record, keeps_inputs
        self.record.shapes = [0]
        self.occurrences: Counter[str] = Counter()
        self.bound: list[weakref.ref[Ghost]] = []
        self.timing = timing
        self.inside = self.done = False
        self.overwritten = Overwritten(skips.root, skips.mode, stage, stage in plan.overwritten)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the step."""
        with self.randomness.step(), self.overwritten.step():
            yield

    def on_call(self, call: Callable[..., Any], path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.inside:  # of a module that is run, or skipped, as a whole
            return call(*args, **kwargs)
        if self.done and self.stage not in self.plan.runs_on:
            raise StepDone
        with aligned(self.randomness.device):
            return self._call(call, path, args, kwargs)

    def _call(self, call: Callable[..., Any], path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        occurrence = self.occurrences[path]
        self.occurrences[path] += 1
        args, kwargs = self.overwritten.current(args), self.overwritten.current(kwargs)
        self.at(Event(path, occurrence, "arg"), (args, kwargs))
        if self.done and self.stage not in self.plan.runs_on:
            raise StepDone
        owner = self.plan.owner(path, occurrence)
        if owner is None or owner == self.stage:
            realise = realised if owner == self.stage else self.skips.realised  # what is of the batch may wait
            args, kwargs = realise(args), realise(kwargs)
        if owner is None:
            out = call(*args, **kwargs)
        elif owner == self.stage:
            with self.as_a_whole(), nullcontext() if self.timing is None else self.timing(path):
                out = call(*args, **kwargs)
            self.check(path, out)
        else:
            with self.as_a_whole():
                out = self.skips.outputs(call, path, owner, args, kwargs)
        out = self.overwritten.current(out)
        if owner is not None and path in self.plan.visible:
            shapes = [leaf.fake.shape if isinstance(leaf, Ghost) else leaf.shape for leaf in tensors_in(out)]
            self.record.shapes.append(hash((self.record.shapes[-1], *shapes)))
        self.at(Event(path, occurrence, "out"), out)
        return out

    def on_function(self, apply: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give a custom autograd function the values that have arrived."""
        return apply(*realised(args), **realised(kwargs))

    @contextmanager
    def as_a_whole(self) -> Iterator[None]:
        """Let the calls inside of a module pass."""
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def at(self, event: Event, nest: Any) -> None:
        """Bind what arrives at this event, and keep what is to be sent."""
        wires = self.wiring.events.get(event)
        if wires is not None:
            items = values_in(nest)
            for slot, transfer in wires:
                item = items[transfer.leaf] if transfer.leaf < len(items) else None
                if transfer.target == self.stage:
                    if isinstance(item, Ghost):
                        item.bind(partial(self.value, slot, transfer, item.dtype))
                        self.bound.append(weakref.ref(item))
                    continue
                item = item.received() if isinstance(item, Ghost) and item.bound else item
                if not isinstance(item, Tensor) or isinstance(item, Ghost):
                    raise GhostError(
                        f"Stage {self.stage} should send leaf {transfer.leaf} of `{event.path}` to stage"
                        f" {transfer.target}, but it is {item!r}. The step ran differently from the first batch, on"
                        " which the plan was made; make its module calls the same for all batches."
                    )
                with torch.enable_grad():  # a copy, since user code may change the original in place
                    self.record.exits[transfer.target, slot] = item.clone()
        self.done |= event == self.wiring.last_event

    def value(self, slot: int, transfer: Transfer, dtype: torch.dtype) -> Tensor:
        message = self.message(transfer.source)
        value = message.tensors[slot]
        if value is None:
            raise GhostError(
                f"Stage {transfer.source} did not make the value of `{transfer.event.path}` that stage {self.stage}"
                " needs. The step ran differently from the first batch, on which the plan was made; make its module"
                " calls the same for all batches."
            )
        if value.is_floating_point() and value.dtype.itemsize < dtype.itemsize:
            value = value.to(dtype)  # it was narrowed for its way
        if self.keeps_inputs:
            return value.clone()  # user code may change it in place, and it is needed again
        if not message.differentiable[slot]:
            return value
        arrived = Arrived(value)
        self.record.entries[transfer.source, slot] = arrived
        with torch.enable_grad():  # the first touch may be in a `no_grad`, others need not be
            return _Entry.apply(torch.empty((), requires_grad=True), arrived)

    def message(self, source: int) -> Message:
        received = self.record.received
        if source not in received:
            received[source] = self.receive(source)
        return received[source]

    def settle(self) -> None:
        """Check what has arrived, and give it to the ghosts that outlive the step, before the messages go."""
        self._check_shapes()
        for reference in self.bound:
            ghost = reference()
            if ghost is not None:
                ghost.received()

    def _check_shapes(self) -> None:
        """Compare what modules return here with what they return on earlier stages, as far as both have run."""
        for source, message in self.record.received.items():
            num_calls, digest = message.shapes
            if num_calls < len(self.record.shapes) and self.record.shapes[num_calls] != digest:
                raise GhostError(
                    f"What modules of earlier stages return must have a shape that follows from the shapes and plain"
                    f" values of their arguments and attributes, but stage {source} saw another one than stage"
                    f" {self.stage}, which does not run them: pass them what else decides the shape."
                )

    def check(self, path: str, out: Any) -> None:
        for ghost in tensors_in(out, Ghost):
            if not ghost.bound:
                raise GhostError(
                    f"`{path}` on stage {self.stage} used {ghost.describe()}, which is not here."
                    f" {self.plan.why_missing()}."
                )


class Arrived:
    """A received value, and later the error with respect to it."""

    def __init__(self, value: Tensor) -> None:
        self.value: Tensor | None = value
        self.error: Tensor | None = None


class _Entry(torch.autograd.Function):
    """Where a received value enters the graph: its backward keeps the error. Not a leaf, so it may be changed in
    place.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, arrived: Arrived) -> Tensor:
        value, arrived.value = arrived.value, None
        assert value is not None
        ctx.arrived = arrived
        return value

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[None, None]:
        ctx.arrived.error = errors[0]
        return None, None
