"""What all processes decide together: over a store, so that a failure anywhere ends every wait.

A collective of torch.distributed that one process never enters leaves the others waiting for it, without a reason,
until that process is gone. Here, whoever waits for others looks at the same time whether one of them has failed, and
says with what. For objects, flags and the like; nothing in the steady state of training comes here.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from lightning_dgmp.ghost import GhostError, check_sent
from lightning_dgmp.nests import Form, is_dense, join, leaves, map_leaves, split

__all__ = ["Flag", "PeerError", "World"]

_LOOK = 0.3  # seconds between two looks for a failure of others
_LONGEST_PAUSE = 0.02  # seconds
_LAST_WORDS = 5.0  # seconds


class PeerError(RuntimeError):
    """Another process failed, ended or did not answer."""


class World:
    """All processes of a run. All of them must make it together, when torch.distributed is up.

    Args:
        host: The address of rank 0.
        timeout: How long to wait for another process.
    """

    def __init__(self, host: str, timeout: timedelta) -> None:
        self.rank, self.size, self.timeout = dist.get_rank(), dist.get_world_size(), timeout
        self._store: Any = None
        self._counts: Counter[tuple[int, ...]] = Counter()
        self._old_keys: dict[tuple[int, ...], str] = {}
        self._num_flags = 0
        self._guarded: dict[int, Callable[[str], None]] = {}
        self._watch: threading.Thread | None = None
        self.group = dist.new_group(backend="gloo", timeout=timeout)  # for tensors of the host
        port = [0]
        if self.rank == 0:
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            port = [self._store.port]
        dist.broadcast_object_list(port, 0)
        if self.rank != 0:
            self._store = dist.TCPStore(host, port[0], is_master=False, wait_for_workers=False, timeout=timeout)
        _do_at_exit(partial(_leave, self._store, self.rank, self.size), self._end_at_once_if_waiting)

    def all_gather(self, item: Any, what: str, ranks: Sequence[int] | None = None) -> list[Any]:
        """Give every process of ``ranks``, by default all, the ``item`` of each of them.

        Args:
            item: Anything that can be pickled.
            what: What this is for, to say in an error: the same for all, but for a name in parentheses.
            ranks: Who takes part, in the order of the result.

        Raises:
            PeerError: If a process failed, did not come in time, or came for something else.
        """
        ranks = tuple(range(self.size)) if ranks is None else tuple(ranks)
        key = f"{ranks}/{self._counts[ranks]}"
        self._counts[ranks] += 1
        mine = f"{key}/{self.rank}"
        try:
            self._store.set(mine, pickle.dumps((what, item)))
            given = [(what, item) if r == self.rank else self._get(f"{key}/{r}", r, what) for r in ranks]
            if (old := self._old_keys.get(ranks)) is not None:  # that all are here shows that all have read it
                self._store.delete_key(old)
        except dist.DistNetworkError as error:
            raise PeerError(f"Rank {self.rank} lost rank 0 at {what}: {error}") from None
        self._old_keys[ranks] = mine
        for rank, (place, _) in zip(ranks, given):
            if place.partition(" (")[0] != given[0][0].partition(" (")[0]:
                raise PeerError(
                    f"All processes must come to the same places, but rank {ranks[0]} is at {given[0][0]} and rank"
                    f" {rank} at {place}. Let all of them do what needs all, such as `trainer.save_checkpoint` and"
                    " `trainer.strategy.broadcast`, not rank 0 alone."
                )
        return [item for _, item in given]

    def gather(self, nest: Any, what: str, ranks: Sequence[int], destination: int) -> list[Any] | None:
        """Give ``destination`` the ``nest`` of each of ``ranks``, its tensors on the host; ``None`` to the others.

        Tensors are sent as they are, only the rest of a nest is pickled.
        """
        form, tensors = _parts(nest, what)
        forms = self.all_gather(form, what, ranks)
        if self.rank != destination:
            self._send(tensors, destination, what)
            return None
        return [nest if r == self.rank else self._receive(f, r, what) for r, f in zip(ranks, forms)]

    def share(self, nest: Any, what: str, ranks: Sequence[int], source: int, device: torch.device) -> Any:
        """Give all ``ranks`` the ``nest`` of ``source``, its tensors on the host, or on ``device`` if not there."""
        form, tensors = _parts(nest, what) if self.rank == source else (None, [])
        form = self.all_gather(form, what, ranks)[list(ranks).index(source)]
        if self.rank != source:
            forms = (leaf for leaf in leaves(form) if isinstance(leaf, Form))
            received = self._receive(form, source, what)
            return map_leaves(
                lambda leaf: leaf.to(device) if is_dense(leaf) and next(forms).device.type != "cpu" else leaf, received
            )
        for rank in ranks:
            if rank != source:
                self._send(tensors, rank, what)
        return nest

    def _send(self, tensors: list[Tensor], rank: int, what: str) -> None:
        full = [tensor for tensor in tensors if tensor.numel()]

        def send() -> None:
            for tensor in full:
                dist.send(tensor.detach().resolve_conj().resolve_neg().cpu().contiguous(), rank, self.group)

        if full:
            self.wait(_Blocking(send), what)

    def _receive(self, form: Any, rank: int, what: str) -> Any:
        tensors = [torch.empty(f.shape, dtype=f.dtype) for f in leaves(form) if isinstance(f, Form)]
        full = [tensor for tensor in tensors if tensor.numel()]

        def receive() -> None:
            for tensor in full:
                dist.recv(tensor, rank, self.group)

        if full:
            self.wait(_Blocking(receive), what)
        return join(form, tensors)

    def wait(self, work: Any, what: str) -> None:
        """Wait for a collective ``work`` of torch.distributed, as :meth:`all_gather` waits for its items."""

        def give_up() -> None:
            raise PeerError(f"Rank {self.rank} waited {self.timeout} for the others at {what}.")

        try:
            self._wait_until(work.is_completed, give_up, grace=_LAST_WORDS, longest_pause=_LONGEST_PAUSE / 10)
        except PeerError:
            if not isinstance(work, _Blocking):
                self.guarded(work.get_future(), what)  # it goes on
            raise
        work.wait()

    def guarded_hook(self, hook: Any) -> Any:
        """A communication hook of DDP whose waits end when another process fails."""

        @wraps(hook)
        def guarded(state: Any, bucket: dist.GradBucket) -> Any:
            return self.guarded(hook(state, bucket), "the average of gradients")

        return guarded

    def guarded(self, future: Future[Any], what: str) -> Future[Any]:
        """The ``future`` of a collective, which fails soon after another process does.

        What that one has done before counts, for some seconds. For who waits where nobody else can look: a collective
        of torch.distributed goes on until its end.
        """
        guarded: Future[Any] = Future()
        lock = threading.Lock()

        def end(value: Any, error: PeerError | None) -> None:
            with lock:
                if not guarded.done():
                    guarded.set_result((value, error))

        def arrive(future: Future[Any]) -> None:
            self._guarded.pop(id(guarded))
            try:
                end(future.value(), None)
            except Exception as error:
                end(None, PeerError(f"Rank {self.rank} lost the others at {what}: {error}"))

        self._guarded[id(guarded)] = lambda reason: end(None, PeerError(reason))
        future.add_done_callback(arrive)
        if self._watch is None or not self._watch.is_alive():
            self._watch = threading.Thread(target=self._watch_guarded, name="dgmp-watch", daemon=True)
            self._watch.start()
        return guarded.then(_value_or_error)

    def _watch_guarded(self) -> None:
        idle, grace = 0, _LAST_WORDS
        while idle < 3:  # it lives as long as a collective goes on
            time.sleep(_LOOK)
            idle = 0 if self._guarded else idle + 1
            if self._guarded and (reason := self.failure()) is not None:
                grace -= _LOOK
                for end in list(self._guarded.values()) if grace < 0 else []:
                    end(reason)

    def failure(self) -> str | None:
        """Why the first process that failed did so, if any has."""
        try:
            return self._store.get("failure").decode() if self._store.check(["failure"]) else None
        except dist.DistNetworkError as error:
            return f"Rank {self.rank} lost rank 0: {error}"

    def _end_at_once_if_waiting(self) -> None:
        """At the exit: destructors of torch would wait for what others never answer."""
        if self._guarded:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def flag(self) -> Flag:
        """A new flag. All processes must make it."""
        self._num_flags += 1
        return Flag(self._store, f"flag/{self._num_flags}")

    def fail(self, reason: str) -> None:
        """Let all others know that this process has failed, and why. Never raises."""
        with contextlib.suppress(RuntimeError):  # then rank 0 is gone, and all who wait have noticed
            if self._store.add("num_failures", 1) == 1:
                self._store.set("failure", reason.encode())

    def _get(self, key: str, rank: int, what: str) -> Any:
        def give_up() -> None:
            raise PeerError(
                f"Rank {self.rank} waited {self.timeout} for rank {rank} at {what}, but it did not come. Look"
                " for the reason there: it may hang, or run other code than the others."
            )

        self._wait_until(lambda: self._store.check([key]), give_up)
        return pickle.loads(self._store.get(key))

    def _wait_until(
        self,
        is_done: Callable[[], bool],
        give_up: Callable[[], None],
        grace: float = 0,
        longest_pause: float = _LONGEST_PAUSE,
    ) -> None:
        """Wait; what another process has done before it failed counts, for so many seconds as ``grace``."""
        begin = look = time.monotonic()
        pause = 1e-4
        while not is_done():
            time.sleep(pause)
            pause = min(1.5 * pause, longest_pause)
            if (now := time.monotonic()) - look > _LOOK:
                look = now
                if (reason := self.failure()) is not None:
                    if is_done():
                        return
                    if grace <= 0:
                        raise PeerError(reason)
                    grace -= _LOOK
                if now - begin > self.timeout.total_seconds():
                    give_up()


def _parts(nest: Any, what: str) -> tuple[Any, list[Tensor]]:
    form, tensors = split(nest)
    try:
        check_sent(tensors)
    except GhostError as error:
        raise GhostError(f"Stages can tell each other only values that they have, but at {what} {error}.") from None
    return form, tensors


def _value_or_error(future: Future[Any]) -> Any:
    value, error = future.value()
    if error is not None:
        raise error
    return value


class Flag:
    """A number, at first 0, that any process can set and any can look at, without waiting for each other."""

    def __init__(self, store: Any, key: str) -> None:
        self._store, self._key = store, key

    def set(self, value: int) -> None:
        with contextlib.suppress(RuntimeError):  # rank 0 is gone: all will notice
            self._store.set(self._key, str(int(value)))

    def value(self) -> int:
        with contextlib.suppress(RuntimeError):
            return int(self._store.get(self._key)) if self._store.check([self._key]) else 0
        return 0


_at_exit: list[Callable[[], None]] = []  # of the newest world, for which all have left the others


def _do_at_exit(*handlers: Callable[[], None]) -> None:
    for old in _at_exit:
        atexit.unregister(old)
    _at_exit[:] = handlers
    for handler in handlers:
        atexit.register(handler)


def _leave(store: Any, rank: int, size: int) -> None:
    """At the exit: rank 0 waits a little for the others, because it keeps the store."""
    with contextlib.suppress(RuntimeError):
        store.add("num_left", 1)
        deadline = time.monotonic() + _LAST_WORDS
        while rank == 0 and store.add("num_left", 0) < size and time.monotonic() < deadline:
            time.sleep(0.02)


class _Blocking:
    """Sending or receiving as work that can be waited for: gloo's own never says whether it is completed."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function,), name="dgmp-gather", daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            self._error = error

    def is_completed(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise PeerError(f"A connection broke: {self._error}") from None
