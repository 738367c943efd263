"""What a stage tells its neighbours about a batch, and hears from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_dgmp.stage.forward import InFlight
from lightning_dgmp.stage.notes import StageNotes
from lightning_dgmp.stage.shared import SharedParameters
from lightning_dgmp.stage.wiring import Wiring
from lightning_dgmp.transport import ACTIVATIONS, ERRORS, Transport
from lightning_dgmp.wire import Message, Wish

__all__ = ["Messages"]


class Messages:
    """Activations to later stages and errors to earlier ones, with what rides along.

    Args:
        stage: The number of this stage.
        wiring: What goes where.
        transport: Its channels.
        dtype: Of floating point tensors on their way, where it is smaller than theirs.

    Attributes:
        notes: Norms and scales, if they are to ride along.
        shared: Parameters that live on several stages, if there are any.
        wishes: What is to be told to earlier stages.
        granted: What all stages do after the last batch.
    """

    def __init__(self, stage: int, wiring: Wiring, transport: Transport, dtype: torch.dtype | None) -> None:
        self._stage, self._wiring, self._transport, self._dtype = stage, wiring, transport, dtype
        self.notes: StageNotes | None = None
        self.shared: SharedParameters | None = None
        self.wishes = Wish(0)
        self.granted = Wish(0)

    def send_activations(self, record: InFlight, has_graph: bool = True) -> None:
        """Send what others need; without a graph yet, errors are wanted for all that can have one."""
        for target, count in self._wiring.targets.items():
            sent = [record.exits.get((target, slot)) for slot in range(count)]
            tensors = [None if t is None else self._narrow(t.detach()) for t in sent]
            wants = [
                t is not None and (t.requires_grad if has_graph else t.is_floating_point() or t.is_complex())
                for t in sent
            ]
            tensors += self._notes_for(target)
            shapes = len(record.shapes) - 1, record.shapes[-1]
            message = Message(record.batch, self.granted, tensors, differentiable=wants, shapes=shapes)
            self._transport.send(ACTIVATIONS, target, message)

    def read_activations(self, record: InFlight) -> None:
        """Take what came with them, but for the values themselves."""
        if self._stage > 0:
            self._note(record.received[self._stage - 1])
            self.granted = Wish(next(iter(record.received.values())).wishes)

    def send_errors(self, record: InFlight, contributed: Mapping[str, Tensor | None]) -> None:
        """Send the errors of a batch, and what this stage contributes to the gradients of shared parameters."""
        for source, count in self._wiring.sources.items():
            found = [e.error if (e := record.entries.get((source, slot))) else None for slot in range(count)]
            errors = [None if error is None else self._narrow(error) for error in found]
            if self.shared is not None:
                errors += self.shared.contributions(contributed, source)
            wishes = Wish(0)
            if source == self._stage - 1:  # one way for each, or it would be granted twice
                wishes, self.wishes = self.wishes, wishes
                if self.notes is not None:
                    errors.append(self.notes.to_earlier())
            self._transport.send(ERRORS, source, Message(record.batch, wishes, errors))
        if self.notes is not None and not self.notes.are_known:  # no step follows, so nobody clips
            self.notes.tell()

    def receive_errors(self, record: InFlight, parameters: Sequence[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
        """Wait for the errors of a batch; ``parameters`` get gradients from it.

        Returns:
            With what its backward begins, and the errors of that.
        """
        roots: list[Tensor] = []
        errors: list[Tensor] = []
        for target, count in self._wiring.targets.items():
            message = self._transport.receive(ERRORS, target, record.batch)
            self.wishes |= Wish(message.wishes)
            if self.notes is not None and target == self._stage + 1:
                self.notes.from_later(_last(message), parameters)
            for slot, error in enumerate(message.tensors[:count]):
                root = record.exits.get((target, slot))
                if root is not None and error is not None and root.requires_grad:
                    roots.append(root)
                    errors.append(error.to(root.dtype))
            if self.shared is not None:
                for root, error in self.shared.roots(target, message.tensors[count:], record.parameters):
                    roots.append(root)
                    errors.append(error)
        return roots, errors

    def note_norms(self, is_step: bool, batch: int | None = None) -> None:
        """Note the norm of the gradients that are there; see :meth:`StageNotes.note`."""
        if self.notes is not None:
            self.notes.note(is_step, batch)

    def tell_norms(self) -> None:
        """Hooks change the gradients no more."""
        if self.notes is not None:
            self.notes.tell()

    def pass_notes_on(self, batch: int) -> None:
        """Without activations: none come before ``batch``.

        Raises:
            PeerError: If a neighbour is at another batch.
        """
        for source in self._wiring.sources:
            message = self._transport.receive(ACTIVATIONS, source, batch, flush=True)
            if source == self._stage - 1:
                self._note(message)
        for target in self._wiring.targets:
            self._transport.send(ACTIVATIONS, target, Message(batch, 0, self._notes_for(target), flush=True))

    def wait_for_neighbours(self, batch: int) -> None:
        """Until those behind have no errors either."""
        for source in self._wiring.sources:
            self._transport.send(ERRORS, source, Message(batch, 0, [], flush=True))
        for target in self._wiring.targets:
            self._transport.receive(ERRORS, target, batch, flush=True)

    def _notes_for(self, target: int) -> list[Tensor | None]:
        return [self.notes.to_later()] if self.notes is not None and target == self._stage + 1 else []

    def _note(self, message: Message) -> None:
        if self.notes is not None:
            self.notes.from_earlier(_last(message))

    def _narrow(self, tensor: Tensor) -> Tensor:
        dtype = self._dtype
        is_wider = dtype is not None and tensor.is_floating_point() and tensor.dtype.itemsize > dtype.itemsize
        return tensor.to(dtype) if is_wider else tensor


def _last(message: Message) -> Tensor:
    notes = message.tensors[-1]
    assert notes is not None
    return notes
