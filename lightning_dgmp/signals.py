"""Signals, which reach each process at another moment: all stages must act on them after the same batch."""

from __future__ import annotations

import signal
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

from lightning_dgmp.host import Trainer
from lightning_dgmp.wire import Wish

if TYPE_CHECKING:
    from lightning_dgmp.data import Feed
    from lightning_dgmp.stage.runner import StageRunner
    from lightning_dgmp.strategy import DelayedMPStrategy
    from lightning_dgmp.world import Flag

__all__ = ["Signals"]


class Signals:
    """What the signals of one process ask for. Exchanges two handlers of Lightning, which run collectives.

    They become wishes, which travel with the messages: SIGTERM to end, and the signal with which SLURM announces the
    end of a job to save a checkpoint and let rank 0 requeue the job. In an evaluation nothing travels to the first
    stage: it looks at a flag, and its decision travels with the batches of data.

    Args:
        trainer: Whose handlers these are.
        strategy: Knows who launched the other processes.
        feed: Brings the data.
        flag: Is put up by who wants an evaluation to end.
    """

    def __init__(self, trainer: Trainer, strategy: DelayedMPStrategy, feed: Feed, flag: Flag) -> None:
        self._connector = connector = trainer._signal_connector
        self._strategy, self._feed, self._flag = strategy, feed, flag
        self._requeue = partial(type(connector)._slurm_sigusr_handler_fn, connector)
        self.wants_to_end = False  # by SIGTERM
        self._is_requeue_due = self._is_requeued = False
        connector._slurm_sigusr_handler_fn = self._on_requeue_signal  # type: ignore[method-assign]
        connector._sigterm_notifier_fn = self._on_sigterm  # type: ignore[method-assign]
        feed.let_end(lambda: not trainer.training and (self.wants_to_end or flag.is_up()))

    def after_batch(self, runner: StageRunner) -> None:
        """Do what is granted for this batch, and pass on what this process was asked for."""
        # Each process that got the signal has asked.
        if Wish.REQUEUE in runner.messages.granted and not self._is_requeued:
            self._is_requeued = True
            self._requeue(signal.SIGUSR1, None)  # type: ignore[arg-type]
        if self._is_requeue_due:
            self._is_requeue_due = False
            runner.request(Wish.REQUEUE)

    def before_evaluation_batch(self) -> None:
        """Let Lightning know whether this batch is the last one, on all stages alike."""
        if self.wants_to_end:
            self._flag.put_up()
        if self._feed.ends:
            self._connector.received_sigterm = True

    def _on_requeue_signal(self, signum: int, _: FrameType | None) -> None:
        self._is_requeue_due = True

    def _on_sigterm(self, signum: int, _: FrameType | None) -> None:
        if not self.wants_to_end and self._strategy.launcher is not None:
            self._strategy.launcher.kill(signal.Signals(signum))
        self.wants_to_end = True
