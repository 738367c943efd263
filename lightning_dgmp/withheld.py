"""Tensors of a batch that do not travel until a stage reads them.

Stage 0 loads, and of a batch it sends the others what they have read of earlier ones. In the place of any other large
tensor they get a ghost that knows how the tensor looks, and that asks stage 0 for its values when it is read all the
same; from then on this tensor travels with its batch. So nothing has to be foretold: a stage gets what it reads.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from lightning_dgmp.ghost import PLAIN, Ghost, realised
from lightning_dgmp.nests import Form, leaves, tensors_in
from lightning_dgmp.operations import GhostMode, is_in_place

__all__ = ["Lender", "StandIns"]

_SMALL = 4096  # bytes; what is smaller travels in any case


class Lender:
    """On stage 0: decides what travels, and keeps the rest until nobody can ask for it any more.

    Args:
        stages: The later stages.
    """

    def __init__(self, stages: Iterable[int]) -> None:
        self._read: dict[int, set[tuple[int, int]]] = {stage: set() for stage in stages}  # by loader and place
        self._kept: dict[int, tuple[int, list[Tensor], set[int]]] = {}  # the loader, and who may ask
        self._lock = Lock()

    def share(self, number: int, loader: int, tensors: list[Tensor]) -> dict[int, list[Tensor | None]]:
        """What each stage gets of the ``tensors`` of batch ``number`` of a loader; ``None``: what it has to ask for."""
        with self._lock:
            shares = {
                stage: [t if t.nbytes < _SMALL or (loader, i) in read else None for i, t in enumerate(tensors)]
                for stage, read in self._read.items()
            }
            lacking = {stage for stage, share in shares.items() if any(t is None for t in share)}
            if lacking:
                self._kept[number] = loader, tensors, lacking
        return shares

    def lend(self, stage: int, number: int, leaf: int, always: bool) -> Tensor:
        """The tensor that ``stage`` asks for; ``always``: it will read those of later batches too."""
        with self._lock:
            loader, tensors, _ = self._kept[number]
            if always:
                self._read[stage].add((loader, leaf))
        return tensors[leaf]

    def release(self, stage: int, number: int) -> None:
        """Note that ``stage`` will not ask for batches before ``number``."""
        with self._lock:
            for old in [n for n in self._kept if n < number]:
                self._kept[old][2].discard(stage)
                if not self._kept[old][2]:
                    del self._kept[old]


class StandIns:
    """On the other stages: ghosts in the place of what did not travel.

    Args:
        ask: ``ask(number, leaf, always)`` gets a tensor from stage 0.
    """

    def __init__(self, ask: Callable[[int, int, bool], Tensor]) -> None:
        self._ask, self._always = ask, True
        self._mode = _PuttingOff()
        self._unread: deque[tuple[int, weakref.ref[Ghost]]] = deque()

    def fill(self, number: int, form: Any, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Complete the ``tensors`` of a batch, of which ``form`` is the nest without them."""
        filled: list[Tensor] = []
        forms = (leaf for leaf in leaves(form) if isinstance(leaf, Form))
        for leaf, (tensor, looks) in enumerate(zip(tensors, forms)):
            if tensor is None:
                tensor = self._mode.promise(looks, partial(self._fetch, number, leaf))
                self._unread.append((number, weakref.ref(tensor)))
            filled.append(tensor)
        return filled

    def settle(self, number: float = float("inf")) -> None:
        """Fetch what somebody still holds of the batches before ``number``, of which nothing is asked for later."""
        while self._unread and self._unread[0][0] < number:
            self.read(self._unread.popleft()[1]())

    def read(self, nest: Any) -> Any:
        """``nest`` with values for all ghosts, without asking for those of later batches too."""
        self._always = False
        try:
            return realised(nest)
        finally:
            self._always = True

    def _fetch(self, number: int, leaf: int) -> Tensor:
        return self._ask(number, leaf, self._always)


# Functions of one tensor whose result is not read yet either: what a step does to a batch before the first module.
_PUT_OFF = frozenset(
    """
    to cpu cuda type float double half bfloat16 long int bool detach clone contiguous
    view reshape flatten unflatten squeeze unsqueeze permute transpose movedim __getitem__
    """.split()  # noqa: SIM905
)


class _PuttingOff(GhostMode):
    """Lets operations that only look at a tensor in another way wait too."""

    def __init__(self) -> None:
        super().__init__()
        self._put_off: weakref.WeakSet[Ghost] = weakref.WeakSet()

    def promise(self, form: Form, receive: Callable[[], Tensor]) -> Ghost:
        """A ghost of what ``receive()`` gets when it is read."""
        with self.fake_mode:
            fake = torch.empty(form.shape, dtype=form.dtype, device="cpu")
            if form.stride is not None:
                fake = torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device="cpu")
        return self._bound(fake, lambda: form.lay_out(receive()))

    def call(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        name = getattr(func, "__name__", str(func))
        subject = args[0] if args else None
        waits = isinstance(subject, Ghost) and subject.family is self and not subject.has_arrived
        if isinstance(subject, Ghost) and waits and name in _PUT_OFF and _is_plain((args[1:], dict(kwargs))):
            with torch._C.DisableTorchFunctionSubclass(), self.fake_mode:
                fake = func(subject.fake, *args[1:], **kwargs)
            later = self._bound(fake, lambda: func(subject.received(), *args[1:], **kwargs))
            self._put_off.add(later)
            return later
        if name == "register_hook" and isinstance(subject, Ghost):
            return func(subject.received(), *args[1:], **kwargs)
        if is_in_place(name, kwargs):
            for ghost in list(self._put_off):  # what was to be computed before the change
                ghost.received()
        return super().call(func, args, kwargs)

    def _bound(self, fake: Any, receive: Callable[[], Tensor]) -> Ghost:
        ghost = Ghost(fake, self, "stage 0, which loads the data")
        ghost.bind(receive)
        return ghost


def _is_plain(nest: Any) -> bool:
    return not tensors_in(nest) and all(isinstance(leaf, (*PLAIN, type(Ellipsis))) for leaf in leaves(nest))
