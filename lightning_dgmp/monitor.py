"""The callback that shows what the pipeline does."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_dgmp.account import advice_for, scalars_of, summary_of
from lightning_dgmp.host import Callback, LightningModule, TensorBoardLogger, Trainer, rank_zero_info
from lightning_dgmp.reports import Report, Reporter
from lightning_dgmp.traces import write_trace
from lightning_dgmp.world import PeerError

if TYPE_CHECKING:
    from lightning_dgmp.plan.plan import Plan
    from lightning_dgmp.strategy import DelayedMPStrategy

__all__ = ["DelayedMPMonitor"]

_MAX_TRACED = 10_000  # steps, all spans of which wait in memory
_SPANS_SHOWN = 60  # of a stage: about ten iterations
_DRAWING = 0.005  # of the time may pass with it
_UNTIL_FIRST_PICTURE = 30  # seconds, for the same reason; a shorter training has one at its end
_LAST_WAIT = 2.0  # seconds at most for the last reports, which are under way when training ends
TRACE_FILE = "pipeline_trace.json"


class DelayedMPMonitor(Callback):
    """Logs where the time and the memory of each stage go, and draws what the stages have done.

    Each stage sends a small message to the last one whenever Lightning logs (``Trainer(log_every_n_steps=...)``), and
    nobody waits for it; the last stage logs when all have arrived, with the step that they are about. Any logger gets
    the numbers, TensorBoard also pictures, and the console a line at the end of each epoch and advice. Where there are
    several stages ``strategy="delayed_mp"`` adds this callback by itself, for TensorBoard's logger and the console.

    - ``pipeline/period``: seconds from one batch to the next; ``pipeline/efficiency``: the share of it in which the
      slowest stage computes; ``pipeline/speedup``: how many times faster than one device that runs all stages one after
      another.
    - ``stage_0/forward``, ``backward``, ``update``, ``wait_activation``, ``wait_error``, ``wait_data``, ``wait_send``,
      ``other``: shares of its time, which sum to 1.
    - ``stage_0/delay``: of its gradients, in updates; ``in_flight``: batches between their forward and their backward;
      ``bytes_sent``: an iteration; ``parameter_bytes``, ``snapshot_bytes``, ``activation_bytes``; ``gradient_norm``: of
      its own gradients; ``snapshot_distance``: how far the oldest weights that it keeps are from those of now, relative
      to their norm.

    Args:
        pictures: Whether TensorBoard gets pictures: the timeline of the last iterations, and the balance of the plan.
        trace_steps: From which optimizer step to which a file ``pipeline_trace.json`` is written into the folder of the
            logger, for https://ui.perfetto.dev or chrome://tracing. Clocks of several nodes must agree, as with NTP.

    Raises:
        ValueError: If ``trace_steps`` is empty or longer than 10000 steps.
    """

    def __init__(self, pictures: bool = True, trace_steps: tuple[int, int] | None = None) -> None:
        if trace_steps is not None and not 0 <= trace_steps[0] < trace_steps[1]:
            raise ValueError(f"`trace_steps` must be two steps, the first before the second, but is {trace_steps}.")
        if trace_steps is not None and trace_steps[1] - trace_steps[0] > _MAX_TRACED:
            raise ValueError(f"`trace_steps` must be at most {_MAX_TRACED} steps apart, but is {trace_steps}.")
        self.pictures, self.trace_steps = pictures, trace_steps
        self._plan_drawn: Plan | None = None
        self._has_drawn = False  # since the last report, which takes time
        self.for_tensorboard_alone = False  # and the console
        self._is_first = True  # whether the pipeline has just begun to fill
        self._is_tracing = False  # since the first of these steps
        self._traced: Path | None = None  # the file, also of an earlier training
        self._trace_ends_with: int | None = None  # the number of a report
        self._next_picture = 0.0  # when there is time for it
        self._latest: Sequence[Report] = []  # of which there is no picture
        self._of_epoch: list[Sequence[Report]] = []
        self._of_filling: list[Sequence[Report]] = []  # the first, for an epoch without another
        self._ended: tuple[int, int] | None = None  # the last step and the number of an epoch that has no line yet
        self._said: set[str] = set()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_first, self._trace_ends_with, self._ended = True, None, None
        self._next_picture = time.monotonic() + _UNTIL_FIRST_PICTURE
        self._is_tracing, self._plan_drawn = False, None
        self._of_epoch, self._of_filling = [], []

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart(trainer)

    def _restart(self, trainer: Trainer) -> None:
        reporter: Reporter | None = getattr(trainer.strategy, "reporter", None)
        if reporter is not None:
            reporter.restart()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        strategy: DelayedMPStrategy = trainer.strategy  # type: ignore[assignment]
        if not hasattr(strategy, "watch") or getattr(strategy, "replica", 0) > 0:
            return
        reporter = strategy.watch()
        if reporter is None:
            return
        step = trainer.global_step
        plan, runner = strategy.plan, strategy.runner
        if runner is not None and runner.is_last and self.pictures and plan is not self._plan_drawn:  # cuts may move
            self._plan_drawn, mode = plan, runner.mode
            self._draw("balance", trainer, lambda pictures: pictures.draw_balance(plan, mode), step)
        first, end = self.trace_steps or (math.inf, math.inf)
        if not self._is_tracing and first <= step < end:
            self._is_tracing = True
            reporter.mark(time.time() if step == first else 0.0)  # otherwise training began within
        ends_trace = self._is_tracing and step == end and self._trace_ends_with is None
        is_last = trainer.is_last_batch or step == trainer.max_steps
        is_due = trainer._logger_connector.should_update_logs or is_last or ends_trace
        if is_due and not trainer.fit_loop._should_accumulate():
            if ends_trace:
                self._trace_ends_with = step
            with self._going_on(f"failed on stage {strategy.stage}"):
                reporter.report(step, trainer.accumulate_grad_batches, None if ends_trace else _SPANS_SHOWN)
        if strategy.is_global_zero:
            self._show(trainer, reporter)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reporter: Reporter | None = getattr(trainer.strategy, "reporter", None)
        if reporter is None or not trainer.is_global_zero:
            return
        self._ended = trainer.global_step, trainer.current_epoch
        self._show(trainer, reporter)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reporter: Reporter | None = getattr(trainer.strategy, "reporter", None)
        if reporter is not None and trainer.is_global_zero:
            deadline = time.monotonic() + _LAST_WAIT
            self._show(trainer, reporter)
            while reporter.known_until < trainer.global_step and time.monotonic() < deadline:
                time.sleep(0.005)
                self._show(trainer, reporter)
            self._draw_timeline(trainer)
            if self.trace_steps is not None and self._traced != _folder(trainer) / TRACE_FILE:
                self._say(
                    f"There is no `{TRACE_FILE}`: `trace_steps={self.trace_steps}` must both be reached in training,"
                    f" but it ended after step {trainer.global_step}."
                )

    def _show(self, trainer: Trainer, reporter: Reporter) -> None:
        with self._going_on("could not log"):
            for reports in reporter.complete():
                self._say_epoch(reports[0].step - 1)
                with self._going_on("could not log"):
                    self._show_one(trainer, reports)
            self._say_epoch(reporter.known_until)

    def _say_epoch(self, known_until: float) -> None:
        """The line of an epoch, as soon as its last report is there."""
        if self._ended is not None and self._ended[0] <= known_until:
            if intervals := self._of_epoch or self._of_filling:
                rank_zero_info(f"Epoch {self._ended[1]}: {summary_of(intervals)}")
            self._of_epoch, self._of_filling, self._ended = [], [], None

    def _show_one(self, trainer: Trainer, reports: Sequence[Report]) -> None:
        step = reports[0].step
        for logger in _tensorboards(trainer) if self.for_tensorboard_alone else trainer.loggers:
            logger.log_metrics(scalars_of(reports), step=step)
        if step == self._trace_ends_with:
            path = _folder(trainer) / TRACE_FILE
            write_trace(path, [report.spans for report in reports])
            self._traced = path
        if self._is_first:
            self._of_filling.append(reports)
        else:  # the pipeline was full
            self._of_epoch.append(reports)
            advice = None if self._has_drawn else advice_for(reports)
            if advice is not None:
                self._say(advice, advice.partition(" in ")[0])  # of each stage and wait once
        self._is_first, self._has_drawn, self._latest = False, False, reports
        if time.monotonic() >= self._next_picture:
            self._draw_timeline(trainer)

    def _draw_timeline(self, trainer: Trainer) -> None:
        if self.pictures and self._latest:
            begin = time.monotonic()
            spans = [report.spans for report in self._latest]
            self._draw(
                "timeline", trainer, lambda pictures: pictures.draw_timeline(spans, num_batches=4), self._latest[0].step
            )
            self._latest, end = [], time.monotonic()
            self._next_picture = end + (end - begin) / _DRAWING

    def _draw(self, name: str, trainer: Trainer, draw: Callable[[Any], Any], step: int = 0) -> None:
        loggers = _tensorboards(trainer)
        if not loggers:
            if trainer.loggers and not self.for_tensorboard_alone:
                kinds = ", ".join(sorted({type(logger).__name__ for logger in trainer.loggers}))
                self._say(
                    f"The pipeline's monitor draws for `TensorBoardLogger` alone, but there is {kinds}: it gets numbers"
                    " without pictures. `DelayedMPMonitor(pictures=False)` needs none."
                )
            return
        with self._going_on("could not draw"):
            try:
                from lightning_dgmp import pictures
            except ImportError:
                self._say("The pipeline's monitor draws with matplotlib, which is missing: `pip install matplotlib`.")
                return
            self._has_drawn = True
            for logger in loggers:
                logger.experiment.add_figure(f"pipeline/{name}", draw(pictures), step)

    @contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        """Let what fails be a warning, unless another process has failed."""
        try:
            yield
        except PeerError:
            raise
        except Exception as error:
            self._say(f"The pipeline's monitor {what}: {type(error).__name__}: {error}")

    def _say(self, warning: str, key: str | None = None) -> None:
        """Once, on any process."""
        if (key or warning) not in self._said:
            self._said.add(key or warning)
            try:
                warnings.warn(warning, stacklevel=2)
            except UserWarning:  # where warnings are errors, this is none
                print(warning, file=sys.stderr)


def _tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _folder(trainer: Trainer) -> Path:
    """That of the first logger which has one; ``Trainer.log_dir`` would ask all processes."""
    folders = (getattr(logger, "log_dir", None) or logger.save_dir for logger in trainer.loggers)
    return Path(next(filter(None, folders), trainer.default_root_dir))
