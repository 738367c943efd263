"""Lightning's loops, without the synchronisation of the world at every training batch.

``_TrainingEpochLoop`` broadcasts a flag on all processes before every batch and waits for it, which would put all
stages in lock-step. Here the wish to stop travels with the errors to stage 0, and its decision with the activations to
all, so that all stages stop after the same batch. These classes are the only place that overrides Lightning's loops.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from lightning_dgmp.host import (
    MisconfigurationException,
    SIGTERMException,
    _EvaluationLoop,
    _FitLoop,
    _Loop,
    _PredictionLoop,
    _TrainingEpochLoop,
    rank_zero_warn,
)
from lightning_dgmp.replicas import in_hook
from lightning_dgmp.wire import Wish

if TYPE_CHECKING:
    from lightning_dgmp.host import Trainer
    from lightning_dgmp.strategy import DelayedMPStrategy

__all__ = ["clock_at", "install_loops"]

_NO_BATCH = (
    "`trainer.fit` needs at least one batch, but the training data loader is empty. Check the data set, `drop_last` and"
    " `limit_train_batches`."
)


def install_loops(trainer: Trainer) -> None:
    """Make the loops of ``trainer`` behave as those below, with all their state."""
    trainer.fit_loop.__class__ = _DelayedFitLoop
    trainer.fit_loop.epoch_loop.__class__ = _DelayedEpochLoop
    for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
        loop.__class__ = _SharingEvaluationLoop
    trainer.predict_loop.__class__ = _SharingPredictionLoop


@contextmanager
def clock_at(trainer: Trainer, global_step: int, epoch: int, batch_idx: int) -> Iterator[None]:
    """Let the step, the epoch and the batch be those of an earlier batch, while its step runs again."""
    steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    epochs, batches = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.batch_progress.current
    today = steps.completed, epochs.completed, batches.ready
    steps.completed, epochs.completed, batches.ready = global_step, epoch, batch_idx + 1
    try:
        yield
    finally:
        steps.completed, epochs.completed, batches.ready = today


class _WithStrategy(_Loop):
    @property
    def _strategy(self) -> DelayedMPStrategy:
        return self.trainer.strategy  # type: ignore[return-value]

    def setup_data(self) -> None:
        with in_hook():
            super().setup_data()  # type: ignore[misc]


class _DelayedEpochLoop(_WithStrategy, _TrainingEpochLoop):
    @property
    @override
    def done(self) -> bool:
        self._pass_on_wishes_to_stop()
        return super().done

    def _pass_on_wishes_to_stop(self) -> None:
        """Ask all stages to end instead of ending this one, and end when all do."""
        runner = self._strategy.runner
        if runner is not None:
            runner.request(self._strategy.signals.wishes_to_end)
            self.trainer.should_stop = bool(runner.ending)
            self._strategy.signals.grant(runner.ending)

    @override
    def on_run_start(self, data_fetcher: Any) -> None:
        epoch = self.trainer.current_epoch
        if epoch > 0:  # the loader's first iterator exists already
            self._strategy.align_randomness(epoch)
            resumes = self.restarting or self.trainer.fit_loop.is_resuming
            if resumes and self.batch_progress.current.ready == 0:
                iter(data_fetcher)  # between epochs the data begin as in a run that has gone on
        super().on_run_start(data_fetcher)

    @override
    def _get_monitor_value(self, key: str) -> Any:
        """Of a scheduler that is due: all stages are here, and the last one may have logged the value just now."""
        self._strategy.learned.share_results()
        return super()._get_monitor_value(key)

    @override
    def _broadcast_sigterm_tensor(self) -> None:
        """The stop flag travels with the messages instead, unless every process has all stages."""
        if not self._strategy.has_feed:
            super()._broadcast_sigterm_tensor()

    @override
    def advance(self, data_fetcher: Any) -> None:
        self._strategy.align_batch(self.total_batch_idx + 1, 0)
        super().advance(data_fetcher)

    @override
    def on_advance_end(self, data_fetcher: Any) -> None:
        self._pass_on_wishes_to_stop()
        runner, validates = self._strategy.runner, self._should_check_val_fx(data_fetcher)
        if validates:
            self._strategy.flush()
        super().on_advance_end(data_fetcher)
        if runner is None:
            return
        # All stages are here anyway: a wish to stop, as of EarlyStopping, need not travel.
        if validates and self._strategy.reduce_boolean_decision(self.trainer.should_stop, all=False):
            runner.ending |= Wish.END
        self._strategy.signals.after_batch(runner)


class _SharingEvaluationLoop(_WithStrategy, _EvaluationLoop):
    """Lets all stages know what the last one has logged and kept."""

    @override
    def run(self) -> Any:
        # Lightning isolates the random numbers of the sanity check, but those of loading are our own.
        isolates = self.trainer.sanity_checking and self._strategy.has_feed
        with self._strategy.keeping_loading() if isolates else nullcontext():
            return super().run()

    def increment_progress_to_evaluation_end(self) -> None:
        """Where training resumes behind a validation; begins the loader once more, which a run that goes on has not."""
        has_feed = self._strategy.has_feed
        with self._strategy.keeping_loading() if has_feed else torch.random.fork_rng(devices=[]):
            super().increment_progress_to_evaluation_end()

    @override
    def _on_evaluation_epoch_start(self, *args: Any, **kwargs: Any) -> None:
        super()._on_evaluation_epoch_start(*args, **kwargs)
        self._strategy.learned.begin()

    @override
    def _evaluation_step(self, batch: Any, batch_idx: int, dataloader_idx: int, *args: Any) -> None:
        if self._strategy.has_feed:
            self._strategy.signals.before_evaluation_batch()
            self._strategy.align_batch(self.trainer.global_step << 20 | batch_idx, 1 + dataloader_idx)
        super()._evaluation_step(batch, batch_idx, dataloader_idx, *args)

    @override
    def _store_dataloader_outputs(self) -> None:
        super()._store_dataloader_outputs()
        self._logged_outputs[-1] = self._strategy.learned.share_results(self._logged_outputs[-1])

    @override
    def _on_evaluation_epoch_end(self) -> None:
        self._strategy.learned.share_state()
        super()._on_evaluation_epoch_end()

    @override
    def _on_evaluation_end(self, *args: Any, **kwargs: Any) -> None:
        self._strategy.learned.share_results()  # also what hooks have logged at the end of the epoch
        super()._on_evaluation_end(*args, **kwargs)

    @override
    def on_run_end(self) -> Any:
        return self._strategy.share_of_last_stage(super().on_run_end(), "the results of an evaluation")


class _SharingPredictionLoop(_WithStrategy, _PredictionLoop):
    @override
    def _predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int, *args: Any) -> None:
        if self._strategy.has_feed:
            self._strategy.signals.before_evaluation_batch()
            self._strategy.align_batch(self.trainer.global_step << 20 | batch_idx, 1 + dataloader_idx)
        super()._predict_step(batch, batch_idx, dataloader_idx, *args)
        is_last_batch = self.batch_progress.is_last_batch  # type: ignore[attr-defined]
        if self._strategy.has_feed and self.trainer.received_sigterm and not is_last_batch:
            raise SIGTERMException  # as Lightning's other loops do

    @override
    def _store_data_for_prediction_writer(self, batch_idx: int, dataloader_idx: int) -> bool:
        self._batch_idx = batch_idx
        return super()._store_data_for_prediction_writer(batch_idx, dataloader_idx)

    @override
    def _get_batch_indices(self, dataloader: object) -> Any:
        """Which samples are in the batch: stage 0 has loaded it."""
        if not self._strategy.has_feed:
            return super()._get_batch_indices(dataloader)
        mine = {}
        if self._strategy.stage == 0 and (seen := super()._get_batch_indices(dataloader)):
            mine = {self._batch_idx: seen[self._batch_idx]}
        return self._strategy.share_of_first_stage(mine, "the indices of a batch")

    @override
    def _on_predict_epoch_start(self) -> None:
        super()._on_predict_epoch_start()
        self._strategy.learned.begin()

    @override
    def _on_predict_epoch_end(self) -> Any:
        self._strategy.learned.share_state()
        if self.return_predictions:
            self._predictions = self._strategy.share_of_last_stage(self._predictions, "the predictions")
            if {type(prediction) for of_loader in self._predictions for prediction in of_loader} == {type(None)}:
                rank_zero_warn(
                    f"`{type(self.trainer.lightning_module).__name__}.predict_step` returned None for all batches, so"
                    " nothing is collected. Return the predictions, or call `trainer.predict(return_predictions=False)`"
                    " if that is on purpose."
                )
        return super()._on_predict_epoch_end()


class _DelayedFitLoop(_WithStrategy, _FitLoop):
    @override
    def run(self) -> None:
        with self._strategy.signals.heeding_interrupts() if self._strategy.has_feed else nullcontext():
            super().run()

    @property
    @override
    def skip(self) -> bool:
        if self.max_batches == 0 and self.trainer.limit_train_batches != 0:
            raise MisconfigurationException(_NO_BATCH)
        return super().skip

    @override
    def on_advance_start(self) -> None:
        if self._strategy.can_rebalance:  # perhaps nothing else flushes
            self._strategy.flush()
        with self._strategy.whole_optimizers():  # finetuning callbacks look and store which parameters they have
            super().on_advance_start()

    @override
    def on_advance_end(self) -> None:
        self.trainer._logger_connector.epoch_end_reached()  # from here on the metrics are those of the epoch
        self._strategy.learned.share_state()
        self._strategy.learned.share_results()
        super().on_advance_end()
        # All stages are here anyway: what a hook or a signal wants on one of them need not travel.
        runner = self._strategy.runner
        if runner is not None:
            runner.ending |= self._strategy.signals.all_wishes_to_end()
            self.trainer.should_stop = bool(runner.ending)
            self._strategy.signals.grant(runner.ending)
            if self.trainer.received_sigterm:  # Lightning has looked already
                raise SIGTERMException

    @override
    def on_run_end(self) -> None:
        if not self._strategy.has_begun and self.epoch_loop.total_batch_idx < 0:  # nor before, as a resumed run may
            raise MisconfigurationException(_NO_BATCH)
        self._strategy.finish_training()
        super().on_run_end()
