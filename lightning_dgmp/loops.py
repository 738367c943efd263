"""Lightning's training loops, without their per-batch synchronisation of the world.

``_TrainingEpochLoop`` broadcasts a flag on all processes before every batch and waits for it, which would put all
stages in lock-step. Here the wish to stop travels with the errors to stage 0, and its decision with the activations to
all, so that all stages stop after the same batch. These classes are the only place that overrides Lightning's loops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_dgmp.strategy import DelayedMPStrategy

__all__ = ["install_loops"]

_NO_BATCH = (
    "`trainer.fit` needs at least one batch, but the training data loader is empty. Check the data set, `drop_last` and"
    " `limit_train_batches`."
)


def install_loops(trainer: Trainer) -> None:
    """Make the loops of ``trainer`` behave as those below, with all their state."""
    trainer.fit_loop.__class__ = _DelayedFitLoop
    trainer.fit_loop.epoch_loop.__class__ = _DelayedEpochLoop


class _WithStrategy(_Loop):
    @property
    def _strategy(self) -> DelayedMPStrategy:
        return self.trainer.strategy  # type: ignore[return-value]


class _DelayedEpochLoop(_WithStrategy, _TrainingEpochLoop):
    @property
    @override
    def done(self) -> bool:
        runner = self._strategy.runner
        if runner is not None:
            if self.trainer.should_stop or self.trainer.received_sigterm:
                runner.stop_requested = True
            self.trainer.should_stop = runner.stop_agreed
        return super().done

    @override
    def on_run_start(self, data_fetcher: Any) -> None:
        if self.trainer.current_epoch > 0:  # the loader's first iterator exists already
            self._strategy.align_randomness(self.trainer.current_epoch)
        super().on_run_start(data_fetcher)

    @override
    def _broadcast_sigterm_tensor(self) -> None:
        """The stop flag travels with the messages instead."""

    @override
    def on_advance_end(self, data_fetcher: Any) -> None:
        if not self._should_check_val_fx(data_fetcher):
            super().on_advance_end(data_fetcher)
            return
        with self._strategy.whole_model():
            super().on_advance_end(data_fetcher)
        runner = self._strategy.runner
        if runner is not None:  # all stages are here anyway: a wish to stop, as of EarlyStopping, need not travel
            runner.stop_agreed |= self._strategy.reduce_boolean_decision(self.trainer.should_stop, all=False)


class _DelayedFitLoop(_WithStrategy, _FitLoop):
    @property
    @override
    def skip(self) -> bool:
        if self.max_batches == 0 and self.trainer.limit_train_batches != 0:
            raise MisconfigurationException(_NO_BATCH)
        return super().skip

    @override
    def on_run_end(self) -> None:
        if not self._strategy.has_begun:
            raise MisconfigurationException(_NO_BATCH)
        self._strategy.finish_training()
        super().on_run_end()
