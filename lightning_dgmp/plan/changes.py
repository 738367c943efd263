"""What a step does to the attributes of modules."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, nn

from lightning_dgmp.nests import is_same, marks

__all__ = ["Kept", "Toggles"]

_INTERNAL = {*vars(nn.Module()), "_compiled_call_impl"}
_MAX_ITEMS = 100  # of a container that is looked into
_CONSTANT = {bool, int, float, str, type(None)}
_SIMPLE = (bool, int, float, str, type(None), Tensor, tuple)


class Toggles:
    """Which plain attributes of modules a step changes and changes back, as in ``net.eval(); ...; net.train()``."""

    def __init__(self, root: nn.Module) -> None:
        self._before = [
            (path, vars(module), {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))})
            for path, module in root.named_modules()
        ]
        self._last = [list(attributes.values()) for _, attributes, _ in self._before]
        self._seen: dict[tuple[str, str], tuple[dict[str, Any], Any]] = {}

    def look(self) -> None:
        """Note what differs now."""
        for i, (path, attributes, before) in enumerate(self._before):
            if _are(self._last[i], attributes):
                continue
            self._last[i] = list(attributes.values())
            for name, value in before.items():
                if attributes.get(name) != value:
                    self._seen[path, name] = attributes, value

    def changed_back(self, is_incomplete: bool) -> list[tuple[str, str]]:
        """Those that are as before again; of a step whose end is unknown, those of which that is likely."""
        if is_incomplete:
            return [key for key in self._seen if key[1] == "training"]
        return [key for key, (attributes, value) in self._seen.items() if attributes.get(key[1]) == value]


class Kept:
    """The attributes of modules that a step sets anew; not what is in containers, which collect results."""

    def __init__(self, root: nn.Module) -> None:
        self._last: dict[int, tuple[list[Any], dict[str, Any], dict[str, Any]]] = {}
        for module in root.modules():
            self.have_changed(module)

    def have_changed(self, module: nn.Module) -> bool:
        """Whether those of ``module`` have changed since the last look."""
        attributes = vars(module)
        items, last, mutable = self._last.get(id(module), ([], {}, {}))
        if _are(items, attributes):
            changed = any(_is_set_anew(last[name], value) for name, value in mutable.items())
            last.update({name: _marks(value) for name, value in mutable.items()})
            return changed
        values = {name: v for name, v in attributes.items() if name not in _INTERNAL and not callable(v)}
        now = {name: _marks(value) for name, value in values.items()}
        mutable = {name: value for name, value in values.items() if now[name] is not value}
        self._last[id(module)] = list(attributes.values()), now, mutable
        return last.keys() != values.keys() or any(_is_set_anew(last[name], v) for name, v in values.items())


def _are(items: list[Any], attributes: dict[str, Any]) -> bool:
    """Whether the values of ``attributes`` are still these objects."""
    return len(items) == len(attributes) and all(map(operator.is_, items, attributes.values()))


def _marks(value: Any, depth: int = 2) -> Any:
    if type(value) in _CONSTANT:
        return value
    if isinstance(value, (dict, list)) and depth and len(value) <= _MAX_ITEMS:
        if isinstance(value, dict):
            return {key: _marks(item, depth - 1) for key, item in value.items()}
        return [_marks(item, depth - 1) for item in value]
    return marks(value) if isinstance(value, _SIMPLE) else value


def _is_set_anew(last: Any, value: Any) -> bool:
    """Whether a value has changed, but for what lists have got in addition: they collect results."""
    if type(value) in _CONSTANT:
        return type(last) is not type(value) or (last is not value and last != value)
    if isinstance(value, dict) and last is not value:
        known = isinstance(last, dict) and last.keys() == value.keys()
        return not known or any(_is_set_anew(last[key], item) for key, item in value.items())
    if isinstance(value, list) and last is not value:
        known = isinstance(last, list) and len(last) <= len(value)
        return not known or any(_is_set_anew(a, b) for a, b in zip(last, value))
    if isinstance(value, _SIMPLE):
        return not isinstance(last, list) or not is_same(last, value)
    return last is not value
