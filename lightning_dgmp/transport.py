"""Point-to-point messages between the stages of a replica.

One message a batch and direction goes between any two stages that exchange values: activations to later stages, errors
(the gradients with respect to them) back. Each channel, that is one peer in one direction, has a thread that receives
ahead and one that sends, so that the training thread waits only for what is not there yet, and for no one else::

    training thread   send() -> queue -> sending thread ~~ peer's receiving thread -> queue -> receive()

Messages describe themselves: integers first (kind, batch, flags, shapes), with which small tensors travel, then the
large ones. A third direction brings the batches of data from stage 0 to all others, two more let these ask it for more
of them, one brings the gradients of parameters that live on several stages, one reports to the last stage, and one
norms of gradients back that hooks may change.

With gloo, tensors of an accelerator travel through pinned host memory, so several stages can share one device. With
NCCL the headers still go over gloo and the tensors straight from device to device, one communicator a pair and
direction, because NCCL runs what it is given for one communicator in order. The NCCL path needs as many GPUs as stages
and has not been run by the tests of this project.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lightning_dgmp.timing import Clock, Kind
from lightning_dgmp.wire import ABORT, CLOSE, Arriving, Broken, Message, Staged, Wire
from lightning_dgmp.world import PeerError

__all__ = [
    "ACTIVATIONS",
    "DATA",
    "ERRORS",
    "NORMS",
    "REPORTS",
    "REQUESTS",
    "SHARED",
    "Peer",
    "Transport",
    "group_of_channels",
]

ACTIVATIONS = "activations"
ERRORS = "errors"
DATA = "data"
REQUESTS = "requests"
SHARED = "gradients of shared parameters"
REPORTS = "reports"
NORMS = "norms of gradients"
_REPLIES = "replies"
_DIRECTIONS = (ACTIVATIONS, ERRORS, DATA, REQUESTS, _REPLIES, SHARED, REPORTS, NORMS)
_WAITS: dict[str, Kind] = {ACTIVATIONS: "wait_activation", DATA: "wait_data", _REPLIES: "wait_data"}

_FOREVER = timedelta(days=365)
_LOOK = 0.3  # seconds between two looks whether who takes nothing is still there


class Peer(NamedTuple):
    """A stage and the global rank of the process that runs it."""

    stage: int
    rank: int

    def __str__(self) -> str:
        return f"stage {self.stage} (rank {self.rank})"


def group_of_channels(replicas: Sequence[Sequence[int]]) -> Any:
    """A process group for the transports of a replica, which all processes must make together.

    It serves any number of transports, one after the other, if all end well.

    Args:
        replicas: The global ranks of the stages of each.
    """
    # Threads receive ahead, also while nothing is to come for long: only who needs a message has a limit.
    return _group_of_own([sorted(ranks) for ranks in replicas], timeout=_FOREVER, backend="gloo")


def _group_of_own(candidates: Sequence[Sequence[int]], **kwargs: Any) -> Any:
    """The process group of those ranks to which this process belongs.

    All processes make all groups: a group that only its members make gets a name by how many groups a member has.
    """
    groups = [dist.new_group(list(ranks), **kwargs) for ranks in candidates]
    return next((group for group, ranks in zip(groups, candidates) if dist.get_rank() in ranks), None)


class Transport:
    """The channels of one stage. All processes of a replica must make it, and call :meth:`open`, together.

    Args:
        stage: The stage of this process.
        replicas: The global rank of each stage of each replica.
        replica: Which of them this is.
        group: Their :func:`group_of_channels`.
        device: Where received tensors should be.
        timeout: How long to wait for a message before giving up.
        over_nccl: Whether activations and errors go straight from device to device.
        num_in_flight: How many more messages than there are stages may be under way on a channel.

    Attributes:
        clock: Measures how long the training thread waits for messages.
        bytes_sent: In activations, errors and gradients of shared parameters so far.
    """

    def __init__(
        self,
        stage: int,
        replicas: Sequence[Sequence[int]],
        replica: int,
        group: Any,
        device: torch.device,
        timeout: timedelta,
        over_nccl: bool = False,
        num_in_flight: int = 0,
    ) -> None:
        self._bound = len(replicas[replica]) + 1 + num_in_flight
        self.timeout, self._group, self._device, self._over_nccl = timeout, group, device, over_nccl
        self._replicas = replicas
        self._peers = [Peer(k, rank) for k, rank in enumerate(replicas[replica])]
        self.me = self._peers[stage]
        self._in: dict[tuple[str, int], _Inbox] = {}
        self._out: dict[tuple[str, int], _Outbox] = {}
        self._retired: list[_Inbox | _Outbox] = []  # channels that faster ones have replaced
        self._edges: dict[tuple[int, int], bool] = {}  # whether straight from device to device
        self._pairs: set[tuple[str, int, int]] = set()  # with their direction, of :meth:`share`
        self.clock, self.bytes_sent = Clock(), 0
        for peer in self._peers[1:]:
            self._connect(DATA, self._peers[0], peer, torch.device("cpu"))

    def open(self, edges: Iterable[tuple[int, int]], by_all: bool = True) -> None:
        """Open the channels between pairs of stages that exchange activations and errors; they stay open.

        Args:
            edges: The pairs.
            by_all: Whether all replicas open the same channels now. If not, they go over the host, until all do.
        """
        over_nccl = self._over_nccl and (by_all or len(self._replicas) == 1)
        for edge in sorted(edge for edge in set(edges) if self._edges.get(edge, -1) < over_nccl):
            source, target = (self._peers[k] for k in edge)
            self._connect(ACTIVATIONS, source, target, self._device, over_nccl)
            self._connect(ERRORS, target, source, self._device, over_nccl)
            self._edges[edge] = over_nccl

    def share(self, pairs: Iterable[tuple[int, int]], direction: str = SHARED) -> None:
        """Open a channel of a ``direction`` from one stage to another for each pair that has none yet."""
        for _, source, target in sorted({(direction, *pair) for pair in pairs} - self._pairs):
            self._pairs.add((direction, source, target))
            self._connect(direction, self._peers[source], self._peers[target], self._device, self._over_nccl)

    def collect(self, take: Callable[[int, Message], None]) -> None:
        """Let the others :meth:`send` reports to the last stage, which takes them in a thread. All must call it."""
        host, last = torch.device("cpu"), self._peers[-1]
        for peer in self._peers[:-1]:
            device = self._device if self.me == peer else host
            self._connect(REPORTS, peer, last, device, take=partial(_take_report, take, peer.stage))

    def serve(self, answer: Callable[[int, Message], Message | None]) -> None:
        """Let stage 0 answer the others by ``answer(stage, request)``, in a thread. All stages must call it."""
        host, server = torch.device("cpu"), self._peers[0]
        for peer in self._peers[1:]:
            self._connect(_REPLIES, server, peer, host)
            self._connect(REQUESTS, peer, server, host, take=partial(self._reply, answer, peer.stage))

    def _reply(self, answer: Callable[[int, Message], Message | None], stage: int, arriving: Arriving) -> None:
        reply = answer(stage, arriving.message)
        if reply is not None:
            self._send(_REPLIES, stage, reply)

    def ask(self, request: Message) -> Message:
        """Send a request to stage 0 and wait for the reply."""
        self.send(REQUESTS, 0, request)
        return self.receive(_REPLIES, 0, request.batch)

    def _connect(
        self,
        direction: str,
        source: Peer,
        target: Peer,
        device: torch.device,
        over_nccl: bool = False,
        take: Callable[[Arriving], None] | None = None,
    ) -> None:
        pair = None
        if over_nccl:  # a communicator for itself, or transfers would wait in line
            pairs = [sorted((ranks[source.stage], ranks[target.stage])) for ranks in self._replicas]
            pair = _group_of_own(pairs, timeout=self.timeout, backend="nccl")
        bound, tag = self._bound, _DIRECTIONS.index(direction) + over_nccl * len(_DIRECTIONS)
        if self.me == source:
            if (outbox := self._out.get((direction, target.stage))) is not None:
                outbox.finish(CLOSE, "")
                self._retired.append(outbox)
            self._out[direction, target.stage] = _Outbox(Wire(self._group, tag, pair, target.rank, device), bound)
        elif self.me == target:
            if (inbox := self._in.get((direction, source.stage))) is not None:
                self._retired.append(inbox)
            wire = Wire(self._group, tag, pair, source.rank, device)
            self._in[direction, source.stage] = _Inbox(wire, bound, take)

    def send(self, direction: str, stage: int, message: Message) -> None:
        """Hand over ``message``; its tensors must not be changed afterwards."""
        if direction in (ACTIVATIONS, ERRORS, SHARED):
            self.bytes_sent += sum(tensor.nbytes for tensor in message.tensors if tensor is not None)
        self._send(direction, stage, message, partial(self.clock.measuring, "wait_send", message.batch))

    def _send(
        self,
        direction: str,
        stage: int,
        message: Message,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        try:
            self._out[direction, stage].put(message, self.timeout, waiting)
        except queue.Full:
            raise PeerError(
                f"{self.me} waited {self.timeout} for {self._peers[stage]} to take the {direction} of earlier batches"
                f" before batch {message.batch}, but it did not. Look for the reason there: it may hang or be very"
                " slow."
            ) from None
        except Broken as broken:
            raise self._failure(broken, direction, stage, message.batch) from None

    def receive(self, direction: str, stage: int, batch: int, flush: bool = False) -> Message:
        """Wait for the message about ``batch``.

        Raises:
            PeerError: If the peer fails, ends, is silent for too long, or is at another batch.
        """
        try:
            with self.clock.measuring(_WAITS.get(direction, "wait_error"), batch):
                message = self._in[direction, stage].get(self.timeout)
        except queue.Empty:
            raise PeerError(
                f"{self.me} waited {self.timeout} for the {direction} of batch {batch} from {self._peers[stage]}, but"
                " none came. Look for the reason there: it may hang, or its data may be slower than that."
            ) from None
        except Broken as broken:
            raise self._failure(broken, direction, stage, batch) from None
        if message.batch != batch or message.flush != flush:
            ours, theirs = (
                f"at the end after batch {b}" if f else f"in batch {b}"
                for b, f in ((batch, flush), (message.batch, message.flush))
            )
            raise PeerError(
                f"All processes must see the same batches, but {self.me} is {ours} and {self._peers[stage]} is"
                f" {theirs}. Make the data loaders of all processes equally long, and let all of them save checkpoints"
                " and read whole models, not rank 0 alone."
            )
        return message

    def abort(self, reason: str) -> None:
        """Tell all peers that this stage has failed, and why. Does not wait for long, and never raises."""
        for outbox in self._out.values():
            outbox.finish(ABORT, reason)
        deadline = time.monotonic() + 5
        for outbox in self._out.values():
            outbox.thread.join(max(deadline - time.monotonic(), 0))
        for inbox in self._in.values():  # until the peers have answered: an exit with threads at work is an abort
            inbox.end(timedelta(seconds=max(deadline - time.monotonic(), 0)))
        threads = [box.thread for box in (*self._out.values(), *self._in.values(), *self._retired)]
        atexit.register(_end_at_once_if_any_lives, threads)

    def close(self) -> None:
        """End all channels, once every peer does the same."""
        for outbox in self._out.values():
            outbox.finish(CLOSE, "")
        for outbox in self._out.values():
            outbox.thread.join(self.timeout.total_seconds())
        for inbox in self._in.values():
            inbox.end(self.timeout)

    def _failure(self, broken: Broken, direction: str, stage: int, batch: int) -> PeerError:
        peer = self._peers[stage]
        if broken.kind == ABORT:
            return PeerError(str(broken))
        if broken.kind == CLOSE:
            return PeerError(
                f"{self.me} waited for the {direction} of batch {batch} from {peer}, but that stage had ended. All"
                " processes must see the same number of batches."
            )
        return PeerError(f"{self.me} lost {peer} at the {direction} of batch {batch}: {broken}")


def _end_at_once_if_any_lives(threads: list[threading.Thread]) -> None:
    """Destructors of torch would abort the process if a thread still waits for a peer that does not answer."""
    if any(thread.is_alive() for thread in threads):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _take_report(take: Callable[[int, Message], None], stage: int, arriving: Arriving) -> None:
    take(stage, arriving.message)


class _Outbox:
    """Sends what is put in, in a thread of its own."""

    def __init__(self, wire: Wire, bound: int) -> None:
        self.wire = wire
        self.queue: queue.Queue[Any] = queue.Queue(bound)
        self.broken: Broken | None = None
        self.thread = threading.Thread(target=self._run, name=f"dgmp-send-{wire.rank}", daemon=True)
        self.thread.start()

    def put(
        self,
        message: Message,
        timeout: timedelta,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        staged, deadline = self.wire.stage(message), time.monotonic() + timeout.total_seconds()
        if self.broken is None:
            with contextlib.suppress(queue.Full):
                return self.queue.put_nowait(staged)
        with waiting():
            while True:
                if self.broken is not None:
                    raise self.broken
                try:
                    return self.queue.put(staged, timeout=min(_LOOK, max(deadline - time.monotonic(), 0)))
                except queue.Full:
                    if time.monotonic() >= deadline:
                        raise

    def finish(self, kind: int, text: str) -> None:
        with contextlib.suppress(queue.Full):  # then the peer takes nothing any more
            self.queue.put((kind, text), timeout=1)

    def _run(self) -> None:
        try:
            while isinstance(item := self.queue.get(), Staged):
                self.wire.send(item)
                del item  # it would stay until the next one comes
            self.wire.send_end(*item)
        except Exception as error:
            self.broken = Broken(-1, str(error))


class _Inbox:
    """Receives ahead in a thread of its own, for :meth:`get` or for ``take``."""

    def __init__(self, wire: Wire, bound: int, take: Callable[[Arriving], None] | None = None) -> None:
        self.wire = wire
        self.queue: queue.Queue[Arriving | Broken] = queue.Queue(bound)
        self._take = take or self.queue.put
        self.thread = threading.Thread(target=self._run, name=f"dgmp-receive-{wire.rank}", daemon=True)
        self.thread.start()

    def get(self, timeout: timedelta) -> Message:
        item = self.queue.get(timeout=timeout.total_seconds())
        if isinstance(item, Broken):
            self.queue.put(item)  # the next one to ask gets the same answer
            raise item
        return self.wire.arrive(item)

    def end(self, timeout: timedelta) -> None:
        deadline = time.monotonic() + timeout.total_seconds()
        while self.thread.is_alive() and time.monotonic() < deadline:
            self.thread.join(0.01)
            with contextlib.suppress(queue.Empty):  # what nobody asked for, as batches fetched ahead
                while True:
                    self.queue.get_nowait()

    def _run(self) -> None:
        try:
            while True:
                self._take(self.wire.receive())
        except Broken as end:
            self.queue.put(end)
        except Exception as error:
            self.queue.put(Broken(-1, str(error)))
