"""What one stage does with a batch: its part of the forward, and later its part of the backward."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dgmp.calls import ParameterSlots
from lightning_dgmp.clipping import Part, updated_by
from lightning_dgmp.ghost import Ghost, GhostError, GhostRead
from lightning_dgmp.nests import map_tensors, tensors_in
from lightning_dgmp.operations import GhostMode
from lightning_dgmp.plan.plan import Plan
from lightning_dgmp.plan.restore import attributes_of_now
from lightning_dgmp.remedies import Updates
from lightning_dgmp.stage.averaging import Averaging
from lightning_dgmp.stage.forward import Forward, InFlight, StepDone
from lightning_dgmp.stage.messages import Messages
from lightning_dgmp.stage.randomness import StepRandomness, aligned
from lightning_dgmp.stage.skip import Skips
from lightning_dgmp.stage.snapshot import as_leaf, buffers_kept, take_snapshot
from lightning_dgmp.stage.wiring import Wiring
from lightning_dgmp.transport import ACTIVATIONS, Transport
from lightning_dgmp.wire import Wish

__all__ = ["BackwardMode", "StageRunner"]

BackwardMode = Literal["stash", "recompute", "replay"]

_OF_THE_LAST = "the last stage, which alone has the loss (global rank 0): read it there, `if trainer.is_global_zero`"


class StageRunner:
    """Runs one stage of a plan.

    Args:
        root: The LightningModule, or any module; its calls must reach :meth:`on_call`, and those of
            custom functions :meth:`on_function`.
        slots: The parameters of ``root``.
        plan: The plan.
        stage: Which stage this is.
        delay: How many batches stay in flight on it between two iterations.
        transport: Its channels.
        mode: ``"stash"`` keeps the graph of each batch in flight; ``"recompute"`` keeps its inputs and weights and
            builds the graph again, with the same result; ``"replay"`` keeps the inputs alone and builds the graph with
            today's weights (Features Replay, Huo et al., NeurIPS 2018).
        seed: Equal on all stages of a replica.
        message_dtype: Of floating point tensors on their way, where it is smaller than theirs.
        device: Where the stage lives.
        first_batch: The number of the first batch.
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
        first_batch: int = 0,
        message_dtype: torch.dtype | None = None,
    ) -> None:
        self.root, self.slots, self.plan, self.stage, self._delay = root, slots, plan, stage, delay
        self.transport, self.mode, self.seed, self.device = transport, mode, seed, device
        self.in_flight: deque[InFlight] = deque()
        self.num_forwards = self._flushed_at = first_batch
        self.ending = Wish(0)  # whether training ends, and how
        self.whole = False  # set while all parameters have their values on this process
        self.is_last = stage == plan.num_stages - 1
        self.own = {name: p for name, p in slots.parameters.items() if stage in plan.stage_of(name)}
        ghosts = GhostMode()
        #: What stands for the loss on a stage that does not have it.
        self.absent_loss = ghosts.like(torch.zeros(()), _OF_THE_LAST, False, device)
        self._others = {
            name: ghosts.like(p, f"the parameter `{name}` of stage {owner}", False, device, owner)
            for name, p in slots.parameters.items()
            for owner in plan.stage_of(name)
            if name not in self.own
        }
        hidden = {
            name: ghosts.like(p, f"the shared parameter `{name}`", False, device, plan.stage_of(name)[0])
            for name, p in self.own.items()
            if name in plan.shared
        }
        self._skips = Skips(root, ghosts, partial(slots.holding, hidden) if hidden else nullcontext)
        self._wiring = Wiring(plan, stage)
        self.messages = Messages(stage, self._wiring, transport, message_dtype)
        #: The modules whose calls must come here: not those inside of what this stage runs as a whole.
        self.watched = {path for path, owner in plan.modules.items() if owner != stage or path in plan.visible}
        owners = [(plan.modules.get(path), module) for path, module in root.named_modules() if module._buffers]
        self._with_buffers = [module for owner, module in owners if owner in (None, stage)]
        self._shared_buffers: list[dict[str, Any]] = [m._buffers for owner, m in owners if owner is None]
        self._toggled = [(root.get_submodule(path).__dict__, name) for path, name in plan.toggled]
        self._forward: Forward | None = None
        self._have_trained: set[str] = set()  # what an optimizer may still have gradients of
        self._is_backward = False
        self.has_run_backward = False  # in this iteration
        self.averaging: Averaging | None = None  # if there are several replicas
        self.optimizers: Sequence[Optimizer] = ()
        self.updates: Updates | None = None  # if a remedy concerns them
        self.is_synchronous = False  # whether all stages wait for each other
        self.timing: Callable[[str], AbstractContextManager[None]] | None = None  # around calls of this stage
        self.agree: Callable[[Wish], Wish] = lambda wishes: wishes  # of the first stages of all replicas

    # ----- the two halves of an iteration

    @property
    def delay(self) -> int:
        """How many batches stay in flight between two iterations."""
        return 0 if self.is_synchronous else self._delay

    def _weights(self) -> dict[str, Tensor]:
        """With what a forward runs, apart from the weights of today."""
        if self.mode == "replay" and self.delay > 0:
            return {}
        copies: Mapping[str, nn.Parameter] = {} if self.messages.shared is None else self.messages.shared.copies
        predicted = {} if self.updates is None else self.updates.predicted(self.own)
        self._have_trained |= {name for name, p in self.own.items() if p.requires_grad}
        others = {name: p for name, p in self.own.items() if name not in predicted} if self.delay > 0 else {}
        weights = take_snapshot(others, self._have_trained) | predicted
        return weights | {name: as_leaf(weights.get(name, copy)) for name, copy in copies.items()}

    def forward(self, step: Callable[[], Any]) -> Any:
        """Run this stage's part of ``step`` on the next batch and keep what its backward needs.

        Returns:
            What ``step`` returned on the last stage, ``None`` on the others.
        """
        self.messages.tell_norms()
        batch = self.num_forwards
        graph_later = self.mode != "stash" and self.delay > 0
        self.has_run_backward = False
        record = InFlight(batch, step, self._weights())
        if graph_later:
            record.attributes = attributes_of_now(self.root)
        forward = self._forward_of(record, keeps_inputs=graph_later)
        with torch.no_grad() if graph_later else buffers_kept(self._with_buffers if self.delay > 0 else []):
            result = self._run(forward)
        for source in self._wiring.sources:
            forward.message(source)  # also those that nothing asked for
        forward.settle()
        self.messages.read_activations(record)
        if self.stage == 0:
            wishes, self.messages.wishes = self.messages.wishes, Wish(0)
            self.messages.granted = self.agree(wishes)
        self.ending |= self.messages.granted & (Wish.END | Wish.TERMINATE | Wish.INTERRUPT)
        self.messages.send_activations(record, has_graph=not graph_later)
        if graph_later:
            record.exits.clear()
        else:
            record.received.clear()
        self.num_forwards += 1
        self.in_flight.append(record)
        if self.messages.shared is not None:
            self.messages.shared.iterate(self.is_synchronous)
        return result

    def evaluate(self, step: Callable[[], Any]) -> Any:
        """Run this stage's part of a ``step`` that has no backward.

        If the step fails here the messages are exchanged nevertheless, so that another one can follow.

        Returns:
            What ``step`` returned on the last stage, ``None`` on the others.
        """
        record = InFlight(self.num_forwards, step, {})
        forward = self._forward_of(record, keeps_inputs=False)
        try:
            result = self._run(forward)
        finally:
            for source in self._wiring.sources:
                forward.message(source)
            self.messages.send_activations(record)
            self.num_forwards += 1
        forward.settle()
        return result

    def request(self, wish: Wish) -> None:
        """Let ``wish`` be granted on all stages after the same batch, soon."""
        self.messages.wishes |= wish

    @property
    def due(self) -> bool:
        """Whether the oldest batch in flight has its backward in this iteration."""
        return len(self.in_flight) > self.delay

    def backward(self, of_loss: Callable[[], Any], is_step: bool = True) -> None:
        """Run this stage's part of the backward of the oldest batch in flight.

        Args:
            of_loss: Runs the backward from the loss, or from what :meth:`averaged` makes of it; called on the last
                stage alone.
            is_step: Whether a step of the optimizer follows.
        """
        record, self.has_run_backward = self.in_flight.popleft(), True
        shared = self.messages.shared
        with ExitStack() as stack:
            if self.mode != "stash" and self.delay > 0:
                forward = self._forward_of(record, keeps_inputs=False)
                if self.mode == "replay" and shared is not None:
                    record.parameters.update({name: as_leaf(copy) for name, copy in shared.copies.items()})
                with torch.enable_grad(), record.attributes():  # it must read the same, and not count twice
                    self._run(forward)
                record.received.clear()
            if record.parameters:
                # Code that runs modules again in the backward, as activation checkpointing does, must see old weights.
                stack.enter_context(self.slots.holding(record.parameters))
            if self.averaging is not None:
                stack.enter_context(self.averaging.backward(is_step))
            self._is_backward = True
            try:
                of_loss() if self.is_last else self._backward_from_errors(record)
            finally:
                self._is_backward = False
        contributed = {} if shared is None else shared.take(record.parameters)
        self.messages.note_norms(is_step, record.batch)
        self.messages.send_errors(record, contributed)

    def _backward_from_errors(self, record: InFlight) -> None:
        roots, errors = self.messages.receive_errors(record, list(self.own.values()))
        if self.averaging is not None:
            roots = self.averaging.roots(*roots)
            errors.append(torch.zeros_like(roots[-1]))
        if roots:
            torch.autograd.backward(roots, errors)

    def averaged(self, loss: Tensor) -> Tensor:
        """The loss, such that its backward leaves averages over all replicas."""
        return loss if self.averaging is None else self.averaging.root(loss)

    @property
    def squares(self) -> Tensor | None:
        """The squared norm of each stage's newest gradient, as far as this one knows, if wanted."""
        notes = self.messages.notes
        return notes.squares if notes is not None and notes.takes_norms else None

    def parts(self) -> list[Part]:
        """This stage's parameters, and what tells the norm of all gradients as far as it knows; none: unknown."""
        notes = self.messages.notes
        if notes is None or not notes.are_known:
            return []
        return [Part(self._updated(), notes.total_norm, notes.note_clipping)]

    def updated_gradients(self) -> list[Tensor]:
        """Those of the gradients that the optimizer uses."""
        return [p.grad for p in self._updated() if p.grad is not None]

    def gradients(self) -> list[Tensor]:
        """What is ``.grad`` now."""
        return [p.grad for p in self.own.values() if p.grad is not None]

    def _updated(self) -> list[nn.Parameter]:
        return updated_by(self.optimizers, self.own.values())

    @property
    def num_in_flight(self) -> int:
        """How many batches have had no backward yet, here or where the gradients of copies come from."""
        return max(len(self.in_flight), 0 if self.messages.shared is None else self.messages.shared.num_in_flight)

    def drain(self, is_open: bool, is_step: bool) -> None:
        """One iteration of the flush.

        Args:
            is_open: Whether the present gradients wait for a step.
            is_step: Whether one follows.
        """
        self.has_run_backward = False
        if self.messages.shared is not None:
            self.messages.shared.drain()
        if self.in_flight:
            self.backward(_no_loss, is_step)
        elif is_step and is_open:  # without a backward that would reduce what has added up
            if self.averaging is not None:
                self.averaging.reduce_kept()
            self.messages.note_norms(True)

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
        self.messages.tell_norms()
        self.messages.pass_notes_on(self.num_forwards)
        return True

    def end_flush(self) -> None:
        """Let the last stage know all notes, for a checkpoint, and wait for neighbours: a collective may come next."""
        self.messages.pass_notes_on(self.num_forwards)
        if self.messages.notes is not None and self.is_last:
            self.messages.notes.settle()
        self.messages.wait_for_neighbours(self.num_forwards)
        if self.messages.shared is not None:
            self.messages.shared.check(self.num_forwards)

    # ----- inside a step

    def on_call(
        self, call: Callable[..., Any], module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Handle the call of a module; see :data:`lightning_dgmp.calls.CallHandler`."""
        if self._forward is not None:
            return self._forward.on_call(call, path, args, kwargs)
        if self._is_backward:  # activation checkpointing runs it again
            self._is_backward = self.plan.modules.get(path) is None  # then calls inside are seen too
            try:
                with aligned(self.device):
                    return call(*args, **kwargs)
            finally:
                self._is_backward = True
        if self.whole or not any(self.slots.names.get(p) in self._others for p in module.parameters()):
            return call(*args, **kwargs)
        raise GhostError(
            f"`{path or type(module).__name__}` was called outside of a step on stage {self.stage}, which holds only a"
            " part of it. Call modules in `training_step` or `validation_step`, after `trainer.fit`, or within `with"
            " trainer.strategy.whole_model():`, which all processes must enter at the same point."
        )

    def on_function(self, apply: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handle a custom autograd function; see :func:`lightning_dgmp.calls.custom_functions`."""
        return apply(*args, **kwargs) if self._forward is None else self._forward.on_function(apply, args, kwargs)

    def _forward_of(self, record: InFlight, keeps_inputs: bool) -> Forward:
        randomness = StepRandomness(self.seed, record.batch, self.device)
        receive = partial(self.transport.receive, ACTIVATIONS, batch=record.batch)
        how = randomness, receive, record, keeps_inputs, self.timing
        return Forward(self.stage, self.plan, self._wiring, self._skips, *how)

    def _run(self, forward: Forward) -> Any:
        record = forward.record
        self._forward = forward
        toggled = [(attributes, name, attributes[name]) for attributes, name in self._toggled if name in attributes]
        try:
            with ExitStack() as stack:
                stack.enter_context(self.slots.holding(self._others | record.parameters))
                stack.enter_context(forward.step())
                result = record.step()
        except StepDone:
            result = None
            for attributes, name, value in toggled:  # as the rest of the step would have done
                attributes[name] = value
        except (GhostError, GhostRead) as read:
            if forward.done or (isinstance(read, GhostRead) and read.ghost.stage > self.stage):
                return None  # the rest is of later stages
            if isinstance(read, GhostError):
                raise
            raise GhostError(
                f"User code on stage {self.stage} of {self.plan.num_stages} needs a value that is not here: {read}."
                " Code in a step may read values only behind the network; move it there, or set `split_at` so that the"
                " value is made on the stage that reads it." + (f" {self.plan.why_missing()}." if self.is_last else "")
            ) from None
        finally:
            self._forward = None
        self._check_buffers()
        if not self.is_last:
            return None
        for ghost in tensors_in(result, Ghost):
            if not ghost.bound:
                raise GhostError(
                    f"`training_step` returned a value that depends on {ghost.describe()}, which did not travel to the"
                    f" last stage. {self.plan.why_missing()}."
                )
        return map_tensors(lambda t: t.received() if isinstance(t, Ghost) else t, result)

    def _check_buffers(self) -> None:
        for entries in self._shared_buffers:
            for name, buffer in entries.items():
                if isinstance(buffer, Ghost):
                    entries[name] = None
                    raise GhostError(
                        f"The buffer `{name}` was assigned a value that is not on stage {self.stage}:"
                        f" {buffer.describe()}. A module whose parts are on several stages must not keep such values in"
                        " a buffer; move it into the module that makes the value."
                    )


def _no_loss() -> None:
    raise AssertionError("The last stage has nothing in flight between iterations.")
