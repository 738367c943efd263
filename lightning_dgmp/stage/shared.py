"""Parameters that live on several stages, as tied embeddings do: copies that stay equal bit by bit.

The gradient of a shared parameter is the sum of what its stages contribute for the *same batch*, and all copies are
updated with it at the same iteration, that in which the first of the stages, the *home*, runs the backward of the
batch: the delay of a shared parameter is that of its home, everywhere. A stage sends its contribution with the errors
of the batch to the stage before it that has a copy, which adds its own, so that the home has the sum in time. The home
clips it and gives the result to the others, which need it at the end of the same iteration. That is later in wall time
for later stages, so in the steady state nobody waits::

    last stage   F5 B5 | contribution of batch 5, sent up with its errors
    home         F7 B5 | adds its own, clips, sends the result down, updates
    last stage   F7 B7 | contribution of batch 7; updates with the result of batch 5
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_dgmp.plan.plan import Plan
from lightning_dgmp.transport import SHARED, Transport
from lightning_dgmp.wire import Message

__all__ = ["DriftError", "SharedParameters"]


class DriftError(RuntimeError):
    """Copies of a shared parameter differ."""


class SharedParameters:
    """The copies that one stage holds.

    Args:
        plan: Which stages hold which.
        stage: The number of this stage.
        own: Its parameters.
        transport: Its channels, open along the edges of the plan.
    """

    def __init__(self, plan: Plan, stage: int, own: Mapping[str, nn.Parameter], transport: Transport) -> None:
        self._stage, self._own, self._transport = stage, own, transport
        shared = {name: stages for name, stages in plan.shared.items() if stage in stages}
        #: The parameters whose home is elsewhere.
        self.copies = {name: own[name] for name, stages in shared.items() if stages[0] != stage}
        self._later: dict[int, list[str]] = {}  # from which stage which contributions come
        self._earlier: dict[int, list[str]] = {}  # to which stage they go
        self._holders: dict[int, list[str]] = {}  # to which stage results go from here
        self._homes: dict[int, list[str]] = {}  # from which stage they come
        for name, stages in shared.items():
            for a, b in pairwise(stages):
                if stage == a:
                    self._later.setdefault(b, []).append(name)
                elif stage == b:
                    self._earlier.setdefault(a, []).append(name)
            if stage == stages[0]:
                for holder in stages[1:]:
                    self._holders.setdefault(holder, []).append(name)
            else:
                self._homes.setdefault(stages[0], []).append(name)
        delays = plan.delays
        self._delays = {home: delays[home] for home in [*self._homes, *([stage] if self._holders else [])]}
        self._in_flight = dict.fromkeys(self._delays, 0)  # on each home
        self._open = dict.fromkeys(self._delays, False)  # whether it has run a backward since the last step
        self._iteration = 0
        transport.share({(stages[0], holder) for stages in plan.shared.values() for holder in stages[1:]})

    @property
    def num_in_flight(self) -> int:
        """The batches that have had no backward yet on a home of what is here."""
        return max(self._in_flight.values(), default=0)

    def iterate(self, is_synchronous: bool) -> None:
        """Count an iteration with a forward."""
        self._iteration += 1
        for home, delay in self._delays.items():
            self._in_flight[home] += 1
            if is_synchronous or self._in_flight[home] > delay:
                self._in_flight[home] -= 1
                self._open[home] = True

    def drain(self) -> None:
        """Count an iteration of a flush."""
        self._iteration += 1
        for home, count in self._in_flight.items():
            if count:
                self._in_flight[home] -= 1
                self._open[home] = True

    def roots(
        self, source: int, contributions: Iterable[Tensor | None], weights: Mapping[str, Tensor]
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """What came with errors from a later stage: where a backward should begin too, and with which errors.

        Args:
            source: The stage.
            contributions: What it sent.
            weights: With what this stage has run the batch.
        """
        for name, contribution in zip(self._later.get(source, ()), contributions):
            parameter = weights[name] if name in self.copies else self._own[name]
            if contribution is not None and parameter.requires_grad:
                yield parameter.view_as(parameter), contribution

    def take(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """After a backward: what this stage contributes, from the ``weights`` of the copies that it ran with."""
        return {name: weights[name].grad for name in self.copies}

    def contributions(self, taken: Mapping[str, Tensor | None], target: int) -> list[Tensor | None]:
        """What goes with the errors to an earlier stage."""
        return [taken[name] for name in self._earlier.get(target, ())]

    def exchange(self, is_skipped: bool) -> None:
        """Before a step of the optimizer, after clipping: let the gradients of copies be those of their homes.

        Args:
            is_skipped: Whether this stage will make no step, because its gradients have overflowed.
        """
        for holder, names in self._holders.items():
            if self._open[self._stage]:
                grads = [None if is_skipped or (g := self._own[name].grad) is None else g.clone() for name in names]
                self._transport.send(SHARED, holder, Message(self._iteration, 0, grads))
        for home, names in self._homes.items():
            if self._open[home]:
                message = self._transport.receive(SHARED, home, self._iteration)
                for name, grad in zip(names, message.tensors):
                    self._own[name].grad = grad
        self._open = dict.fromkeys(self._open, False)

    def check(self, batch: int) -> None:
        """At the end of a flush, before ``batch``: compare copies with their homes.

        Raises:
            DriftError: If they differ.
        """
        self._iteration = batch  # for all, because stages count no iterations after those that concern them
        for holder, names in self._holders.items():
            sums = torch.stack([_checksum(self._own[name]) for name in names])
            self._transport.send(SHARED, holder, Message(self._iteration, 0, [sums], flush=True))
        for home, names in self._homes.items():
            message = self._transport.receive(SHARED, home, self._iteration, flush=True)
            assert message.tensors[0] is not None
            for name, theirs in zip(names, message.tensors[0].tolist()):
                if _checksum(self._own[name]).item() != theirs:
                    raise DriftError(
                        f"The copies of a shared parameter must stay equal, but `{name}` differs between stage {home}"
                        f" and stage {self._stage}. Change it through the optimizer alone, and let the optimizer treat"
                        " it alike on all stages."
                    )


def _checksum(tensor: Tensor) -> Tensor:
    """A sum of the bits of ``tensor``, without rounding."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
    return tensor.detach().contiguous().view(integers).sum(dtype=torch.int64)
