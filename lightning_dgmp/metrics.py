"""Logging from steps of which a process runs only a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning_dgmp.ghost import Ghost
from lightning_dgmp.host import DummyLogger, LightningModule, rank_zero_warn
from lightning_dgmp.nests import tensors_in

__all__ = ["logging_nothing", "logging_what_is_here"]


@contextmanager
def logging_nothing(
    module: LightningModule, instead: Callable[..., None] | None = None, with_loggers: bool = False
) -> Iterator[None]:
    """Let ``log``, ``log_dict`` and ``print`` of ``module`` do nothing, or ``instead``; its loggers too if asked."""
    log = instead or _nothing
    trainer = module.trainer
    loggers = trainer.loggers
    if with_loggers and loggers:
        trainer.loggers = [DummyLogger()]  # type: ignore[list-item]
    try:
        with _replaced(module, log=log, log_dict=log, print=_nothing):
            yield
    finally:
        trainer.loggers = loggers


@contextmanager
def logging_what_is_here(module: LightningModule, is_last: bool) -> Iterator[None]:
    """Let ``log`` of ``module`` pass over values that are not on this stage."""
    log = module.log

    def log_if_here(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        missing = [g for g in tensors_in(value, Ghost) if not g.bound]
        if not missing:
            value = value.received() if isinstance(value, Ghost) else value
            log(name, value, *args, **kwargs)
        elif is_last:
            rank_zero_warn(
                f"`self.log({name!r}, ...)` is passed over: the value depends on {missing[0].describe()}, which is on"
                " an earlier stage. Log what the last stage computes."
            )

    with _replaced(module, log=log_if_here):
        yield


@contextmanager
def _replaced(module: LightningModule, **functions: Callable[..., Any]) -> Iterator[None]:
    attributes = module.__dict__
    before = {name: attributes[name] for name in functions if name in attributes}
    attributes.update(functions)
    try:
        yield
    finally:
        for name in functions:
            del attributes[name]
        attributes.update(before)


def _nothing(*args: Any, **kwargs: Any) -> None: ...
