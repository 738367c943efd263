"""Collectives of user code and of metrics: their world is the replicas, as under DDP, and not the stages.

In a step, code behind the network runs on the last stage alone, so a collective over all processes would wait for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed.distributed_c10d as c10d
import torchmetrics.metric
from torch import Tensor

__all__ = ["Replicas"]


class Replicas:
    """Lets the process group of the same stage of all replicas stand for the world.

    Touches two private parts: what torch.distributed takes for "no group given", and how torchmetrics gathers.

    Args:
        group: That process group.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self._default_group, self._gather = c10d._get_default_group, torchmetrics.metric.gather_all_tensors
        self._thread: int | None = None  # that of the step; those of the transport know the real world
        c10d._get_default_group = self._group_of_step
        torchmetrics.metric.gather_all_tensors = self._gather_from_replicas

    @property
    def in_step(self) -> bool:
        """Whether a step runs."""
        return self._thread is not None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step."""
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None

    def close(self) -> None:
        """Let the world be all processes again."""
        c10d._get_default_group = self._default_group
        torchmetrics.metric.gather_all_tensors = self._gather

    def _group_of_step(self) -> Any:
        return self.group if self._thread == threading.get_ident() else self._default_group()

    def _gather_from_replicas(self, result: Tensor, group: Any = None) -> list[Tensor]:
        return self._gather(result, self.group if group is None else group)
