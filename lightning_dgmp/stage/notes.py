"""Norms of gradients and scales of losses, which ride along with the values of a batch.

So each stage can clip by the norm of all, and knows by what its gradients are scaled.

Nobody waits for them. With the activations of a batch a stage learns the newest about earlier stages, with its errors
what later stages made of the same batch. So at its iteration ``t`` stage ``k`` knows the gradient of stage ``j < k`` as
it was after iteration ``t - 1``, and that of stage ``j > k`` as after iteration ``t - (d_k - d_j)``, in which ``j`` ran
the backward of the same batch. What is not known yet counts as zero.

Norms are those that the backward leaves. Where hooks may change gradients behind it, errors do not wait for that: norms
are measured when they are wanted, at the latest after clipping, and go to the stage before in a message of their own.
That stage wants them behind its backward of the same batch, which takes longer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_dgmp.clipping import norm_of
from lightning_dgmp.precision import StageGradScaler
from lightning_dgmp.transport import NORMS, Transport
from lightning_dgmp.wire import Message

__all__ = ["StageNotes", "VirtualNotes"]


class StageNotes:
    """What one stage knows. Vectors hold the squared norm of each stage's newest gradient, in float32.

    With a scaler they have one number more: to later stages the smallest scale that has overflowed, to earlier ones
    the scale of the errors.

    Args:
        stage: The number of this stage.
        squares: What it knows at first.
        gradients: Tells its gradients as they are now.
        norms: Whether norms are wanted.
        scaler: Of its gradients, if any.
        late: By which norms travel for themselves, if hooks may change gradients.
    """

    def __init__(
        self,
        stage: int,
        squares: Tensor,
        gradients: Callable[[], Sequence[Tensor]],
        norms: bool = True,
        scaler: StageGradScaler | None = None,
        late: Transport | None = None,
    ) -> None:
        self._stage, self.squares, self._gradients = stage, squares, gradients
        self.takes_norms, self._scaler, self._late = norms, scaler, late
        self.are_known = False  # the norms, of the gradients that are there
        self._clipped: Tensor | None = None  # by what gradients were multiplied since they were noted
        self._is_open = False  # whether hooks may still change them
        self._unheard: int | None = None  # of which batch the stage behind has not told its norm
        self._untold: int | None = None  # ... this stage
        if late is not None:
            late.share(((k + 1, k) for k in range(len(squares) - 1)), NORMS)

    def note(self, is_step: bool, batch: int | None = None) -> None:
        """Note the norm of this stage's gradients, if late as it is at clipping.

        Without any, or if it overflows, the last one counts.

        Args:
            is_step: Whether a step of the optimizer follows. If not, the last one counts too.
            batch: Whose backward has left them, if one has.
        """
        self.are_known, self._clipped = is_step and self.takes_norms, None
        if self._late is None:
            self._measure()
        else:
            self._is_open, self._unheard, self._untold = True, batch, batch

    def _measure(self) -> None:
        batch, self._unheard = self._unheard, None
        if self._late is not None and batch is not None and self._stage + 1 < len(self.squares):
            squares = self._late.receive(NORMS, self._stage + 1, batch).tensors[0]
            assert squares is not None
            self._take(squares)
        if self.are_known and self._clipped is None:
            scale = None if self._scaler is None else self._scaler.scale_now
            self.squares = _with(self.squares, self._stage, self._gradients(), scale)

    def total_norm(self) -> Tensor:
        """The norm of the gradients of all stages, as far as this one knows."""
        if self._is_open:
            self._measure()
        norm = self.squares.sum().sqrt()
        return norm if self._clipped is None else norm * self._clipped

    def tell(self) -> None:
        """After clipping, or where no step follows: hooks change no gradients any more."""
        if not self._is_open:
            return
        self._measure()
        batch, self._untold, self._is_open = self._untold, None, False
        if self._late is not None and batch is not None and self._stage > 0:
            self._late.send(NORMS, self._stage - 1, Message(batch, 0, [self.squares]))

    def note_clipping(self, factor: Tensor) -> None:
        """Note by what the gradients were multiplied."""
        self._clipped = factor if self._clipped is None else self._clipped * factor

    def to_later(self) -> Tensor:
        """What goes with activations."""
        return self.squares if self._scaler is None else _and(self.squares, self._scaler.tell())

    def to_earlier(self) -> Tensor:
        """What goes with errors."""
        return self.squares if self._scaler is None else _and(self.squares, self._scaler.scale_here)

    def from_earlier(self, notes: Tensor) -> None:
        """What came with activations."""
        self.squares = torch.cat((notes[: self._stage], self.squares[self._stage :]))
        if self._scaler is not None:
            self._scaler.hear(notes[-1])

    def from_later(self, notes: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """What came with errors for the gradients of ``parameters``, which are about to be computed."""
        self._take(notes)
        if self._scaler is not None:
            self._scaler.use(notes[-1], parameters)

    def _take(self, notes: Tensor) -> None:
        self.squares = torch.cat((self.squares[: self._stage + 1], notes[self._stage + 1 : len(self.squares)]))

    def settle(self) -> None:
        """At the end of a flush, on the last stage, which knows about all."""
        if self._scaler is not None:
            self._scaler.settle()


class VirtualNotes:
    """What all stages know in one process, each as late as if it had travelled.

    Args:
        squares: What all know at first.
        delays: Of the stages.
    """

    def __init__(self, squares: Tensor, delays: Sequence[int]) -> None:
        self.squares = self._earlier = squares
        self._delays = delays
        self._told = deque([squares] * (delays[0] + 1), delays[0] + 1)  # with errors, by iteration, the newest last
        self._have_told = torch.zeros(len(delays), dtype=torch.bool, device=squares.device)  # in this iteration
        self._is_synchronous = False
        self._num_in_flight: int | None = None  # on the first stage, at the beginning of a flush
        self._clipped: dict[int, Tensor] = {}  # by what gradients of a stage were multiplied since they were noted

    def begin(self, num_in_flight: int | None = None) -> None:
        """Before an iteration, and before a flush of so many batches: activations travel."""
        self._earlier, self._num_in_flight = self.squares, num_in_flight

    def end(self, had_backward: Sequence[bool], is_synchronous: bool = False) -> None:
        """After an iteration.

        Only stages that have run a backward in it have sent errors. In a synchronous one they have arrived in it.
        """
        self._is_synchronous, self._clipped = is_synchronous, {}
        self._have_told = torch.tensor(had_backward, device=self.squares.device)
        self._told.append(torch.where(self._have_told, self.squares, self._told[-1]))

    def note(self, gradients: Sequence[Sequence[Tensor]]) -> None:
        """Note the norms of each stage's gradients in this iteration; without any, the last one counts."""
        for stage, own in enumerate(gradients):
            if stage not in self._clipped:
                self.squares = _with(self.squares, stage, own)
        self._told[-1] = torch.where(self._have_told, self.squares, self._told[-1])

    def total_norm(self, stage: int) -> Tensor:
        """The norm of the gradients of all stages, as far as ``stage`` knows."""
        most = self._delays[0] if self._num_in_flight is None else self._num_in_flight
        mine, *others = (min(most, delay) for delay in self._delays[stage:])  # a flush may find fewer batches
        ages = [0 if self._is_synchronous else mine - delay for delay in others]
        later = [self._told[-1 - age][j : j + 1] for j, age in enumerate(ages, stage + 1)]
        squares = torch.cat((self._earlier[:stage], self.squares[stage : stage + 1], *later))
        return squares.sum().sqrt() * self._clipped.get(stage, 1.0)

    def note_clipping(self, stage: int, factor: Tensor) -> None:
        """Note by what the gradients of ``stage`` were multiplied."""
        self._clipped[stage] = self._clipped.get(stage, torch.ones_like(factor)) * factor


def _with(squares: Tensor, stage: int, gradients: Sequence[Tensor], scale: Tensor | None = None) -> Tensor:
    if not gradients:
        return squares
    new, norm = squares.clone(), norm_of(gradients).float()
    new[stage] = (norm if scale is None else norm / scale) ** 2
    return torch.where(new.isfinite(), new, squares)


def _and(squares: Tensor, number: Tensor) -> Tensor:
    return torch.cat((squares, number.reshape(1)))
