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
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lightning_dgmp.wire import ABORT, CLOSE, Arriving, Broken, Message, Staged, Wire
from lightning_dgmp.world import PeerError

__all__ = ["ACTIVATIONS", "ERRORS", "Peer", "Transport", "connect"]

ACTIVATIONS = "activations"
ERRORS = "errors"


class Peer(NamedTuple):
    """A stage and the global rank of the process that runs it."""

    stage: int
    rank: int

    def __str__(self) -> str:
        return f"stage {self.stage} (rank {self.rank})"


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
            wires = {d: Wire(groups[d], pairs and pairs[d, peer.stage], peer.rank, device) for d in (down, up)}
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
        except Broken as broken:
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
        except Broken as broken:
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
        deaf = {stage for (_, stage), inbox in self._in.items() if not inbox.thread.is_alive()}
        outboxes = [outbox for (_, stage), outbox in self._out.items() if stage not in deaf]
        for outbox in outboxes:
            outbox.finish(ABORT, reason)
        deadline = time.monotonic() + 5
        for outbox in outboxes:
            outbox.thread.join(max(deadline - time.monotonic(), 0))

    def close(self) -> None:
        """End all channels, once every peer does the same."""
        for outbox in self._out.values():
            outbox.finish(CLOSE, "")
        for thread in [*(box.thread for box in self._out.values()), *(box.thread for box in self._in.values())]:
            thread.join(self.timeout.total_seconds())

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


class _Outbox:
    """Sends what is put in, in a thread of its own."""

    def __init__(self, wire: Wire, bound: int) -> None:
        self.wire = wire
        self.queue: queue.Queue[Any] = queue.Queue(bound)
        self.broken: Broken | None = None
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
            while isinstance(item := self.queue.get(), Staged):
                self.wire.send(item)
            self.wire.send_end(*item)
        except Exception as error:
            self.broken = Broken(-1, str(error))


class _Inbox:
    """Receives ahead in a thread of its own."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.queue: queue.Queue[Arriving | Broken] = queue.Queue()
        self.thread = threading.Thread(target=self._run, name=f"dgmp-receive-{wire.rank}", daemon=True)

    def get(self, timeout: timedelta) -> Message:
        item = self.queue.get(timeout=timeout.total_seconds())
        if isinstance(item, Broken):
            self.queue.put(item)  # the next one to ask gets the same answer
            raise item
        return self.wire.arrive(item)

    def _run(self) -> None:
        try:
            while True:
                self.queue.put(self.wire.receive())
        except Broken as end:
            self.queue.put(end)
        except Exception as error:
            self.queue.put(Broken(-1, str(error)))
