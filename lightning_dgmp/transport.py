"""Point-to-point messages between the stages of a replica.

One message a batch and direction goes between any two stages that exchange values: activations to later stages, errors
(the gradients with respect to them) back. Each channel, that is one peer in one direction, has a thread that receives
ahead and one that sends, so that the training thread waits only for what is not there yet, and for no one else::

    training thread   send() -> queue -> sending thread ~~ peer's receiving thread -> queue -> receive()

Messages describe themselves: a header of integers (kind, batch, flags, shapes), then the tensors. Nothing is pickled.

With gloo, tensors of an accelerator travel through pinned host memory, so several stages can share one device. With
NCCL the headers still go over gloo and the tensors straight from device to device, one communicator a pair and
direction, because NCCL runs what it is given for one communicator in order. The NCCL path needs as many GPUs as stages
and has not been run by the tests of this project.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ACTIVATIONS", "ERRORS", "Message", "Peer", "PeerError", "Transport", "connect"]

ACTIVATIONS = "activations"
ERRORS = "errors"

_DATA, _CLOSE, _ABORT = range(3)
_HEADER = 64  # integers; longer descriptions follow in a message of their own
_FIXED = 5
_DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


class PeerError(RuntimeError):
    """Another stage failed, ended or did not answer."""


class Peer(NamedTuple):
    """A stage and the global rank of the process that runs it."""

    stage: int
    rank: int

    def __str__(self) -> str:
        return f"stage {self.stage} (rank {self.rank})"


class Message(NamedTuple):
    """What one stage tells another about one batch.

    ``stop`` asks for, or announces, the end of training; ``flush`` says that there are no activations of this batch
    because the sender is about to run its outstanding backwards; ``differentiable`` says for which tensors the sender
    wants errors.
    """

    batch: int
    stop: bool
    tensors: list[Tensor | None]
    flush: bool = False
    differentiable: Sequence[bool] = ()


class Transport:
    """The channels of one stage.

    Args:
        me: This stage.
        peers: The stages with which it exchanges messages.
        groups: For each direction the gloo group of the replica.
        device: Where received tensors should be.
        timeout: How long to wait for a message before giving up.
        bound: How many messages may wait to be sent to one peer.
        pairs: With NCCL, the communicator of each direction and peer stage; without, tensors go over ``groups``.
    """

    def __init__(
        self,
        me: Peer,
        peers: Sequence[Peer],
        groups: dict[str, Any],
        device: torch.device,
        timeout: timedelta,
        bound: int,
        pairs: dict[tuple[str, int], Any] | None = None,
    ) -> None:
        self.me = me
        self.timeout = timeout
        self._in: dict[tuple[str, int], _Inbox] = {}
        self._out: dict[tuple[str, int], _Outbox] = {}
        self._peers = {peer.stage: peer for peer in peers}
        for peer in peers:
            down, up = (ACTIVATIONS, ERRORS) if peer.stage < me.stage else (ERRORS, ACTIVATIONS)
            wires = {d: _Wire(groups[d], pairs and pairs[d, peer.stage], peer.rank, device) for d in (down, up)}
            self._in[down, peer.stage] = _Inbox(wires[down])
            self._out[up, peer.stage] = _Outbox(wires[up], bound)
        for inbox in self._in.values():
            inbox.thread.start()
        for outbox in self._out.values():
            outbox.thread.start()

    def send(self, direction: str, stage: int, message: Message) -> None:
        """Hand over ``message``; its tensors must not be changed afterwards."""
        try:
            self._out[direction, stage].put(message, self.timeout)
        except queue.Full:
            raise PeerError(
                f"{self.me} waited {self.timeout} for {self._peers[stage]} to take the {direction} of earlier batches"
                f" before batch {message.batch}, but it did not. Look for the reason there: it may hang or be very"
                " slow."
            ) from None
        except _Broken as broken:
            raise self._failure(broken, direction, stage, message.batch) from None

    def receive(self, direction: str, stage: int, batch: int, flush: bool = False) -> Message:
        """Wait for the message about ``batch``.

        Raises:
            PeerError: If the peer fails, ends, is silent for too long, or is at another batch.
        """
        try:
            message = self._in[direction, stage].get(self.timeout)
        except queue.Empty:
            raise PeerError(
                f"{self.me} waited {self.timeout} for the {direction} of batch {batch} from {self._peers[stage]}, but"
                " none came. Look for the reason there: it may hang, or its data may be slower than that."
            ) from None
        except _Broken as broken:
            raise self._failure(broken, direction, stage, batch) from None
        if message.batch != batch or message.flush != flush:
            ours, theirs = (
                f"at the end after batch {b}" if f else f"in batch {b}" for b, f in ((batch, flush), message[::3])
            )
            raise PeerError(
                f"All processes must see the same batches, but {self.me} is {ours} and {self._peers[stage]} is"
                f" {theirs}. Make the data loaders of all processes equally long."
            )
        return message

    def abort(self, reason: str) -> None:
        """Tell all peers that this stage has failed, and why. Does not wait for long, and never raises."""
        for outbox in self._out.values():
            outbox.finish(_ABORT, reason)
        for outbox in self._out.values():
            outbox.thread.join(5)

    def close(self) -> None:
        """End all channels, once every peer does the same."""
        for outbox in self._out.values():
            outbox.finish(_CLOSE, "")
        for thread in [*(box.thread for box in self._out.values()), *(box.thread for box in self._in.values())]:
            thread.join(self.timeout.total_seconds())

    def _failure(self, broken: _Broken, direction: str, stage: int, batch: int) -> PeerError:
        peer = self._peers[stage]
        if broken.kind == _ABORT:
            return PeerError(str(broken))
        if broken.kind == _CLOSE:
            return PeerError(
                f"{self.me} waited for the {direction} of batch {batch} from {peer}, but that stage had ended. All"
                " processes must see the same number of batches."
            )
        return PeerError(f"{self.me} lost {peer} at the {direction} of batch {batch}: {broken}")


def connect(
    stage: int,
    ranks: Sequence[int],
    edges: Sequence[tuple[int, int]],
    device: torch.device,
    timeout: timedelta,
    over_nccl: bool = False,
) -> Transport:
    """Open the channels of ``stage``. All processes of the replica must call it.

    Args:
        stage: The stage of this process.
        ranks: The global rank of each stage.
        edges: The pairs of stages that exchange messages.
        device: Where received tensors should be.
        timeout: How long to wait for a message before giving up.
        over_nccl: Whether tensors go straight from device to device.
    """
    groups = {d: dist.new_group(sorted(ranks), timeout=timeout, backend="gloo") for d in (ACTIVATIONS, ERRORS)}
    pairs: dict[tuple[str, int], Any] = {}
    if over_nccl:
        for a, b in edges:
            for direction in (ACTIVATIONS, ERRORS):
                pair = dist.new_group(sorted((ranks[a], ranks[b])), timeout=timeout, backend="nccl")
                if stage in (a, b):
                    pairs[direction, a + b - stage] = pair
    peers = [Peer(k, ranks[k]) for k in sorted({a + b - stage for a, b in edges if stage in (a, b)})]
    return Transport(
        Peer(stage, ranks[stage]), peers, groups, device, timeout, bound=len(ranks) + 1, pairs=pairs or None
    )


class _Broken(Exception):
    """The channel gives no more messages. ``kind`` says why; -1 is a lost connection."""

    def __init__(self, kind: int, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class _Staged(NamedTuple):
    """A message ready to be sent by another thread."""

    message: Message
    event: Any


class _Outbox:
    """Sends what is put in, in a thread of its own."""

    def __init__(self, wire: _Wire, bound: int) -> None:
        self.wire = wire
        self.queue: queue.Queue[Any] = queue.Queue(bound)
        self.broken: _Broken | None = None
        self.thread = threading.Thread(target=self._run, name=f"dgmp-send-{wire.rank}", daemon=True)

    def put(self, message: Message, timeout: timedelta) -> None:
        if self.broken is not None:
            raise self.broken
        self.queue.put(self.wire.stage(message), timeout=timeout.total_seconds())

    def finish(self, kind: int, text: str) -> None:
        with contextlib.suppress(queue.Full):  # then the peer takes nothing any more
            self.queue.put((kind, text), timeout=1)

    def _run(self) -> None:
        try:
            while isinstance(item := self.queue.get(), _Staged):
                self.wire.send(item)
            self.wire.send_end(*item)
        except Exception as error:
            self.broken = _Broken(-1, str(error))


class _Inbox:
    """Receives ahead in a thread of its own."""

    def __init__(self, wire: _Wire) -> None:
        self.wire = wire
        self.queue: queue.Queue[_Arriving | _Broken] = queue.Queue()
        self.thread = threading.Thread(target=self._run, name=f"dgmp-receive-{wire.rank}", daemon=True)

    def get(self, timeout: timedelta) -> Message:
        item = self.queue.get(timeout=timeout.total_seconds())
        if isinstance(item, _Broken):
            self.queue.put(item)  # the next one to ask gets the same answer
            raise item
        return self.wire.arrive(item)

    def _run(self) -> None:
        try:
            while True:
                self.queue.put(self.wire.receive())
        except _Broken as end:
            self.queue.put(end)
        except Exception as error:
            self.queue.put(_Broken(-1, str(error)))


class _Wire:
    """One peer in one direction: how a message becomes calls of torch.distributed. Knows gloo from NCCL."""

    def __init__(self, group: Any, pair: Any, rank: int, device: torch.device) -> None:
        self.group, self.pair, self.rank, self.device = group, pair, rank, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    # ----- sending

    def stage(self, message: Message) -> _Staged:
        """In the training thread: start the copy to the host, if there must be one."""
        if self.stream is None:
            return _Staged(
                message._replace(tensors=[t if t is None else t.contiguous() for t in message.tensors]), None
            )
        tensors: list[Tensor | None] = []
        for tensor in message.tensors:
            if tensor is not None:
                tensor = tensor.contiguous()
                if self.pair is None:
                    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                    tensor = host.copy_(tensor, non_blocking=True)
            tensors.append(tensor)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return _Staged(message._replace(tensors=tensors), event)

    def send(self, staged: _Staged) -> None:
        message, event = staged
        description: list[int] = []
        for tensor, wants_error in zip_longest(message.tensors, message.differentiable, fillvalue=False):
            if isinstance(tensor, Tensor):
                kind = _DTYPES.index(tensor.dtype) + len(_DTYPES) * bool(wants_error)
                description += [kind, tensor.dim(), *tensor.shape]
            else:
                description.append(-1)
        inline = len(description) <= _HEADER - _FIXED
        flags = message.stop | message.flush << 1
        fixed = [_DATA, message.batch, flags, len(message.tensors), len(description)]
        self._send_integers(fixed + (description if inline else []))
        if not inline:
            dist.send(torch.tensor(description), self.rank, self.group)
        self._with_stream(lambda: self._send_tensors([t for t in message.tensors if t is not None], event))

    def _send_tensors(self, tensors: list[Tensor], event: Any) -> None:
        if event is not None:
            event.synchronize() if self.pair is None else event.wait()
        for tensor in tensors:
            if tensor.numel():
                if self.stream is not None and self.pair is not None:
                    tensor.record_stream(self.stream)
                dist.send(tensor.detach(), self.rank, self.pair or self.group)

    def send_end(self, kind: int, text: str) -> None:
        data = text.encode()
        self._send_integers([kind, 0, 0, 0, len(data)])
        if data:
            dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), self.rank, self.group)

    def _send_integers(self, integers: list[int]) -> None:
        dist.send(torch.tensor(integers + [0] * (_HEADER - len(integers))), self.rank, self.group)

    # ----- receiving

    def receive(self) -> _Arriving:
        """In the receiving thread: the next message, or :class:`_Broken` at the end of all."""
        header = torch.empty(_HEADER, dtype=torch.int64)
        dist.recv(header, self.rank, self.group)
        kind, batch, flags, count, length, *description = header.tolist()
        if kind != _DATA:
            data = torch.empty(length, dtype=torch.uint8)
            if length:
                dist.recv(data, self.rank, self.group)
            raise _Broken(kind, bytes(data.tolist()).decode())
        if length > _HEADER - _FIXED:
            longer = torch.empty(length, dtype=torch.int64)
            dist.recv(longer, self.rank, self.group)
            description = longer.tolist()
        wants_error: list[bool] = []
        message = Message(batch, bool(flags & 1), [], bool(flags & 2), wants_error)
        event = self._with_stream(lambda: self._receive_tensors(message.tensors, wants_error, count, description))
        return _Arriving(message, event)

    def _receive_tensors(
        self, tensors: list[Tensor | None], wants_error: list[bool], count: int, description: list[int]
    ) -> Any:
        at = 0
        for _ in range(count):
            if description[at] < 0:
                tensors.append(None)
                wants_error.append(False)
                at += 1
                continue
            wants_error.append(description[at] >= len(_DTYPES))
            dtype, dim = _DTYPES[description[at] % len(_DTYPES)], description[at + 1]
            shape = description[at + 2 : at + 2 + dim]
            at += 2 + dim
            over_host = self.stream is None or self.pair is None
            tensor = torch.empty(
                shape,
                dtype=dtype,
                device="cpu" if over_host else self.device,
                pin_memory=over_host and self.stream is not None,
            )
            if tensor.numel():
                dist.recv(tensor, self.rank, self.pair or self.group)
            tensors.append(tensor.to(self.device, non_blocking=True))
        if self.stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self.stream)
        return event

    def arrive(self, arriving: _Arriving) -> Message:
        """In the training thread: order what comes next after the copies."""
        message, event = arriving
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            for tensor in message.tensors:
                if tensor is not None:
                    tensor.record_stream(stream)
        return message

    def _with_stream(self, work: Callable[[], Any]) -> Any:
        if self.stream is None:
            return work()
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            return work()


class _Arriving(NamedTuple):
    """A received message whose copies to the device may still be under way."""

    message: Message
    event: Any
