"""Signals, which reach each process at another moment: all stages must act on them after the same batch."""

from __future__ import annotations

import signal
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

from lightning_dgmp.host import Trainer
from lightning_dgmp.wire import Wish

if TYPE_CHECKING:
    from lightning_dgmp.stage.runner import StageRunner
    from lightning_dgmp.strategy import DelayedMPStrategy

__all__ = ["Signals"]


class Signals:
    """What the signals of one process ask for. Exchanges two handlers of Lightning, which run collectives.

    They become wishes, which travel with the messages: SIGTERM to end, and the signal with which SLURM announces the
    end of a job to save a checkpoint and let rank 0 requeue the job.

    Args:
        trainer: Whose handlers these are.
        strategy: Knows who launched the other processes.
    """

    def __init__(self, trainer: Trainer, strategy: DelayedMPStrategy) -> None:
        self._connector = connector = trainer._signal_connector
        self._strategy = strategy
        self._requeue = partial(type(connector)._slurm_sigusr_handler_fn, connector)
        self.wants_to_end = False  # by SIGTERM
        self._is_requeue_due = self._is_requeued = False
        connector._slurm_sigusr_handler_fn = self._on_requeue_signal  # type: ignore[method-assign]
        connector._sigterm_notifier_fn = self._on_sigterm  # type: ignore[method-assign]

    def after_batch(self, runner: StageRunner) -> None:
        """Do what is granted for this batch, and pass on what this process was asked for."""
        if Wish.REQUEUE in runner.granted and not self._is_requeued:  # each process that got the signal has asked
            self._is_requeued = True
            self._requeue(signal.SIGUSR1, None)  # type: ignore[arg-type]
        if self._is_requeue_due:
            self._is_requeue_due = False
            runner.request(Wish.REQUEUE)

    def _on_requeue_signal(self, signum: int, _: FrameType | None) -> None:
        self._is_requeue_due = True

    def _on_sigterm(self, signum: int, _: FrameType | None) -> None:
        if not self.wants_to_end and self._strategy.launcher is not None:
            self._strategy.launcher.kill(signal.Signals(signum))
        self.wants_to_end = True
        if self._strategy.runner is None:  # nothing to agree on yet
            self._connector.received_sigterm = True
