"""Values of a stage into which later stages write in place, as in ``out += identity``: theirs from then on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_dgmp.ghost import Ghost, GhostError
from lightning_dgmp.nests import map_tensors, replace_leaves
from lightning_dgmp.operations import GhostMode, shares_memory

__all__ = ["Overwritten"]


class Overwritten(TorchFunctionMode):
    """What later stages have written into in one step. Nothing happens to it here, but ghosts take its place.

    Args:
        root: The module that runs.
        mode: The family of the ghosts.
        stage: The stage that runs it.
        is_expected: Whether the plan knows of such writes. Only then operations are looked at, which takes time.
    """

    def __init__(self, root: nn.Module, mode: GhostMode, stage: int, is_expected: bool) -> None:
        super().__init__()
        self._root, self._mode, self._stage, self._is_expected = root, mode, stage, is_expected
        self._written: list[tuple[Tensor, Ghost]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the step."""
        before, self._mode.take_over = self._mode.take_over, self._take_over
        try:
            with self if self._is_expected else nullcontext():
                yield
        finally:
            self._mode.take_over = before
            self._written.clear()

    def current(self, nest: Any) -> Any:
        """``nest`` with ghosts in the place of what later stages have written into, and of views of it."""
        return replace_leaves(self._current, nest) if self._written else nest

    def _current(self, leaf: Any) -> Any:
        value = leaf.received() if isinstance(leaf, Ghost) and leaf.has_arrived else leaf
        if not isinstance(value, Tensor) or isinstance(value, Ghost):
            return leaf
        writer = next((ghost for target, ghost in self._written if shares_memory(value, [target])), None)
        return leaf if writer is None else self._ghost(value, writer, value.requires_grad or writer.needs_grad)

    def _ghost(self, value: Tensor, writer: Ghost, requires_grad: bool) -> Ghost:
        with torch._C.DisableTorchFunction():
            return self._mode.like(value, writer.origin, requires_grad, value.device, writer.stage)

    def _take_over(self, name: str, inputs: list[Ghost], target: Tensor) -> Ghost | None:
        latest = max(inputs, key=lambda ghost: ghost.stage)
        if latest.stage <= self._stage or shares_memory(target, (*self._root.parameters(), *self._root.buffers())):
            return None
        if not self._is_expected:
            raise GhostError(
                f"`{name}` writes {latest.describe()} in place into a tensor of stage {self._stage}, which it did not"
                " do on the first batch, on which the plan was made: make the step the same for all batches, or build"
                " a new tensor, as by `x = x + y` instead of `x += y`."
            )
        self._mode.has_read_values = True  # so that no template takes the place of the module that does this
        needs_grad = torch.is_grad_enabled() and any(ghost.needs_grad for ghost in inputs)
        taken = self._ghost(target, latest, target.requires_grad or needs_grad)
        self._written.append((target, taken))
        return taken

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._written:
            args, kwargs = map_tensors(self._current, args), map_tensors(self._current, dict(kwargs))
        return func(*args, **kwargs)
