"""How a message becomes calls of torch.distributed; the only place that knows gloo from NCCL."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Sequence
from enum import IntFlag
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ABORT", "CLOSE", "Arriving", "Broken", "Message", "Staged", "Wire", "Wish"]

_DATA, CLOSE, ABORT = range(3)
_SLOT = 16384  # bytes of a message's first part, which has all of a short one: each part costs two threads that wake up
_FIXED = struct.Struct("10q")  # at the beginning of it
_SMALL = 2**20  # bytes; larger tensors are sent as they are, parts of their own, and not copied before
_ALIGNMENT = 16  # bytes; that of the largest dtype
_DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


class Wish(IntFlag):
    """What all stages should do after the same batch.

    Wishes travel back with the errors to stage 0, which grants them for its next batch; what is granted travels forward
    with the activations.
    """

    END = 1  # training
    TERMINATE = 2  # ... as after SIGTERM
    INTERRUPT = 4  # ... as after Ctrl-C
    SAVE = 8  # a checkpoint by the clock
    REQUEUE = 16  # the job


class Message(NamedTuple):
    """What one stage tells another about one batch.

    ``wishes`` is a :class:`Wish`; ``flush`` says that there are no activations of this batch because the sender is
    about to run its outstanding backwards; ``differentiable`` says for which tensors the sender wants errors; ``extra``
    is whatever else there is to say; ``shapes`` has the number of module calls so far, and a digest of the shapes that
    they returned.
    """

    batch: int
    wishes: int
    tensors: list[Tensor | None]
    flush: bool = False
    differentiable: Sequence[bool] = ()
    extra: bytes = b""
    shapes: tuple[int, int] = (0, 0)


class Broken(Exception):
    """The channel gives no more messages. ``kind`` says why; -1 is a lost connection."""

    def __init__(self, kind: int, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Staged(NamedTuple):
    """A message ready to be sent by another thread."""

    message: Message
    event: Any


class Wire:
    """One peer in one direction: how a message becomes calls of torch.distributed. Knows gloo from NCCL.

    Args:
        group: A gloo process group.
        tag: Tells this direction from others in the same group.
        pair: An NCCL process group for the tensors of this direction alone, or ``None``.
        rank: The global rank of the peer.
        device: Where tensors should be.
    """

    def __init__(self, group: Any, tag: int, pair: Any, rank: int, device: torch.device) -> None:
        self.group, self.tag, self.pair, self.rank, self.device = group, tag, pair, rank, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    # ----- sending

    def stage(self, message: Message) -> Staged:
        """In the training thread: start the copy to the host, if there must be one.

        Raises:
            TypeError: If a tensor is of a kind that cannot be sent.
        """
        for tensor in message.tensors:
            if tensor is not None and (tensor.dtype not in _DTYPES or tensor.layout != torch.strided):
                raise TypeError(
                    f"Stages can exchange dense tensors of the usual dtypes, but one is {tensor.dtype} with layout"
                    f" {tensor.layout}. Convert it in the data set or before it leaves its module."
                )
        if self.stream is None:
            return Staged(message._replace(tensors=[t if t is None else _dense(t) for t in message.tensors]), None)
        tensors: list[Tensor | None] = []
        for tensor in message.tensors:
            if tensor is not None:
                tensor = _dense(tensor)
                if self.pair is None:
                    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
                    tensor = host.copy_(tensor, non_blocking=True)
            tensors.append(tensor)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return Staged(message._replace(tensors=tensors), event)

    def send(self, staged: Staged) -> None:
        message, event = staged
        description: list[int] = []
        for tensor, wants_error in zip_longest(message.tensors, message.differentiable, fillvalue=False):
            if isinstance(tensor, Tensor):
                kind = _DTYPES.index(tensor.dtype) + len(_DTYPES) * bool(wants_error)
                description += [kind, tensor.dim(), _packed(_order(tensor)), *tensor.shape]
            else:
                description.append(-1)
        flags = int(message.wishes) << 1 | message.flush
        lengths = len(message.tensors), len(description), len(message.extra)
        tensors = [t.detach().permute(_order(t)) for t in message.tensors if t is not None and t.numel()]
        if event is not None and self.pair is None:
            event.synchronize()
        small = [tensor.reshape(-1).view(torch.uint8).numpy() for tensor in tensors if self._is_small(tensor)]
        content = [array("q", description).tobytes(), message.extra, *small]
        self._send_parts([_DATA, message.batch, flags, *lengths, *message.shapes], content)
        self._with_stream(lambda: self._send_tensors([t for t in tensors if not self._is_small(t)], event))

    def _is_small(self, tensor: Tensor) -> bool:
        return self.pair is None and tensor.nbytes <= _SMALL

    def _send_tensors(self, tensors: list[Tensor], event: Any) -> None:
        if event is not None and self.pair is not None:
            event.wait()
        for tensor in tensors:
            if self.stream is not None and self.pair is not None:
                tensor.record_stream(self.stream)
            self._send_to_host(tensor) if self.pair is None else dist.send(tensor, self.rank, self.pair)

    def send_end(self, kind: int, text: str) -> None:
        data = text.encode()
        self._send_parts([kind, 0, 0, 0, 0, len(data), 0, 0], [b"", data])

    def _send_parts(self, fixed: list[int], content: Sequence[Any]) -> None:
        """Integers and bytes, which follow each other aligned, in one part if they are few."""
        size = sum(_aligned(len(piece)) for piece in content)
        parts, start = [bytearray(_SLOT)], _FIXED.size
        _FIXED.pack_into(parts[0], 0, *fixed, size, 0)
        if start + size > _SLOT:
            parts.append(bytearray(size))
            start = 0
        body = memoryview(parts[-1])
        for piece in content:
            body[start : start + len(piece)] = piece
            start += _aligned(len(piece))
        for part in parts:
            self._send_to_host(torch.frombuffer(part, dtype=torch.uint8))

    def _send_to_host(self, tensor: Tensor) -> None:
        dist.send(tensor, self.rank, self.group, self.tag)

    # ----- receiving

    def receive(self) -> Arriving:
        """In the receiving thread: the next message, or :class:`Broken` at the end of all."""
        slot = self._receive_bytes(_SLOT)
        kind, batch, flags, count, length, num_bytes, num_calls, digest, size, _ = _FIXED.unpack_from(slot)
        content = _Content(slot, _FIXED.size)
        if _FIXED.size + size > _SLOT:
            content = _Content(self._receive_bytes(size), 0)
        description = content.take(8 * length).cast("q").tolist()
        extra, shapes = bytes(content.take(num_bytes)), (num_calls, digest)
        if kind != _DATA:
            raise Broken(kind, extra.decode())
        wants_error: list[bool] = []
        message = Message(batch, flags >> 1, [], bool(flags & 1), wants_error, extra, shapes)
        event = self._with_stream(
            lambda: self._receive_tensors(message.tensors, wants_error, count, description, content)
        )
        return Arriving(message, event)

    def _receive_bytes(self, size: int) -> bytearray:
        data = bytearray(size)
        self._receive_on_host(torch.frombuffer(data, dtype=torch.uint8))
        return data

    def _receive_on_host(self, tensor: Tensor) -> None:
        dist.recv(tensor, self.rank, self.group, self.tag)

    def _receive_tensors(
        self,
        tensors: list[Tensor | None],
        wants_error: list[bool],
        count: int,
        description: list[int],
        content: _Content,
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
            order = _unpacked(description[at + 2], dim)
            shape = description[at + 3 : at + 3 + dim]
            at += 3 + dim
            over_host = self.stream is None or self.pair is None
            tensor = torch.empty(
                [shape[d] for d in order],
                dtype=dtype,
                device="cpu" if over_host else self.device,
                pin_memory=over_host and self.stream is not None,
            )
            if tensor.numel() and self._is_small(tensor):
                tensor.view(-1).copy_(torch.frombuffer(content.take(tensor.nbytes), dtype=dtype))
            elif tensor.numel():
                self._receive_on_host(tensor) if self.pair is None else dist.recv(tensor, self.rank, self.pair)
            if order != list(range(dim)):
                tensor = tensor.permute(_inverse(order)).detach()  # no view, or it could not be changed in place
            tensors.append(tensor.to(self.device, non_blocking=True))
        if self.stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self.stream)
        return event

    def arrive(self, arriving: Arriving) -> Message:
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


class Arriving(NamedTuple):
    """A received message whose copies to the device may still be under way."""

    message: Message
    event: Any


class _Content:
    """Bytes that are read piece by piece."""

    def __init__(self, data: bytearray, start: int) -> None:
        self._data, self._start = memoryview(data), start

    def take(self, length: int) -> memoryview:
        start = self._start
        self._start += _aligned(length)
        return self._data[start : start + length]


def _aligned(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def _dense(tensor: Tensor) -> Tensor:
    """``tensor`` without gaps in memory, its dimensions in the order that they have there."""
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_contiguous():
        return tensor
    order = _order(tensor)
    ordered = tensor.permute(order)
    return tensor if ordered.is_contiguous() else ordered.contiguous().permute(_inverse(order))


def _order(tensor: Tensor) -> list[int]:
    """The dimensions as they follow in memory, so that what arrives has the same layout, for views of it."""
    dims = range(tensor.dim())
    if tensor.is_contiguous() or len(dims) > _MAX_DIMS:
        return list(dims)
    return sorted(dims, key=tensor.stride().__getitem__, reverse=True)


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


_MAX_DIMS = 15  # whose order fits into one integer of 64 bits


def _packed(order: Sequence[int]) -> int:
    return sum(d << 4 * i for i, d in enumerate(order[:_MAX_DIMS]))


def _unpacked(packed: int, dim: int) -> list[int]:
    return [packed >> 4 * i & 15 for i in range(dim)] if dim <= _MAX_DIMS else list(range(dim))
