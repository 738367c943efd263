"""Norms of gradients, which ride along with the values of a batch, so that each stage can clip by the norm of all.

Nobody waits for them. With the activations of a batch a stage learns the newest about earlier stages, with its errors
what later stages made of the same batch. So at its iteration ``t`` stage ``k`` knows the gradient of stage ``j < k`` as
it was after iteration ``t - 1``, and that of stage ``j > k`` as after iteration ``t - (j - k)``, in which ``j`` ran the
backward of the same batch. What is not known yet counts as zero.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["StageNotes", "VirtualNotes"]


class StageNotes:
    """What one stage knows. Vectors hold the squared norm of each stage's newest gradient, in float32.

    Args:
        stage: Which stage this is.
        num_stages: How many there are.
        device: Where its gradients are.
    """

    def __init__(self, stage: int, num_stages: int, device: torch.device) -> None:
        self._stage, self._squares = stage, torch.zeros(num_stages, device=device)

    def note(self, gradients: Iterable[Tensor]) -> None:
        """Note the norm of this stage's gradients; without any, the last one counts."""
        self._squares = _with(self._squares, self._stage, list(gradients))

    def total_norm(self) -> Tensor:
        """The norm of the gradients of all stages, as far as this one knows."""
        return self._squares.sum().sqrt()

    def to_later(self) -> Tensor:
        """What goes with activations."""
        return self._squares

    to_earlier = to_later  #: What goes with errors.

    def from_earlier(self, squares: Tensor) -> None:
        self._squares = torch.cat((squares[: self._stage], self._squares[self._stage :]))

    def from_later(self, squares: Tensor) -> None:
        self._squares = torch.cat((self._squares[: self._stage + 1], squares[self._stage + 1 :]))


class VirtualNotes:
    """What all stages know in one process, each as late as if it had travelled.

    Args:
        num_stages: How many stages there are.
        device: Where the gradients are.
    """

    def __init__(self, num_stages: int, device: torch.device) -> None:
        self._squares = self._earlier = torch.zeros(num_stages, device=device)
        self._told = deque([self._squares] * num_stages, num_stages)  # with errors, by iteration, the newest last

    def begin(self) -> None:
        """Before an iteration, and before a flush: activations travel."""
        self._earlier = self._squares

    def note(self, gradients: Sequence[Sequence[Tensor]], had_backward: Sequence[bool]) -> None:
        """Note the norms of each stage's gradients after an iteration; without any, the last one counts.

        Only stages that have run a backward in it have sent errors.
        """
        for stage, own in enumerate(gradients):
            self._squares = _with(self._squares, stage, own)
        have_told = torch.tensor(had_backward, device=self._squares.device)
        self._told.append(torch.where(have_told, self._squares, self._told[-1]))

    def total_norm(self, stage: int) -> Tensor:
        """The norm of the gradients of all stages, as far as ``stage`` knows."""
        later = [self._told[stage - j - 1][j : j + 1] for j in range(stage + 1, len(self._earlier))]
        return torch.cat((self._earlier[:stage], self._squares[stage : stage + 1], *later)).sum().sqrt()


def _with(squares: Tensor, stage: int, gradients: Sequence[Tensor]) -> Tensor:
    if not gradients:
        return squares
    new = squares.clone()
    new[stage] = torch.nn.utils.get_total_norm(gradients).float() ** 2
    return new
