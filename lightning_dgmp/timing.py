"""Where the time of a process goes, measured as it goes.

Times are those of the training thread. On an accelerator that computes asynchronously a span is how long its work took
to be asked for; what the device has not finished yet is waited for, and counted, where the host needs it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

__all__ = ["KINDS", "Clock", "Kind", "Span"]

Kind = Literal["forward", "backward", "update", "wait_activation", "wait_error", "wait_data", "wait_send"]

#: What a process does at a time; the rest of its time is ``"other"``: hooks, callbacks, logging.
KINDS: Sequence[Kind] = (
    "forward", "backward", "update", "wait_activation", "wait_error", "wait_data", "wait_send",
)  # fmt: skip

_NUM_SPANS = 2000


class Span(NamedTuple):
    """What was done, for which batch, and from when to when, in seconds."""

    kind: str
    batch: int
    start: float
    end: float


class Clock:
    """Adds up what is measured with ``with clock.measuring(kind, batch):``, and keeps the newest spans.

    What is measured inside of another measurement counts for the inner one alone.
    """

    def __init__(self) -> None:
        self.spans: deque[Span] = deque(maxlen=_NUM_SPANS)  # since the epoch
        self._epoch = time.time() - time.perf_counter()
        self._open: list[_Measurement] = []
        self._seconds: dict[Kind, float] = {}
        self._since = time.perf_counter()

    def measuring(self, kind: Kind, batch: int = -1) -> _Measurement:
        """A context in which the time counts for ``kind``."""
        return _Measurement(self, kind, batch)

    def keep_all(self, keeps: bool) -> None:
        """Whether all spans are kept from now on, or the newest alone."""
        self.spans = deque(self.spans, None if keeps else _NUM_SPANS)

    def take(self) -> tuple[dict[Kind, float], float]:
        """The seconds of each kind since the last time this was asked, and of all together."""
        now = time.perf_counter()
        seconds, self._seconds = self._seconds, {}
        total, self._since = now - self._since, now
        return {kind: seconds.get(kind, 0.0) for kind in KINDS}, total


class _Measurement:
    __slots__ = ("_batch", "_clock", "_inside", "_kind", "_start")

    def __init__(self, clock: Clock, kind: Kind, batch: int) -> None:
        self._clock, self._kind, self._batch = clock, kind, batch
        self._inside = 0.0  # seconds of measurements inside of this one

    def __enter__(self) -> None:
        self._clock._open.append(self)
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        end, clock = time.perf_counter(), self._clock
        elapsed = end - self._start
        clock._open.pop()
        if clock._open:
            clock._open[-1]._inside += elapsed
        clock._seconds[self._kind] = clock._seconds.get(self._kind, 0.0) + elapsed - self._inside
        clock.spans.append(Span(self._kind, self._batch, clock._epoch + self._start, clock._epoch + end))
