"""What one stage does with a batch: its part of the forward, and later its part of the backward."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_dgmp.calls import ParameterSlots
from lightning_dgmp.ghost import (
    PLAIN,
    Ghost,
    GhostError,
    GhostMode,
    GhostRead,
    leaves,
    looks_of,
    map_leaves,
    map_tensors,
    tensors_in,
)
from lightning_dgmp.plan.plan import Event, Plan, Transfer
from lightning_dgmp.stage.randomness import StepRandomness
from lightning_dgmp.stage.snapshot import take_snapshot
from lightning_dgmp.transport import ACTIVATIONS, ERRORS, Message, Transport

__all__ = ["BackwardMode", "StageRunner"]

BackwardMode = Literal["stash", "recompute", "replay"]


@dataclass
class _InFlight:
    """A batch between its forward and its backward on this stage."""

    batch: int
    step: Callable[[], Any]
    parameters: dict[str, Tensor]
    received: dict[int, Message] = field(default_factory=dict)  # by source stage
    entries: dict[tuple[int, int], _Arrived] = field(default_factory=dict)  # by source stage and slot
    exits: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # by target stage and slot


class _StepDone(BaseException):
    """This stage has nothing more to do in the step: unwinds the user's frames."""


class StageRunner:
    """Runs one stage of a plan.

    Args:
        root: The LightningModule, or any module; its calls must reach :meth:`on_call`.
        slots: The parameters of ``root``.
        plan: The plan.
        stage: Which stage this is.
        delay: How many batches stay in flight on it between two iterations.
        transport: Its channels.
        mode: ``"stash"`` keeps the graph of each batch in flight; ``"recompute"`` keeps its inputs and weights and
            builds the graph again, with the same result; ``"replay"`` keeps the inputs alone and builds the graph with
            today's weights (Features Replay, Huo et al., NeurIPS 2018).
        seed: Equal on all stages of a replica.
        device: Where the stage lives.
    """

    def __init__(
        self,
        root: nn.Module,
        slots: ParameterSlots,
        plan: Plan,
        stage: int,
        delay: int,
        transport: Transport,
        mode: BackwardMode,
        seed: int,
        device: torch.device,
    ) -> None:
        self.root, self.slots, self.plan, self.stage, self.delay = root, slots, plan, stage, delay
        self.transport, self.mode, self.seed, self.device = transport, mode, seed, device
        self.in_flight: deque[_InFlight] = deque()
        self.num_forwards = 0
        self._flushed_at = 0
        self.stop_requested = False
        self.stop_agreed = False
        self.whole = False  # set while all parameters have their values on this process
        self.is_last = stage == plan.num_stages - 1
        self.own = {name: p for name, p in slots.parameters.items() if stage in plan.stage_of(name)}
        self._ghost_mode = GhostMode()
        self._others = {
            name: self._ghost_mode.like(p, f"the parameter `{name}` of stage {plan.stage_of(name)[0]}", False, device)
            for name, p in slots.parameters.items()
            if name not in self.own
        }
        self._wiring = _Wiring(plan, stage)
        #: The modules whose calls must come here: not those inside of what this stage runs as a whole.
        self.watched = {path for path, owner in plan.modules.items() if owner != stage or path in plan.visible}
        self._templates: dict[Any, _Template] = {}
        self._forward: _Forward | None = None

    # ----- the two halves of an iteration

    def forward(self, step: Callable[[], Any]) -> Any:
        """Run this stage's part of ``step`` on the next batch and keep what its backward needs.

        Returns:
            What ``step`` returned on the last stage, ``None`` on the others.
        """
        batch = self.num_forwards
        graph_later = self.mode != "stash" and self.delay > 0
        if self.delay == 0 or self.mode == "replay":
            parameters: dict[str, Tensor] = {}
        else:
            parameters = take_snapshot(self.own)
        record = _InFlight(batch, step, parameters)
        forward = _Forward(self, record, keeps_inputs=graph_later)
        with torch.no_grad() if graph_later else nullcontext():
            result = self._run(forward)
        for source in self._wiring.sources:
            forward.message(source)  # also those that nothing asked for
        stop = self.stop_requested if self.stage == 0 else any(message.stop for message in record.received.values())
        self.stop_agreed |= stop
        for target, count in self._wiring.targets.items():
            sent = [record.exits.get((target, slot)) for slot in range(count)]
            tensors = [None if t is None else t.detach() for t in sent]
            self.transport.send(ACTIVATIONS, target, Message(batch, stop, tensors))
        if graph_later:
            record.exits.clear()
        else:
            record.received.clear()
        self.num_forwards += 1
        self.in_flight.append(record)
        return result

    @property
    def due(self) -> bool:
        """Whether the oldest batch in flight has its backward in this iteration."""
        return len(self.in_flight) > self.delay

    def backward(self, of_loss: Callable[[], Any]) -> None:
        """Run this stage's part of the backward of the oldest batch in flight.

        Args:
            of_loss: Runs the backward from the loss; called on the last stage alone.
        """
        record = self.in_flight.popleft()
        with ExitStack() as stack:
            if self.mode != "stash" and self.delay > 0:
                stack.enter_context(_buffers_kept(self._own_modules()))
                forward = _Forward(self, record, keeps_inputs=False)
                with torch.enable_grad():
                    self._run(forward)
                record.received.clear()
            if self.delay > 0:
                # Code that runs modules again in the backward, as activation checkpointing does, must see old weights.
                stack.enter_context(self.slots.holding(record.parameters))
            if self.is_last:
                of_loss()
            else:
                self._backward_from_errors(record)
        for source, count in self._wiring.sources.items():
            errors = [e.error if (e := record.entries.get((source, slot))) else None for slot in range(count)]
            self.transport.send(ERRORS, source, Message(record.batch, self.stop_requested, errors))

    def _backward_from_errors(self, record: _InFlight) -> None:
        roots: list[Tensor] = []
        errors: list[Tensor] = []
        for target, count in self._wiring.targets.items():
            message = self.transport.receive(ERRORS, target, record.batch)
            self.stop_requested |= message.stop
            for slot, error in enumerate(message.tensors[:count]):
                root = record.exits.get((target, slot))
                if root is not None and error is not None and root.requires_grad:
                    roots.append(root)
                    errors.append(error)
        if roots:
            torch.autograd.backward(roots, errors)

    def begin_flush(self) -> bool:
        """Agree with the neighbours that no more forwards come for now.

        Returns:
            Whether there is anything to flush.

        Raises:
            PeerError: If a neighbour is at another batch.
        """
        if self._flushed_at == self.num_forwards:
            return False
        self._flushed_at = self.num_forwards
        for target in self._wiring.targets:
            self.transport.send(ACTIVATIONS, target, Message(self.num_forwards, False, [], flush=True))
        for source in self._wiring.sources:
            self.transport.receive(ACTIVATIONS, source, self.num_forwards, flush=True)
        return True

    def end_flush(self) -> None:
        """Wait until the neighbours have flushed too: what comes next may be a collective, which knows no reasons."""
        for source in self._wiring.sources:
            self.transport.send(ERRORS, source, Message(self.num_forwards, False, [], flush=True))
        for target in self._wiring.targets:
            self.transport.receive(ERRORS, target, self.num_forwards, flush=True)

    # ----- inside a step

    def on_call(
        self, call: Callable[..., Any], module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Handle the call of a module; see :data:`lightning_dgmp.calls.CallHandler`."""
        if self._forward is not None:
            return self._forward.on_call(call, path, args, kwargs)
        if self.whole or not any(self.slots.names.get(p) in self._others for p in module.parameters()):
            return call(*args, **kwargs)
        raise GhostError(
            f"`{path or type(module).__name__}` was called outside of a step on stage {self.stage}, which holds only a"
            " part of it. Call modules in `training_step` or `validation_step`, or after `trainer.fit`."
        )

    def _run(self, forward: _Forward) -> Any:
        record = forward.record
        self._forward = forward
        try:
            with self.slots.holding(self._others | record.parameters), forward.randomness.step():
                result = record.step()
        except _StepDone:
            return None
        except GhostRead as read:
            raise GhostError(
                f"User code on stage {self.stage} of {self.plan.num_stages} needs a value that is not here: {read}."
                " Code in a step may read values only behind the network; move it there, or set `split_at` so that the"
                " value is made on the stage that reads it."
            ) from None
        finally:
            self._forward = None
        if not self.is_last:
            return None
        for ghost in tensors_in(result, Ghost):
            if not ghost.bound:
                raise GhostError(
                    f"`training_step` returned a value that depends on {ghost.describe()}, which did not travel to the"
                    f" last stage. The step ran differently from the first batch, on which the plan was made; make its"
                    " module calls the same for all batches."
                )
        return map_tensors(lambda t: t.received() if isinstance(t, Ghost) else t, result)

    def _own_modules(self) -> list[nn.Module]:
        modules = self.plan.modules
        return [module for path, module in self.root.named_modules() if modules.get(path) == self.stage]


class _Forward:
    """One forward pass of a step on one stage."""

    def __init__(self, runner: StageRunner, record: _InFlight, keeps_inputs: bool) -> None:
        self.runner, self.record, self.keeps_inputs = runner, record, keeps_inputs
        self.plan, self.stage = runner.plan, runner.stage
        self.wiring = runner._wiring
        self.randomness = StepRandomness(runner.seed, record.batch, runner.stage, runner.device)
        self.occurrences: Counter[str] = Counter()
        self.inside = False

    def on_call(self, call: Callable[..., Any], path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.inside:  # of a module that is run, or skipped, as a whole
            return call(*args, **kwargs)
        occurrence = self.occurrences[path]
        self.occurrences[path] += 1
        self.at(Event(path, occurrence, "arg"), (args, kwargs))
        owner = self.plan.modules.get(path)
        if owner is None or owner == self.stage:
            args, kwargs = map_tensors(_realise, args), map_tensors(_realise, kwargs)
        if owner is None:
            out = call(*args, **kwargs)
        elif owner == self.stage:
            self.inside = True
            try:
                with self.randomness.modules():
                    out = call(*args, **kwargs)
            finally:
                self.inside = False
            self.check(path, out)
        else:
            out = self.skip(call, path, args, kwargs)
        self.at(Event(path, occurrence, "out"), out)
        return out

    def at(self, event: Event, nest: Any) -> None:
        """Bind what arrives at this event, keep what is to be sent, and end the step if nothing is left to do."""
        wires = self.wiring.events.get(event)
        if wires is not None:
            items = leaves(nest)
            for slot, transfer in wires:
                item = items[transfer.leaf] if transfer.leaf < len(items) else None
                if transfer.target == self.stage:
                    if isinstance(item, Ghost):
                        item.bind(partial(self.receive, slot, transfer))
                    continue
                item = item.received() if isinstance(item, Ghost) and item.bound else item
                if not isinstance(item, Tensor) or isinstance(item, Ghost):
                    raise GhostError(
                        f"Stage {self.stage} should send leaf {transfer.leaf} of `{event.path}` to stage"
                        f" {transfer.target}, but it is {item!r}. The step ran differently from the first batch, on"
                        " which the plan was made; make its module calls the same for all batches."
                    )
                self.record.exits[transfer.target, slot] = item.clone()  # user code may change the original in place
        if event == self.wiring.last_event:
            raise _StepDone

    def receive(self, slot: int, transfer: Transfer) -> Tensor:
        value = self.message(transfer.source).tensors[slot]
        if value is None:
            raise GhostError(
                f"Stage {transfer.source} did not make the value of `{transfer.event.path}` that stage {self.stage}"
                " needs. The step ran differently from the first batch, on which the plan was made; make its module"
                " calls the same for all batches."
            )
        if self.keeps_inputs:
            return value.clone()  # user code may change it in place, and it is needed again
        if not transfer.requires_grad or not torch.is_grad_enabled():
            return value
        arrived = _Arrived(value)
        self.record.entries[transfer.source, slot] = arrived
        return _Entry.apply(torch.empty((), requires_grad=True), arrived)  # type: ignore[no-any-return]

    def message(self, source: int) -> Message:
        received = self.record.received
        if source not in received:
            received[source] = self.runner.transport.receive(ACTIVATIONS, source, self.record.batch)
        return received[source]

    def check(self, path: str, out: Any) -> None:
        for ghost in tensors_in(out, Ghost):
            if not ghost.bound:
                raise GhostError(
                    f"`{path}` on stage {self.stage} used {ghost.describe()}, which is not here. The step ran"
                    " differently from the first batch, on which the plan was made: make its module calls the same for"
                    " all batches, or choose other cuts with `split_at`."
                )

    def skip(self, call: Callable[..., Any], path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The outputs of another stage's module, as ghosts; it runs on ghosts once for each kind of input."""
        runner = self.runner
        inputs = leaves((args, kwargs))
        key = (path, torch.is_grad_enabled(), looks_of((args, kwargs)))
        template = runner._templates.get(key)
        if template is None:
            runner._ghost_mode.written_over = {id(buffer) for buffer in runner.root.buffers()}
            self.inside = True
            try:
                out = call(*args, **kwargs)
            finally:
                self.inside = False
                runner._ghost_mode.written_over = set()
            template = _Template(out, inputs)
            if template.reusable:
                runner._templates[key] = template
        return template.fill(inputs, runner._ghost_mode, f"`{path}` of stage {self.plan.modules[path]}")


class _Wiring:
    """The transfers of a plan as one stage sees them. A slot is a transfer's place in the message of its edge."""

    def __init__(self, plan: Plan, stage: int) -> None:
        self.events: dict[Event, list[tuple[int, Transfer]]] = {}
        self.sources = {a: 0 for a, b in plan.edges() if b == stage}
        self.targets = {b: 0 for a, b in plan.edges() if a == stage}
        self.last_event = plan.last_events[stage]
        for transfer in plan.transfers:
            if stage == transfer.source:
                counts, peer = self.targets, transfer.target
            elif stage == transfer.target:
                counts, peer = self.sources, transfer.source
            else:
                continue
            self.events.setdefault(transfer.event, []).append((counts[peer], transfer))
            counts[peer] += 1


class _Template:
    """What a skipped module returns: the structure, with ghosts for its tensors and its own arguments where it passes
    them on.
    """

    def __init__(self, out: Any, inputs: list[Any]) -> None:
        self.out = out
        self.reusable = True
        places = {id(item): i for i, item in enumerate(inputs) if not isinstance(item, PLAIN)}
        self.sources: list[int | None] = []
        for leaf in leaves(out):
            source = places.get(id(leaf))
            self.sources.append(source)
            if source is None and not isinstance(leaf, (Ghost, *PLAIN)):
                self.reusable = False  # depends on the values of this batch, or has a state of its own

    def fill(self, inputs: list[Any], mode: GhostMode, origin: str) -> Any:
        sources: Iterator[int | None] = iter(self.sources)

        def one(leaf: Any) -> Any:
            source = next(sources)
            if source is not None:
                return inputs[source]
            return mode.again(leaf, origin) if isinstance(leaf, Ghost) else leaf

        return map_leaves(one, self.out)


class _Arrived:
    """A received value, and later the error with respect to it."""

    def __init__(self, value: Tensor) -> None:
        self.value: Tensor | None = value
        self.error: Tensor | None = None


class _Entry(torch.autograd.Function):
    """Where a received value enters the graph: its backward keeps the error. Not a leaf, so it may be changed in
    place.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, arrived: _Arrived) -> Tensor:
        value, arrived.value = arrived.value, None
        assert value is not None
        ctx.arrived = arrived
        return value

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[None, None]:
        ctx.arrived.error = errors[0]
        return None, None


def _realise(tensor: Tensor) -> Tensor:
    return tensor.received() if isinstance(tensor, Ghost) and tensor.bound else tensor


@contextmanager
def _buffers_kept(modules: list[nn.Module]) -> Iterator[None]:
    """Undo changes of buffers: a forward that is run again must not count twice (BatchNorm)."""
    kept = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
