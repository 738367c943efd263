"""What the modules of other stages return: ghosts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_dgmp.calls import no_backward_hooks
from lightning_dgmp.ghost import PLAIN, Ghost, looks_of
from lightning_dgmp.nests import is_same, leaves, map_leaves, marks, replace_leaves, tensors_in
from lightning_dgmp.objects import is_object_of_user
from lightning_dgmp.operations import GhostMode
from lightning_dgmp.plan.restore import attributes_saved
from lightning_dgmp.reads import noting_reads
from lightning_dgmp.replicas import alone
from lightning_dgmp.stage.isolation import Isolation

__all__ = ["Skips", "remove_ghosts"]

_MAX_TEMPLATES = 10_000
_MAX_ITEMS = 100
_CONTAINERS = (tuple, list, dict, set, deque)
_INTERNAL = {*vars(nn.Module()), "_compiled_call_impl"}


class Skips:
    """Skips calls. A module runs on ghosts once for each kind of input, which is how its outputs are known.

    A module that leaves something behind that does not come from ghosts, in its attributes or in its arguments, runs
    on ghosts each time, so that all stages find it.

    Args:
        root: The module whose submodules are skipped.
        mode: The family of the ghosts.
        hiding: A context in which parameters that are here too are ghosts.
    """

    def __init__(
        self, root: nn.Module, mode: GhostMode, hiding: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self.root, self.mode, self._hiding = root, mode, hiding
        self._templates: dict[Any, _Template] = {}
        self._settings: dict[str, list[tuple[dict[str, Any], int, list[str]]]] = {}

    def outputs(
        self, call: Callable[..., Any], path: str, stage: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What ``call(*args, **kwargs)`` of a module of ``stage`` would return, with ghosts for its tensors."""
        origin = f"`{path}` of stage {stage}"
        key = (path, torch.is_grad_enabled(), looks_of((args, kwargs)), self._settings_of(path))
        inputs = leaves((args, kwargs))
        template = self._templates.get(key)
        if template is not None:
            return template.fill(inputs, self.mode, origin, stage)

        module = self.root.get_submodule(path)
        # What has arrived here for other ends must neither be waited for nor be changed.
        isolation = Isolation(self.mode)
        try:
            args, kwargs = isolation.copy(args), isolation.copy(kwargs)
            stand_ins, before_call = leaves((args, kwargs)), marks(isolation.real)
            out, kept = self._run(call, module, args, kwargs)
        finally:
            isolation.end()
        has_hooks = any(child._forward_hooks for child in module.modules())  # which may keep what they see
        is_changed = isolation.write_back() or not is_same(before_call, isolation.real)
        passes_on = isolation.is_in(out, {id(leaf) for leaf in stand_ins})
        if has_hooks or is_changed or kept or self.mode.has_read_values or passes_on:
            return isolation.original(out)
        template = _Template(out, stand_ins)
        if template.reusable:
            if len(self._templates) >= _MAX_TEMPLATES:  # as when every batch has another length
                self._templates.clear()
            self._templates[key] = template
        return template.fill(inputs, self.mode, origin, stage)

    def _run(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, bool]:
        """What ``call`` returns for ghosts, and whether it leaves anything behind in attributes that has values."""
        restore, before = attributes_saved(module), _real_attributes(module)
        self.mode.written_over = self.root.buffers
        self.mode.stale = []
        self.mode.draws_noise = self.mode.has_read_values = False  # what happens inside of the module is its owner's
        try:
            with alone(), no_backward_hooks(module), noting_reads(self.mode), self._hiding():
                out = call(*args, **kwargs)
            if self.mode.stale:
                out = replace_leaves(self._ghost_of_stale, out)
            kept = {
                key: _copied(value)
                for key, (value, _) in _real_attributes(module).items()
                if key not in before or not is_same(before[key][1], value)
            }
            ghosts = _ghosts_without_a_predecessor(module, before)
        finally:
            restore()  # ghosts, and the statistics that the owner counts
            self.mode.written_over, self.mode.draws_noise = tuple, True
        _keep(module, kept | ghosts)
        return out, bool(kept)

    def _ghost_of_stale(self, leaf: Any) -> Any:
        """``leaf``, or a ghost if its values are known to the owner alone."""
        if not self.mode.is_stale(leaf):
            return leaf
        return self.mode.like(leaf, "a buffer that takes activations", leaf.requires_grad, leaf.device)

    def _settings_of(self, path: str) -> tuple[Any, ...]:
        """The attributes of a module and those inside of it that may decide shapes, as ``training`` and sizes."""
        known = self._settings.get(path, [])
        if not known or any(len(attributes) != count for attributes, count, _ in known):
            of_modules = [vars(child) for child in self.root.get_submodule(path).modules()]
            self._settings[path] = known = [
                (attributes, len(attributes), [name for name, value in attributes.items() if _may_decide(name, value)])
                for attributes in of_modules
            ]
        return tuple(_setting(attributes.get(name)) for attributes, _, names in known for name in names)

    def realised(self, nest: Any) -> Any:
        """``nest`` with the values of those ghosts that stand for work of other stages."""
        mine = lambda t: isinstance(t, Ghost) and t.bound and t.family is self.mode  # noqa: E731
        return replace_leaves(lambda t: t.received() if mine(t) else t, nest)


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

    def fill(self, inputs: list[Any], mode: GhostMode, origin: str, stage: int) -> Any:
        sources: Iterator[int | None] = iter(self.sources)
        fresh: dict[int, Ghost] = {}  # one for each, also if it is returned in several places

        def one(leaf: Any) -> Any:
            source = next(sources)
            if source is not None:
                return inputs[source]
            if not isinstance(leaf, Ghost):
                return leaf
            if id(leaf) not in fresh:
                fresh[id(leaf)] = mode.again(leaf, origin, stage)
            return fresh[id(leaf)]

        return map_leaves(one, self.out)


def _may_decide(name: str, value: Any) -> bool:
    """Whether an attribute is neither one of any module nor a part of a library."""
    is_of_kind = isinstance(value, (Tensor, *PLAIN, *_CONTAINERS)) or is_object_of_user(value)
    return name == "training" or (name not in _INTERNAL and is_of_kind)


def _setting(value: Any, depth: int = 2) -> Any:
    """A key for the value of an attribute, unless it is a ghost, a part of a library, or long, as data and results."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, _CONTAINERS):
        return looks_of(value) if len(value) <= _MAX_ITEMS else None
    if isinstance(value, Tensor):
        return None if isinstance(value, Ghost) else looks_of(value)
    if depth and is_object_of_user(value):
        return tuple((name, _setting(item, depth - 1)) for name, item in vars(value).items())
    return None


def _real_attributes(module: nn.Module) -> dict[tuple[str, str], tuple[Any, list[Any]]]:
    """The attributes and buffers without ghosts, apart from running statistics, by path and name, with their marks."""
    found = {}
    for path, child in module.named_modules():
        items = [(name, value) for name, value in vars(child).items() if name not in _INTERNAL]
        if not isinstance(child, _NormBase):
            items += child._buffers.items()
        for name, value in items:
            content = vars(value) if is_object_of_user(value) else value
            try:
                if not tensors_in(content, Ghost):
                    found[path, name] = content, marks(content)
            except RecursionError:  # a nest that contains itself
                continue
    return found


def _ghosts_without_a_predecessor(module: nn.Module, before: Container[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """New attributes with ghosts: who reads them is told whose they are, and not that there are none."""
    return {
        (path, name): value
        for path, child in module.named_modules()
        for name, value in vars(child).items()
        if name not in _INTERNAL and (path, name) not in before and isinstance(value, Ghost)
    }


def remove_ghosts(root: nn.Module) -> None:
    """Take out of the attributes of ``root`` and its modules what stands for work of other stages."""
    for module in root.modules():
        for name in [name for name, value in vars(module).items() if isinstance(value, Ghost) and not value.bound]:
            del module.__dict__[name]


def _copied(value: Any) -> Any:
    return map_leaves(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)


def _keep(module: nn.Module, kept: dict[tuple[str, str], Any]) -> None:
    for (path, name), value in kept.items():
        child = module.get_submodule(path)
        buffer = child._buffers.get(name)
        if buffer is not None and isinstance(value, Tensor) and buffer.shape == value.shape:
            buffer.data.copy_(value)
        elif name in child._buffers:
            child._buffers[name] = value
        elif is_object_of_user(child.__dict__.get(name)):
            vars(child.__dict__[name]).update(value)
        else:
            child.__dict__[name] = value
