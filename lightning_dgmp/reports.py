"""What each stage reports of itself to the last one, now and then, and without anybody waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_dgmp.clipping import norm_of
from lightning_dgmp.stage.runner import StageRunner
from lightning_dgmp.timing import KINDS, Span
from lightning_dgmp.transport import REPORTS, Transport
from lightning_dgmp.wire import Message

__all__ = ["Report", "Reporter"]


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
        self._activation_bytes = 0  # of one batch
        self._counts_next = True
        self._marked = 0.0
        self._bytes_before = transport.bytes_sent
        self._batches_before = runner.num_forwards
        transport.collect(self._take)

    def follow(self, runner: StageRunner) -> None:
        """Report of another runner of the same stage from now on."""
        self._runner, self._counts_next = runner, True
        self.restart()

    def restart(self) -> None:
        """Let what was before not count, as an evaluation."""
        self._clock.take()
        self._bytes_before, self._batches_before = self._transport.bytes_sent, self._runner.num_forwards

    def watching_forward(self) -> AbstractContextManager[None]:
        """Around a forward: now and then what it keeps for the backward is counted."""
        if not self._counts_next:
            return nullcontext()
        self._counts_next = False
        return self._counting()

    @contextmanager
    def _counting(self) -> Iterator[None]:
        weights = {p.untyped_storage().data_ptr() for p in self._runner.own.values()}
        found: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            if type(tensor) is Tensor:  # ghosts and parameters keep nothing
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(count, lambda tensor: tensor):
            yield
        if not self._runner.in_flight:
            return
        record = self._runner.in_flight[-1]
        weights |= {t.untyped_storage().data_ptr() for t in record.parameters.values()}
        self._activation_bytes = sum(nbytes for key, nbytes in found.items() if key not in weights)
        for message in record.received.values():
            self._activation_bytes += sum(t.nbytes for t in message.tensors if t is not None)

    def mark(self) -> None:
        """Let a later report without a limit bring all spans from now on, as far as they are kept."""
        self._marked = time.time()

    def report(self, step: int, updates_each: int, max_spans: int | None) -> None:
        """Send a report to the last stage, or keep it there.

        Args:
            step: Its number.
            updates_each: Over how many batches gradients are accumulated.
            max_spans: How many spans go with it at most; ``None``: all since :meth:`mark`.
        """
        runner = self._runner
        seconds, total = self._clock.take()
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
            self._activation_bytes * len(runner.in_flight),
        ]
        self._counts_next = True
        host = torch.tensor(plain, dtype=torch.float64)
        device = torch.stack(
            [_norm(runner.gradients(), runner), self._snapshot_distance()]
        )  # without waiting for a device
        spans = [span for span in self._clock.spans if max_spans is not None or span.start >= self._marked]
        spans = spans if max_spans is None else spans[-max_spans:]
        rows = torch.tensor([[KINDS.index(s.kind), *s[1:]] for s in spans], dtype=torch.float64).reshape(-1, 4)
        message = Message(step, 0, [host, device, rows])
        if runner.is_last:
            self._take(self._last, message)
        else:
            self._transport.send(REPORTS, self._last, message)

    def complete(self) -> list[list[Report]]:
        """On the last stage: what all stages have sent since this was asked last, input first, oldest first."""
        arrived_now = list(self._arrived.items())  # threads go on
        done = sorted(step for step, messages in arrived_now if len(messages) == self._last + 1)
        arrived = [self._arrived.pop(step) for step in done]
        return [[_read(messages[stage]) for stage in range(self._last + 1)] for messages in arrived]

    def _take(self, stage: int, message: Message) -> None:
        self._arrived.setdefault(message.batch, {})[stage] = message

    def _snapshot_distance(self) -> Tensor:
        runner = self._runner
        old = runner.in_flight[0].parameters if runner.in_flight else {}
        pairs = [(runner.own[name].detach(), value.detach()) for name, value in old.items() if name in runner.own]
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
    return norm_of(tensors).double()


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
