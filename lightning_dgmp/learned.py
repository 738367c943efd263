"""What the steps leave behind on the last stage, for the hooks that run on all stages.

Code behind the network runs on the last stage alone: it updates metrics, appends to lists, counts. When an epoch is
over the others get what it left, so that ``on_validation_epoch_end`` and the like find the same state everywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_dgmp.ghost import realised
from lightning_dgmp.host import LightningModule
from lightning_dgmp.nests import is_same, leaves, marks
from lightning_dgmp.objects import is_object_of_user

__all__ = ["Key", "Learned", "attributes_in", "is_plain", "put_attributes"]

_PLAIN = (Tensor, int, float, complex, bool, str, bytes, type(None), numpy.ndarray, numpy.generic)
_OF_MODULES, _OF_LIGHTNING = frozenset(vars(nn.Module())), frozenset(vars(LightningModule()))
_NOTHING = object()
Key = tuple[str, str, str]  # a path, an attribute and, if that is an object of the user, one of its own
_Attributes = dict[Key, Any]


class Learned:
    """The plain attributes of a LightningModule and of its metrics, as far as they have changed.

    Attributes count that are tensors, arrays, numbers or strings, nests or sets of these, or objects with such.

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
        self._marks = {key: marks(value) for key, value in self._attributes()}
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
                self._changed |= {key for key, value in now.items() if not is_same(self._marks.get(key), value)}
            self._marks = {key: marks(value) for key, value in now.items()}
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
        put_attributes(self._module, self._share(self._changes(), "the end of an epoch"))

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
        for of_stage in self._gather(more, "the metrics of other stages"):
            for metrics, values in zip(mine, of_stage):
                metrics.update(values)
        for metrics, values in zip(mine, theirs):
            metrics.update(values)
        return results

    def _changes(self) -> _Attributes:
        now = dict(self._attributes())
        changed = {
            key: value for key, value in now.items() if key in self._changed or not is_same(self._marks.get(key), value)
        }
        self._marks, self._changed = {key: marks(value) for key, value in now.items()}, set()
        self._begins, self._has_stepped = True, False
        return changed

    def _modules(self) -> list[tuple[str, nn.Module]]:
        modules = self._module.named_modules()
        return [(path, m) for path, m in modules if not path or isinstance(m, (Metric, MetricCollection))]

    def _attributes(self) -> Iterator[tuple[Key, Any]]:
        return ((key, realised(item)) for key, item in attributes_in(self._modules()) if is_plain(item))


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


def _look(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, (int, float, complex, str, bytes, type(None))):
        return type(value), repr(value) if isinstance(value, float) else value  # a NaN is itself
    return id(value), len(value) if isinstance(value, (list, dict, set, deque)) else 0


def _is_plain_set(value: Any) -> bool:
    return isinstance(value, (set, frozenset)) and all(is_plain(item) for item in value)


def is_plain(value: Any) -> bool:
    """Whether ``value`` can be sent: a tensor, an array, a number, a text, or a nest or set of these."""
    try:
        return all(isinstance(leaf, _PLAIN) or _is_plain_set(leaf) for leaf in leaves(value))
    except Exception:  # a nest that contains itself, or one that cannot be looked through
        return False
