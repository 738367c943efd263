"""Signals, which reach each process at another moment: all stages must act on them after the same batch."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, reduce
from operator import or_
from types import FrameType
from typing import TYPE_CHECKING

from lightning_dgmp.host import SIGTERMException, Trainer
from lightning_dgmp.wire import Wish

if TYPE_CHECKING:
    from lightning_dgmp.data import Feed
    from lightning_dgmp.stage.runner import StageRunner
    from lightning_dgmp.strategy import DelayedMPStrategy
    from lightning_dgmp.world import World

__all__ = ["Signals"]


class Signals:
    """What the signals of one process ask for. Exchanges two handlers of Lightning, which run collectives.

    They become wishes, which travel with the messages: SIGTERM and Ctrl-C to end, and the signal with which SLURM
    announces the end of a job to save a checkpoint and let rank 0 requeue the job. In an evaluation nothing travels to
    the first stage: it looks at a flag, and its decision travels with the batches of data.

    Args:
        trainer: Whose handlers these are.
        strategy: Knows who launched the other processes.
        feed: Brings the data.
        world: All processes.
    """

    def __init__(self, trainer: Trainer, strategy: DelayedMPStrategy, feed: Feed, world: World) -> None:
        self._trainer, self._connector = trainer, (connector := trainer._signal_connector)
        self._strategy, self._feed, self._world = strategy, feed, world
        self._flag = flag = world.flag()  # is set by who wants an evaluation to end
        self._requeue = partial(type(connector)._slurm_sigusr_handler_fn, connector)
        self._asked = Wish(0)  # to end, by a signal
        self._is_interrupted = self._is_requeue_due = self._is_requeued = False
        connector._slurm_sigusr_handler_fn = self._on_requeue_signal  # type: ignore[method-assign]
        connector._sigterm_notifier_fn = self._on_sigterm  # type: ignore[method-assign]
        feed.let_end(lambda: Wish(0) if trainer.training else self._asked | Wish(flag.value()))

    @property
    def wishes_to_end(self) -> Wish:
        """What signals and user code have asked this process for."""
        return self._asked | Wish.END if self._trainer.should_stop else self._asked

    def all_wishes_to_end(self) -> Wish:
        """What any process was asked for. All must ask."""
        return reduce(or_, self._world.all_gather(self.wishes_to_end, "the end of an epoch"))

    def grant(self, ending: Wish) -> None:
        """Let Lightning know how training or an evaluation ends, on all stages alike."""
        self._connector.received_sigterm = bool(ending & (Wish.TERMINATE | Wish.INTERRUPT))
        self._is_interrupted = Wish.INTERRUPT in ending

    @contextmanager
    def heeding_interrupts(self) -> Iterator[None]:
        """Let the first Ctrl-C be a wish, and raise what Lightning knows of it after the batch that grants it.

        A second one acts at once. Where interrupts are ignored, or have a handler of the user, that stays.
        """
        heeds = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if heeds:
            self._connector._register_signal(signal.SIGINT, self._on_interrupt)
        try:
            yield
        except SIGTERMException as error:
            if self._is_interrupted:
                raise KeyboardInterrupt from error
            raise
        finally:
            if heeds:
                self._connector._register_signal(signal.SIGINT, signal.default_int_handler)

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
        if self._asked:
            self._flag.set(self._asked)
        if self._feed.ending:
            self.grant(self._feed.ending)

    def _on_requeue_signal(self, signum: int, _: FrameType | None) -> None:
        self._is_requeue_due = True

    def _on_sigterm(self, signum: int, _: FrameType | None) -> None:
        if Wish.TERMINATE not in self._asked and self._strategy.launcher is not None:
            self._strategy.launcher.kill(signal.Signals(signum))
        self._asked |= Wish.TERMINATE

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        if Wish.INTERRUPT in self._asked:
            signal.default_int_handler(signum, frame)
        self._asked |= Wish.INTERRUPT
