"""Lightning's callbacks that decide by the clock or by a metric, without asking all processes at every batch.

:class:`Timer` and ``ModelCheckpoint(train_time_interval=...)`` broadcast a decision after each training batch, which
would put all stages in lock-step. Here a stage whose time is up asks for the end, as any other code may, and the wish
travels with the messages; and stage 0 marks the batch after which all stages save.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_dgmp.host import (
    BasePredictionWriter,
    LightningModule,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    SIGTERMException,
    Timer,
    Trainer,
    rank_zero_warn,
)
from lightning_dgmp.monitor import DelayedMPMonitor
from lightning_dgmp.objects import is_of_user
from lightning_dgmp.wire import Wish

if TYPE_CHECKING:
    from lightning_dgmp.strategy import DelayedMPStrategy

__all__ = ["adapt_callbacks", "reads_outputs"]


def adapt_callbacks(trainer: Trainer, strategy: DelayedMPStrategy) -> Callable[[], None]:
    """Exchange hooks of such callbacks, and of those that save when an exception ends training; add the monitor.

    Returns:
        What undoes it.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    monitor = None
    if strategy.has_feed and not any(isinstance(callback, DelayedMPMonitor) for callback in callbacks):
        callbacks.append(monitor := DelayedMPMonitor())
        monitor.for_tensorboard_alone = True
    for callback in callbacks:
        if isinstance(callback, Timer) and strategy.has_feed:
            callback.on_train_batch_end = _of_timer(callback, strategy)  # type: ignore[method-assign]
        elif isinstance(callback, ModelCheckpoint):
            callback.on_train_batch_end = _of_checkpoint(callback, strategy)  # type: ignore[method-assign]
        if isinstance(callback, (ModelCheckpoint, OnExceptionCheckpoint)) and strategy.has_feed:
            callback.on_exception = _only_together(callback)  # type: ignore[method-assign]

    def undo() -> None:
        if monitor in callbacks:
            callbacks.remove(monitor)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, (Timer, ModelCheckpoint, OnExceptionCheckpoint)):
                vars(callback).pop("on_train_batch_end", None)
                vars(callback).pop("on_exception", None)

    return undo


def _of_timer(timer: Timer, strategy: DelayedMPStrategy) -> Callable[..., None]:
    original = timer.on_train_batch_end

    def on_train_batch_end(*args: Any, **kwargs: Any) -> None:
        with strategy.answering_broadcasts(lambda mine: mine):
            original(*args, **kwargs)

    return on_train_batch_end


def _of_checkpoint(checkpoint: ModelCheckpoint, strategy: DelayedMPStrategy) -> Callable[..., None]:
    original = checkpoint.on_train_batch_end

    def on_train_batch_end(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        runner, interval = strategy.runner, checkpoint._train_time_interval
        every = checkpoint._every_n_train_steps
        if every >= 1 and trainer.fit_loop._should_accumulate():
            return  # this step is not over, or it has been saved; and to save is to flush
        if runner is None:
            original(trainer, *args, **kwargs)
            return
        is_due = Wish.SAVE in runner.messages.granted or (every >= 1 and trainer.global_step % every == 0)
        if is_due:  # also the name may have metrics
            strategy.learned.share_results()
        if interval is None:
            original(trainer, *args, **kwargs)
            return
        with strategy.answering_broadcasts(lambda _: Wish.SAVE not in runner.messages.granted, once=True):
            original(trainer, *args, **kwargs)
        since = checkpoint._last_time_checked
        is_time = since is not None and time.monotonic() - since >= interval.total_seconds()
        if is_time and runner.stage == 0 and strategy.replica == 0:  # one clock decides
            runner.request(Wish.SAVE)

    return on_train_batch_end


def _only_together(callback: ModelCheckpoint | OnExceptionCheckpoint) -> Callable[..., None]:
    original = callback.on_exception

    def on_exception(trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        # After a signal all stages raise after the same batch.
        if SIGTERMException in (type(exception), type(exception.__cause__)):
            original(trainer, module, exception)
        elif isinstance(callback, OnExceptionCheckpoint) or getattr(callback, "save_on_exception", False):
            rank_zero_warn(
                f"`{type(callback).__name__}` saves nothing: a process has failed, and with it a part of the model is"
                " gone. Save at intervals."
            )

    return on_exception


def reads_outputs(step: str, module: LightningModule) -> bool:
    """Whether a hook of the user gets what ``step``, as ``"validation_step"``, returns: then all stages need it."""
    hook = f"on_{step.replace('step', 'batch_end')}"
    listeners = [module, *module.trainer.callbacks]  # type: ignore[attr-defined]
    if step == "predict_step" and any(isinstance(listener, BasePredictionWriter) for listener in listeners):
        return True
    return any(is_of_user(getattr(getattr(x, hook), "__module__", "")) for x in listeners)
