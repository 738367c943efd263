"""What the steps leave behind on the last stage, for the hooks that run on all stages.

Code behind the network runs on the last stage alone: it updates metrics, appends to lists, counts. When an epoch is
over the others get what it left, so that ``on_validation_epoch_end`` and the like find the same state everywhere.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_dgmp.ghost import Ghost, check_sent, realised
from lightning_dgmp.host import LightningModule, rank_zero_warn
from lightning_dgmp.nests import is_same, leaves, marks, split, tensors_in
from lightning_dgmp.objects import attributes_of, has_attributes, is_object_of_user, modules_beside
from lightning_dgmp.parcel import Parcel, can_be_pickled, pack, unpack

__all__ = ["Key", "Learned", "attributes_in", "is_plain", "put_attributes"]

_PLAIN = (Tensor, int, float, complex, bool, str, bytes, type(None), numpy.ndarray, numpy.generic)
_CONTAINERS = (list, tuple, deque, MutableMapping)
_OF_MODULES, _OF_LIGHTNING = frozenset(vars(nn.Module())), frozenset(vars(LightningModule()))
_NOTHING = object()
Key = tuple[str, str, str]  # a path, an attribute and, if that is an object of the user, one of its own
_Attributes = dict[Key, Any]


class Learned:
    """The plain attributes of a LightningModule and of its metrics, as far as they have changed.

    Attributes count that are tensors, arrays, numbers or strings, nests or sets of these, or objects with such, and
    containers with whatever can be pickled.

    Args:
        module: The LightningModule.
        share: ``share(nest, what)`` gives all stages the ``nest`` of the last one.
        gather: ``gather(item, what)`` gives all stages the ``item`` of each.
    """

    def __init__(
        self,
        module: LightningModule,
        share: Callable[[Any, str], Any],
        gather: Callable[[Any, str], list[Any]],
    ) -> None:
        self._module, self._share, self._gather = module, share, gather
        self._marks = {key: _marks(value) for key, value in self._attributes()}
        self._warned: set[Key] = set()
        self._changed: set[Key] = set()  # before the marks were made
        self._begins, self._has_stepped = True, False
        self._before: dict[Key, Any] = {}  # the newest step
        self._watched: list[tuple[str, nn.Module]] = []

    def begin(self) -> None:
        """Let what the next steps change be told from what hooks, which all stages run, have done before them."""
        self._begins = True

    def before_step(self) -> None:
        """Before a step on the last stage."""
        if self._begins:
            now = dict(self._attributes())
            if self._has_stepped:
                self._changed |= {key for key, value in now.items() if not _is_same(self._marks.get(key), value)}
            self._marks = {key: _marks(value) for key, value in now.items()}
            self._watched = self._modules()
        self._begins, self._has_stepped = False, True
        self._before = self._glance()

    def after_step(self) -> None:
        """After a step on the last stage: hooks may set back what it has changed."""
        after = self._glance()
        self._changed |= {key for key, seen in after.items() if self._before.get(key, _NOTHING) != seen}

    def _glance(self) -> dict[Key, Any]:
        """What shows most changes quickly: numbers and texts, the lengths of containers, versions of tensors."""
        return {key: _look(value) for key, value in attributes_in(self._watched)}

    def share_state(self) -> None:
        """Give all stages the attributes that the steps have changed on the last one."""
        mine = self._changes()
        modules = dict(self._modules())
        objects = {key[:2]: type(getattr(modules[key[0]], key[1])) for key in mine if key[2]}
        kinds = {key: kind for key, kind in objects.items() if can_be_pickled(kind)}
        theirs, kinds = self._share((mine, kinds), "the end of an epoch")
        for (path, name, inner), value in theirs.items():
            if path not in modules:  # a step has made it
                continue
            attributes = vars(modules[path])
            if (kind := kinds.get((path, name))) and inner and type(attributes.get(name)) is not kind:
                attributes[name] = kind.__new__(kind)  # made by a step
            entries, entry = (vars(attributes[name]), inner) if inner else (attributes, name)
            if not isinstance(value, Parcel):
                entries[entry] = value
            elif theirs is not mine:
                entries[entry] = unpack(value, entries.get(entry), modules)

    def share_results(self, results: Any = None) -> Any:
        """Give all stages the metrics for callbacks, for the progress bar and for loggers, and ``results``.

        Of values that several stages have logged the last stage's count. What a hook has logged on another one alone,
        such as the norms of its gradients, all of them get too.
        """
        connector = self._module.trainer._logger_connector
        mine: tuple[Any, ...] = (
            connector.callback_metrics,
            connector.logged_metrics,
            connector.progress_bar_metrics,
        )
        theirs, results = self._share((mine, results), "the metrics")
        more = [{key: value for key, value in own.items() if key not in known} for own, known in zip(mine, theirs)]
        for metrics, *of_stages in zip(mine, theirs, *self._gather(more, "the metrics of other stages")):
            merged = {key: value for values in of_stages for key, value in values.items()}
            metrics.clear()  # so that they are in the same order everywhere
            metrics.update(merged)
        return results

    def _changes(self) -> _Attributes:
        now = dict(self._attributes())
        changed = {
            key: value
            for key, value in now.items()
            if key in self._changed or not _is_same(self._marks.get(key), value)
        }
        self._marks, self._changed = {key: _marks(value) for key, value in now.items()}, set()
        self._begins, self._has_stepped = True, False
        return {key: value for key, item in changed.items() if (value := self._packed(key, item)) is not _NOTHING}

    def _packed(self, key: Key, value: Any) -> Any:
        """As what a changed ``value`` travels, or ``_NOTHING``."""
        try:
            if not isinstance(value, _CONTAINERS) or (is_plain(value) and can_be_pickled(split(value)[0])):
                check_sent(tensors_in(value, Ghost))
                return value
            return pack(value, {id(module): path for path, module in self._watched if path})
        except Exception as error:
            if key not in self._warned:
                self._warned.add(key)
                rank_zero_warn(
                    "What steps keep must be there and something that can be pickled to reach all stages, but"
                    f" `{'.'.join(filter(None, key))}` stays on the last stage ({error}): keep tensors, numbers or"
                    " objects of classes of a module."
                )
            return _NOTHING

    def _modules(self) -> list[tuple[str, nn.Module]]:
        """The LightningModule and the metrics in it, also those in its containers and objects."""
        modules = [*self._module.named_modules(), *modules_beside(self._module).items()]
        return [(path, m) for path, m in modules if not path or isinstance(m, (Metric, MetricCollection))]

    def _attributes(self) -> Iterator[tuple[Key, Any]]:
        return ((key, _realised(item)) for key, item in attributes_in(self._modules()) if _can_be_kept(item))


def attributes_in(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[Key, Any]]:
    """The attributes that the user gave to modules, and those of his objects in them."""
    for path, module in modules:
        skip = _OF_MODULES if path else _OF_LIGHTNING
        for name, value in vars(module).items():
            if name not in skip:
                inside = vars(value).items() if is_object_of_user(value) else (("", value),)
                yield from (((path, name, inner), item) for inner, item in inside)


def put_attributes(root: nn.Module, attributes: Mapping[Key, Any]) -> None:
    """Let modules in ``root`` have such attributes."""
    for (path, name, inner), value in attributes.items():
        of_module = root.get_submodule(path).__dict__
        (vars(of_module[name]) if inner else of_module)[inner or name] = value


class _Itself:
    """Of a tensor, whose ``id`` another one may have later."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)

    def __eq__(self, other: object) -> bool:
        tensor = self._tensor()
        return tensor is not None and isinstance(other, _Itself) and tensor is other._tensor()

    __hash__ = None  # type: ignore[assignment]


def _look(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Itself(value), None if value.is_inference() else value._version
    if isinstance(value, (int, float, complex, str, bytes, type(None))):
        return type(value), repr(value) if isinstance(value, float) else value  # a NaN is itself
    return id(value), len(value) if isinstance(value, (list, dict, set, deque)) else 0


def _can_be_kept(value: Any) -> bool:
    return isinstance(value, _CONTAINERS) or is_plain(value)


def _realised(value: Any) -> Any:
    return realised(value) if is_plain(value) else value


def _marks(value: Any) -> Any:
    return marks(value) if is_plain(value) else _glimpse(value)


def _is_same(before: Any, value: Any) -> bool:
    return is_same(before, value) if is_plain(value) else bool(before == _glimpse(value))


def _glimpse(value: Any) -> tuple[Any, ...]:
    """What shows most changes of a container with objects, and of the attributes of these."""
    try:
        items = leaves(value)
    except Exception:  # as in `is_plain`
        return (_look(value),)
    inside = [
        {name: _look(item) for name, item in attributes_of(leaf).items()} if has_attributes(leaf) else None
        for leaf in items
    ]
    return _look(value), list(map(_look, items)), inside


def _is_plain_set(value: Any) -> bool:
    return isinstance(value, (set, frozenset)) and all(is_plain(item) for item in value)


def is_plain(value: Any) -> bool:
    """Whether ``value`` can be sent: a tensor, an array, a number, a text, or a nest or set of these."""
    try:
        return all(isinstance(leaf, _PLAIN) or _is_plain_set(leaf) for leaf in leaves(value))
    except Exception:  # a nest that contains itself, or one that cannot be looked through
        return False
