"""Collectives of user code and of metrics: their world is the replicas, as under DDP, and not the stages.

In a step, code behind the network runs on the last stage alone, so a collective over all processes would wait for ever.
And where a step runs on ghosts, its collectives concern nobody else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
import torch.distributed.nn.functional  # whose defaults are the world of the moment of the import: none
import torchmetrics.metric
from torch import Tensor

__all__ = ["Replicas", "Vote", "alone", "in_hook"]


class Replicas:
    """Lets the process group of the same stage of all replicas stand for the world.

    Touches two private parts: what torch.distributed takes for the world, and how torchmetrics gathers.

    Args:
        group: That process group.
        single: One of this process alone.
    """

    current: ClassVar[Replicas | None] = None

    def __init__(self, group: Any, single: Any) -> None:
        self.group, self._single = group, single
        self._stand_in: Any = None  # for the world
        self.in_step = False  # or in a backward, where other stages are not
        Replicas.current = self
        self._world, self._gather = c10d._WorldMeta.WORLD, torchmetrics.metric.gather_all_tensors
        c10d._WorldMeta.WORLD = property(self._world_of_step, self._world.fset)  # type: ignore[assignment, attr-defined]
        torchmetrics.metric.gather_all_tensors = self._gather_from_replicas

    def step(self) -> AbstractContextManager[None]:
        """Around a step, and around a backward."""
        return self._instead(self.group)

    def hook(self) -> AbstractContextManager[None]:
        """Around a hook that all stages run: only who asks torch.distributed itself sees the replicas."""
        return self._instead(self.group, in_step=False)

    def alone(self) -> AbstractContextManager[None]:
        """Around what runs on ghosts."""
        return self._instead(self._single)

    @property
    def is_alone(self) -> bool:
        """Whether collectives concern this process alone."""
        return self.in_step and self._stand_in is self._single

    @contextmanager
    def _instead(self, group: Any, in_step: bool = True) -> Iterator[None]:
        before = self._stand_in, self.in_step
        self._stand_in, self.in_step = group, in_step
        try:
            yield
        finally:
            self._stand_in, self.in_step = before

    def close(self) -> None:
        """Let the world be all processes again."""
        Replicas.current = None
        c10d._WorldMeta.WORLD = self._world  # type: ignore[method-assign]
        torchmetrics.metric.gather_all_tensors = self._gather

    def _world_of_step(self, cls: Any) -> Any:
        is_ours = threading.current_thread().name.startswith("dgmp-")  # the transport knows the real world
        return self._world.fget(cls) if self._stand_in is None or is_ours else self._stand_in  # type: ignore[attr-defined]

    def _gather_from_replicas(self, result: Tensor, group: Any = None) -> list[Tensor]:
        ranks = set(range(dist.get_world_size()) if group is None else dist.get_process_group_ranks(group))
        replicas = dist.get_process_group_ranks(self.group)  # each as the stage of this process
        has_other_stages = not ranks <= set(replicas)
        return self._gather(result, self.group if has_other_stages else group)


def alone() -> AbstractContextManager[None]:
    """Let collectives without a group concern this process alone."""
    return nullcontext() if Replicas.current is None else Replicas.current.alone()


def in_hook() -> AbstractContextManager[None]:
    """Around loaders and optimizers: what divides its work by torch.distributed does so among the replicas."""
    return nullcontext() if Replicas.current is None else Replicas.current.hook()


class Vote:
    """What the first stages of all replicas decide together, which all of them must ask for alike.

    Args:
        group: Their process group, of the host.
        wait: ``wait(work, what)`` waits for a collective, with a limit.
    """

    def __init__(self, group: Any, wait: Callable[[Any, str], None]) -> None:
        self._group, self._wait = group, wait
        self._begun: tuple[Any, Tensor] | None = None

    def any(self, flags: int, what: str) -> int:
        """The union of the ``flags`` of all; ``what`` says for an error what this is for."""
        return self._end(*self._begin(flags), what)

    def any_of_last_time(self, flags: int, what: str) -> int:
        """As :meth:`any`, but of the flags at the last call of this method, for which nobody has to wait now."""
        before, self._begun = self._begun, self._begin(flags)
        return 0 if before is None else self._end(*before, what)

    def _begin(self, flags: int) -> tuple[Any, Tensor]:
        tensor = torch.tensor([flags])
        return dist.all_reduce(tensor, dist.ReduceOp.BOR, self._group, async_op=True), tensor

    def _end(self, work: Any, tensor: Tensor, what: str) -> int:
        self._wait(work, what)
        return int(tensor)
