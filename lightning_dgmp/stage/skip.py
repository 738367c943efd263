"""What the modules of other stages return: ghosts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dgmp.calls import no_backward_hooks
from lightning_dgmp.ghost import PLAIN, Ghost, GhostMode, looks_of
from lightning_dgmp.nests import leaves, map_leaves, map_tensors
from lightning_dgmp.plan.restore import attributes_saved

__all__ = ["Skips"]

_MAX_TEMPLATES = 10_000


class Skips:
    """Skips calls. A module runs on ghosts once for each kind of input, which is how its outputs are known.

    Args:
        root: The module whose submodules are skipped.
        mode: The family of the ghosts.
    """

    def __init__(self, root: nn.Module, mode: GhostMode) -> None:
        self._root, self._mode = root, mode
        self._templates: dict[Any, _Template] = {}

    def outputs(
        self, call: Callable[..., Any], path: str, origin: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What ``call(*args, **kwargs)`` would return, with ghosts made by ``origin`` for its tensors."""
        inputs = leaves((args, kwargs))
        # What has arrived here for other ends must neither be waited for nor be changed.
        args, kwargs = map_tensors(self._unbound, args), map_tensors(self._unbound, kwargs)
        key = (path, torch.is_grad_enabled(), looks_of((args, kwargs)))
        template = self._templates.get(key)
        if template is None:
            self._mode.written_over = {id(buffer) for buffer in self._root.buffers()}
            self._mode.draws_noise = False  # what happens inside of the module is its owner's
            module = self._root.get_submodule(path)
            restore = attributes_saved(module)  # they are the owner's to change
            try:
                with no_backward_hooks(module):
                    out = call(*args, **kwargs)
                template = _Template(out, leaves((args, kwargs)))
            finally:
                restore()
                self._mode.written_over, self._mode.draws_noise = set(), True
            if any(child._forward_hooks for child in module.modules()):  # which may keep what they see
                return out
            if template.reusable:
                if len(self._templates) >= _MAX_TEMPLATES:  # as when every batch has another length
                    self._templates.clear()
                self._templates[key] = template
        return template.fill(inputs, self._mode, origin)

    def realised(self, nest: Any) -> Any:
        """``nest`` with the values of those ghosts that stand for work of other stages."""
        mine = lambda t: isinstance(t, Ghost) and t.bound and t.family is self._mode  # noqa: E731
        return map_tensors(lambda t: t.received() if mine(t) else t, nest)

    def _unbound(self, tensor: Tensor) -> Tensor:
        return self._mode.again(tensor, tensor.origin) if isinstance(tensor, Ghost) and tensor.bound else tensor


class _Template:
    """What a skipped module returns: the structure, with ghosts for its tensors and its own arguments where it passes
    them on.
    """

    def __init__(self, out: Any, inputs: list[Any]) -> None:
        self.out = out
        self.reusable = True
        places = {id(item): i for i, item in enumerate(inputs) if not isinstance(item, PLAIN)}
        self.sources: list[int | None] = []
        for leaf in leaves(out):
            source = places.get(id(leaf))
            self.sources.append(source)
            if source is None and not isinstance(leaf, (Ghost, *PLAIN)):
                self.reusable = False  # depends on the values of this batch, or has a state of its own

    def fill(self, inputs: list[Any], mode: GhostMode, origin: str) -> Any:
        sources: Iterator[int | None] = iter(self.sources)

        def one(leaf: Any) -> Any:
            source = next(sources)
            if source is not None:
                return inputs[source]
            return mode.again(leaf, origin) if isinstance(leaf, Ghost) else leaf

        return map_leaves(one, self.out)
