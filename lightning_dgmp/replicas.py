"""Collectives of user code and of metrics: their world is the replicas, as under DDP, and not the stages.

In a step, code behind the network runs on the last stage alone, so a collective over all processes would wait for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed.distributed_c10d as c10d
import torch.distributed.nn.functional  # noqa: F401  whose defaults are the world of the moment of the import: none
import torchmetrics.metric
from torch import Tensor

__all__ = ["Replicas"]


class Replicas:
    """Lets the process group of the same stage of all replicas stand for the world.

    Touches two private parts: what torch.distributed takes for the world, and how torchmetrics gathers.

    Args:
        group: That process group.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.in_step = False
        self._world, self._gather = c10d._WorldMeta.WORLD, torchmetrics.metric.gather_all_tensors
        c10d._WorldMeta.WORLD = property(self._world_of_step, self._world.fset)  # type: ignore[assignment, attr-defined]
        torchmetrics.metric.gather_all_tensors = self._gather_from_replicas

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step, and around a backward."""
        before, self.in_step = self.in_step, True
        try:
            yield
        finally:
            self.in_step = before

    def close(self) -> None:
        """Let the world be all processes again."""
        c10d._WorldMeta.WORLD = self._world  # type: ignore[method-assign]
        torchmetrics.metric.gather_all_tensors = self._gather

    def _world_of_step(self, cls: Any) -> Any:
        is_ours = threading.current_thread().name.startswith("dgmp-")  # the transport knows the real world
        return self.group if self.in_step and not is_ours else self._world.fget(cls)  # type: ignore[attr-defined]

    def _gather_from_replicas(self, result: Tensor, group: Any = None) -> list[Tensor]:
        return self._gather(result, self.group if group is None or group is c10d.GroupMember.WORLD else group)
