"""What each stage reports of itself to the last one, now and then, and without anybody waiting for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dgmp.clipping import norm_of
from lightning_dgmp.nests import leaves, tensors_in
from lightning_dgmp.stage.runner import StageRunner
from lightning_dgmp.timing import KINDS, Span
from lightning_dgmp.transport import REPORTS, Transport
from lightning_dgmp.wire import Message

__all__ = ["Report", "Reporter", "saved_by"]


class Report(NamedTuple):
    """What one stage has to say about the iterations since its last report.

    Attributes:
        step: The number of the report: the same on all stages.
        shares: How it has spent its time, by :data:`~lightning_dgmp.timing.KINDS` and ``"other"``; they sum to 1.
        spans: What it has done lately.
        period: Seconds an iteration.
        delay: How many updates its gradients are old.
        in_flight: How many batches it has forwarded and not yet run backward.
        bytes_sent: A step.
        parameter_bytes: Of its parameters.
        snapshot_bytes: Of the old weights that it keeps.
        activation_bytes: What it keeps of all batches in flight for their backward.
        gradient_norm: Of its own newest gradients.
        snapshot_distance: How far the oldest weights that it keeps are from those of now, relative to their norm.
    """

    step: int
    shares: dict[str, float]
    spans: list[Span]
    period: float
    delay: float
    in_flight: float
    bytes_sent: float
    parameter_bytes: float
    snapshot_bytes: float
    activation_bytes: float
    gradient_norm: float
    snapshot_distance: float

    @property
    def busy(self) -> float:
        """Seconds of an iteration in which the stage computes."""
        return self.period * sum(self.shares[kind] for kind in ("forward", "backward", "update"))


class Reporter:
    """Reports of one stage; on the last one, also those that have come from the others.

    All stages must make it together.

    Args:
        runner: The stage.
        transport: Its channels.
    """

    def __init__(self, runner: StageRunner, transport: Transport) -> None:
        self._runner, self._transport = runner, transport
        self._last = runner.plan.num_stages - 1
        self._clock = transport.clock
        self._arrived: dict[int, dict[int, Message]] = {}  # by step and stage; filled by threads
        self._marked = 0.0
        self._bytes_before = transport.bytes_sent
        self._batches_before = runner.num_forwards
        transport.collect(self._take)

    def follow(self, runner: StageRunner) -> None:
        """Report of another runner of the same stage from now on."""
        self._runner = runner
        self.restart()

    def restart(self) -> None:
        """Let what was before not count, as an evaluation."""
        self._clock.take()
        self._bytes_before, self._batches_before = self._transport.bytes_sent, self._runner.num_forwards

    def mark(self, since: float) -> None:
        """Let a later report without a limit bring all spans from a time on, of which those from now on are kept."""
        self._marked = since
        self._clock.keep_all(True)

    def report(self, step: int, updates_each: int, max_spans: int | None) -> None:
        """Send a report to the last stage, or keep it there.

        Args:
            step: Its number.
            updates_each: Over how many batches gradients are accumulated.
            max_spans: How many spans go with it at most; ``None``: all since :meth:`mark`.
        """
        tensors: list[Tensor] = []  # the others must not wait for a report that cannot be made
        try:
            tensors = self._measured(updates_each, max_spans)
        finally:
            message = Message(step, 0, [*tensors])
            if self._runner.is_last:
                self._take(self._last, message)
            else:
                self._transport.send(REPORTS, self._last, message)

    def _measured(self, updates_each: int, max_spans: int | None) -> list[Tensor]:
        runner = self._runner
        seconds, total = self._clock.take()
        spans = [span for span in self._clock.spans if max_spans is not None or span.start >= self._marked]
        if max_spans is None:
            self._clock.keep_all(False)
        else:
            spans = spans[-max_spans:]
        rows = torch.tensor([[KINDS.index(s.kind), *s[1:]] for s in spans], dtype=torch.float64).reshape(-1, 4)
        iterations = max(runner.num_forwards - self._batches_before, 1)
        sent = self._transport.bytes_sent - self._bytes_before
        self._bytes_before, self._batches_before = self._transport.bytes_sent, runner.num_forwards
        snapshots = [t for record in runner.in_flight for t in record.parameters.values()]
        plain = [
            *(seconds[kind] / total for kind in KINDS),
            total / iterations,
            runner.delay / updates_each,
            len(runner.in_flight),
            sent / iterations,
            sum(p.nbytes for p in runner.own.values()),
            _num_bytes(snapshots),
            self._activation_bytes() * len(runner.in_flight),
        ]
        host = torch.tensor(plain, dtype=torch.float64)
        norms = [_norm(runner.gradients(), runner), self._snapshot_distance()]
        return [host, torch.stack(norms), rows]  # without waiting for a device

    def complete(self) -> list[list[Report]]:
        """On the last stage: what all stages have sent since this was asked last, input first, oldest first.

        What one of them could not report is left out.
        """
        arrived_now = list(self._arrived.items())  # threads go on
        done = sorted(step for step, messages in arrived_now if len(messages) == self._last + 1)
        arrived = [self._arrived.pop(step) for step in done]
        whole = [messages for messages in arrived if all(message.tensors for message in messages.values())]
        return [[_read(messages[stage]) for stage in range(self._last + 1)] for messages in whole]

    @property
    def known_until(self) -> float:
        """On the last stage: all reports up to this step have come from all stages."""
        return min(list(self._arrived), default=math.inf) - 1

    def _take(self, stage: int, message: Message) -> None:
        self._arrived.setdefault(message.batch, {})[stage] = message

    def _activation_bytes(self) -> int:
        """Of the newest batch in flight."""
        if not self._runner.in_flight:
            return 0
        record = self._runner.in_flight[-1]
        weights = _storages([*self._runner.own.values(), *record.parameters.values()])
        found = _storages(saved_by(record.exits.values()))
        received = [t.nbytes for message in record.received.values() for t in message.tensors if t is not None]
        return sum(nbytes for key, nbytes in found.items() if key not in weights) + sum(received)

    def _snapshot_distance(self) -> Tensor:
        runner = self._runner
        old = runner.in_flight[0].parameters if runner.in_flight else {}
        trained = {name: p for name, p in runner.own.items() if p.requires_grad}  # others may be masks
        pairs = [(trained[name].detach(), value.detach()) for name, value in old.items() if name in trained]
        if not pairs:
            return torch.zeros((), device=runner.device)
        today = [now for now, _ in pairs]
        return _norm(torch._foreach_sub(today, [value for _, value in pairs]), runner) / _norm(today, runner).clamp(
            1e-30
        )


def _read(message: Message) -> Report:
    host, device, rows = (t for t in message.tensors if t is not None)
    *shares, period, delay, in_flight, sent, parameters, snapshots, activations = host.tolist()
    by_kind = {**dict(zip(KINDS, shares)), "other": max(1.0 - sum(shares), 0.0)}
    spans = [Span(KINDS[int(kind)], int(batch), start, end) for kind, batch, start, end in rows.tolist()]
    numbers = period, delay, in_flight, sent, parameters, snapshots, activations, *device.tolist()
    return Report(message.batch, by_kind, spans, *numbers)


def _norm(tensors: Sequence[Tensor], runner: StageRunner) -> Tensor:
    if not tensors:
        return torch.zeros((), device=runner.device)
    try:
        return norm_of([t.coalesce().values() if t.is_sparse else t for t in tensors]).double()
    except (RuntimeError, TypeError):  # torch cannot add them up; a report never stops a training
        return torch.zeros((), dtype=torch.float64, device=runner.device)


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(_storages(tensors).values())


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of each storage, by where it is."""
    storages = (t.untyped_storage() for t in tensors if t.layout == torch.strided)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def saved_by(roots: Iterable[Tensor]) -> list[Tensor]:
    """What the graph behind ``roots`` keeps for the backward.

    The finished graph is looked through, because hooks around the forward would exclude `torch.func`; and nothing is
    unpacked, which would run checkpointed code again.
    """
    waiting = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen, found = set(waiting), []
    while waiting:
        node = waiting.pop()
        for name in _saved_names(type(node)):
            try:
                raw = getattr(node, name)
            except RuntimeError:  # freed
                continue
            found += [t for saved in leaves(raw) if saved is not None for t in tensors_in(saved.data)]
        new = {function for function, _ in node.next_functions if function is not None} - seen
        seen |= new
        waiting += new
    return [t for t in found if type(t) is Tensor]  # ghosts and parameters keep nothing


@cache
def _saved_names(kind: type) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_raw_saved")]
