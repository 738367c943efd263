"""Data from stage 0: one process of a replica loads, the others receive its batches.

So shuffling, augmentation, custom samplers and iterable data sets are right by construction, whatever they draw. What a
stage does not read travels as a shape only; see :mod:`lightning_dgmp.withheld`.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lightning_dgmp.ghost import GhostRead
from lightning_dgmp.host import MisconfigurationException, sized_len
from lightning_dgmp.nests import join, leaves, split
from lightning_dgmp.transport import DATA, REQUESTS, Transport
from lightning_dgmp.wire import Message, Wish
from lightning_dgmp.withheld import Lender, StandIns

__all__ = ["Feed", "Together", "check_division", "own_loader"]

_END = object()


class Together(NamedTuple):
    """What keeps replicas together that train on different data: a batch that one has and another has not is for none.

    ``shortest(length)`` is the least length of all replicas, ``None`` if there is one without; ``any_ends(ends)`` says
    on stage 0 whether the data of any replica have ended.
    """

    is_training: Callable[[], bool]
    shortest: Callable[[int | None], int | None]
    any_ends: Callable[[bool], bool]


class Feed:
    """The batches of a replica.

    Args:
        transport: The channels of this stage.
        stage: Which stage this is.
        num_stages: How many there are.
        loading: What surrounds the work of a loader on stage 0: its random numbers are not those of the training.
        share: ``share(item, what)`` gives all stages the ``item`` of stage 0.
        together: What the replicas must do alike, if there are several.
        num_in_flight: How many batches a stage may have forwarded and not yet run backward.
    """

    def __init__(
        self,
        transport: Transport,
        stage: int,
        num_stages: int,
        loading: Callable[[], AbstractContextManager[Any]],
        share: Callable[[Any, str], Any],
        together: Together | None = None,
        num_in_flight: int = 0,
    ) -> None:
        self.loads, self._loading, self.share, self._together = stage == 0, loading, share, together
        self._transport = transport
        self._num_messages = self._num_loaders = 0
        self._ending_due: Callable[[], Wish] = lambda: Wish(0)
        self.ending = Wish(0)
        self._lender = Lender(range(1, num_stages))
        self._stand_ins, self._num_in_flight = StandIns(self._ask), num_in_flight
        self.is_closed = False
        transport.serve(self._answer)

    def wrap(self, loader: Any) -> Any:
        """What takes the place of ``loader``, which must be of the same kind on all stages."""
        loader = own_loader(loader)
        length = self.share(sized_len(loader) if self.loads else None, "the length of a data loader")
        if self._together is not None and self._together.is_training():
            length = self._together.shortest(length)
        is_stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._num_loaders += 1
        return (_StatefulSharedLoader if is_stateful else _SharedLoader)(loader, length, self, self._num_loaders)

    def batches(self, loader: Any, key: int) -> Iterator[Any]:
        """The batches of ``loader`` on stage 0, on every stage; ``key`` is the same whenever it begins anew."""
        if self.is_closed:
            return iter(loader)
        if not self.loads:
            return self._received()
        with self._loading():
            iterator = iter(loader)
        # Lengths are agreed on, but those of streams are guesses.
        is_stream = not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset)
        return self._loaded(iterator, key, self._together if is_stream else None)

    def let_end(self, due: Callable[[], Wish]) -> None:
        """Let all stages find in :attr:`ending` after the same batch what ``due`` returns on stage 0, soon after."""
        self._ending_due = due

    def read(self, nest: Any) -> Any:
        """A batch with the values of all its tensors, also of those that this stage would not read."""
        return self._stand_ins.read(nest)

    def close(self) -> None:
        """Let loaders be their own again: Lightning has put ours into a ``CombinedLoader`` of the user."""
        self.is_closed = True

    def settle(self) -> None:
        """Fetch what somebody has kept of batches and not read, while stage 0 waits: soon nobody can be asked."""
        self._stand_ins.settle()
        self.share(None, "the end of the data")

    def _received(self) -> Iterator[Any]:
        while (message := self._receive()).extra:
            self.ending = Wish(message.wishes)
            form = pickle.loads(message.extra)
            if any(tensor is None for tensor in message.tensors):
                oldest = max(message.batch - self._num_in_flight - 3, 0)  # those in flight may run again
                self._stand_ins.settle(oldest)
                self._transport.send(REQUESTS, 0, Message(oldest, 0, []))
            yield join(form, self._stand_ins.fill(message.batch, form, message.tensors))

    def _loaded(self, iterator: Iterator[Any], key: int, together: Together | None) -> Iterator[Any]:
        while True:
            with self._loading(), self._transport.clock.measuring("wait_data", self._num_messages):
                batch = next(iterator, _END)
            ends = batch is _END
            if together is not None and together.is_training():
                ends = together.any_ends(ends)
            if ends:
                break
            form, tensors = split(batch)
            self.ending |= self._ending_due()
            copies = [t.detach().cpu().clone() for t in tensors]  # the step may change them
            self._send(copies, _pickled(form), key)
            yield batch
        self._send([], b"", key)

    def _send(self, tensors: list[torch.Tensor], extra: bytes, key: int) -> None:
        for stage, share in self._lender.share(self._num_messages, key, tensors).items():
            self._transport.send(DATA, stage, Message(self._num_messages, self.ending, share, extra=extra))
        self._num_messages += 1

    def _receive(self) -> Message:
        self._num_messages += 1
        return self._transport.receive(DATA, 0, self._num_messages - 1)

    def _ask(self, number: int, leaf: int, always: bool) -> torch.Tensor:
        reply = self._transport.ask(Message(number, 0, [], extra=pickle.dumps((leaf, always))))
        assert reply.tensors[0] is not None
        return reply.tensors[0]

    def _answer(self, stage: int, request: Message) -> Message | None:
        """On stage 0, in a thread: a request without anything else releases older batches."""
        if not request.extra:
            self._lender.release(stage, request.batch)
            return None
        return Message(request.batch, 0, [self._lender.lend(stage, request.batch, *pickle.loads(request.extra))])


def _pickled(form: Any) -> bytes:
    try:
        return pickle.dumps(form)
    except GhostRead as read:
        raise TypeError(
            f"A batch must hold values, because stage 0 sends its batches to the others, but it holds"
            f" {read.ghost.describe()}, which a step has kept in it: let the data set return copies of its objects, as"
            " `copy.copy(item)`, instead of the same ones again."
        ) from None
    except Exception as error:
        culprit = next((leaf for leaf in leaves(form) if not _can_be_pickled(leaf)), form)
        raise TypeError(
            "A batch must hold tensors and what can be pickled, because stage 0 sends its batches to the others, but it"
            f" holds a `{type(culprit).__name__}`: {error}. Convert it in the data set or in `collate_fn`, or define"
            " its class at the top of a module."
        ) from error


def _can_be_pickled(leaf: Any) -> bool:
    try:
        pickle.dumps(leaf)
    except Exception:
        return False
    return True


def own_loader(loader: Any) -> Any:
    """The user's loader, also where ours stands for it already."""
    while issubclass(type(loader), _SharedLoader):  # whatever its `__class__` says
        loader = loader.__dict__["_loader"]
    return loader


def _is_of_a_loop(frame: FrameType | None) -> bool:
    """Whether code is called by a data fetcher of Lightning, through a ``CombinedLoader``."""
    while frame is not None and frame.f_globals.get("__name__", "").endswith(".utilities.combined_loader"):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").endswith(".loops.fetchers")


class _SharedLoader:
    """Stands for a loader: the same attributes, the batches of stage 0."""

    def __init__(self, loader: Any, length: int | None, feed: Feed, key: int) -> None:
        self.__dict__.update(_loader=loader, _length=length, _feed=feed, _key=key)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # code that asks whether it is a `DataLoader` gets the answer of the loader
        return type(self.__dict__["_loader"])

    def __iter__(self) -> Iterator[Any]:
        """Of Lightning's loops all stages ask for the same batches; who else asks may be alone, as a callback is."""
        if not _is_of_a_loop(sys._getframe(1)):
            return iter(self._loader)
        return self._feed.batches(self._loader, self._key)

    def __len__(self) -> int:
        if self._feed.is_closed:
            return len(self._loader)
        if self._length is None:
            raise TypeError(f"A {type(self._loader).__name__} has no length.")
        return int(self._length)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_loader"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._loader, name, value)


class _StatefulSharedLoader(_SharedLoader):
    """The state is that of stage 0."""

    def state_dict(self) -> dict[str, Any]:
        state = self._loader.state_dict() if self._feed.loads else None
        return self._feed.share(state, "the state of a data loader")  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._feed.loads:
            self._loader.load_state_dict(state_dict)


def check_division(loader: Any, num_replicas: int, replica: int) -> None:
    """Let a user's sampler or data set divide the data among replicas, not among processes.

    Raises:
        MisconfigurationException: If it is not known how.
    """
    for sampler in _dividers(loader):
        num = _integer(sampler, "num_replicas", "world_size", "num_shards")
        rank = _integer(sampler, "rank", "global_rank")
        if num is None or rank is None or (num, rank) == (num_replicas, replica):
            continue
        if num == 1 and not isinstance(sampler, DistributedSampler):  # it does not divide
            continue
        if type(sampler) is not DistributedSampler:
            raise MisconfigurationException(
                f"Data must be divided among the replicas, but `{type(sampler).__name__}` divides them among {num}"
                " processes, of which the stages of one replica are several. Pass it"
                " `num_replicas=trainer.strategy.data_parallel_size` and `rank=trainer.strategy.replica`, or make it in"
                " the hook that makes the loader, where `torch.distributed` counts the replicas."
            )
        right: DistributedSampler[Any] = DistributedSampler(
            sampler.dataset,
            num_replicas,
            replica,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
            drop_last=sampler.drop_last,
        )
        right.epoch = sampler.epoch
        sampler.__dict__.update(right.__dict__)


def _dividers(loader: Any) -> list[Any]:
    """Samplers of a loader, of single items and of batches, its data set, and those inside of them."""
    found = [loader]
    for owner in found:  # which grows meanwhile
        # Hugging Face's data sets keep how they are divided in `_distributed`, those of litdata in `distributed_env`.
        names = "sampler", "batch_sampler", "dataset", "_distributed", "distributed_env"
        inner = [_attribute(owner, name) for name in names]
        found += [s for s in inner if s is not None and all(s is not other for other in found)]
    return found[1:]


def _attribute(owner: Any, name: str) -> Any:
    """The attribute, or ``None``. A data set may make an item of any name, so that only what it keeps counts."""
    return getattr(owner, "__dict__", {}).get(name) if isinstance(owner, Dataset) else getattr(owner, name, None)


def _integer(owner: Any, *names: str) -> int | None:
    """The attribute of the first of these names, which may be private."""
    values = (_attribute(owner, prefix + name) for name in names for prefix in ("", "_"))
    return next((value for value in values if isinstance(value, int)), None)
