"""Registers the strategy with the Lightning of the project, whether that is imported before this package or after it.

A project has ``lightning.pytorch`` or ``pytorch_lightning``: the same code, but not the same classes. The strategy
belongs to the one that is imported first.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register"]

_HOSTS = ("lightning.pytorch", "pytorch_lightning")


def register() -> None:
    """Let ``Trainer(strategy="delayed_mp")`` be known, now or as soon as there is a ``Trainer``."""
    if any(name in sys.modules for name in _HOSTS):
        importlib.import_module("lightning_dgmp.strategy")
    else:
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Registers the strategy when a Lightning has been imported."""

    _is_looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _HOSTS or self._is_looking:
            return None
        self._is_looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._is_looking = False
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            loader.exec_module = execute
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            execute(module)
            if "lightning_dgmp.host" not in sys.modules:  # which is what imports it, otherwise
                importlib.import_module("lightning_dgmp.strategy")

        loader.exec_module = exec_module
        return spec
