"""What the page says of a cell: its best runs beside those of one stage with the same optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

from study.plan import GROUPS, Cell, best_runs, is_tuned
from study.results import Results
from study.setting import Setting

__all__ = ["SPEED", "Measured", "crossing", "measure", "reference_of"]

_SHARE_OF_BUDGET = 0.8

#: How many times as many batches a second as one process: the README's table "Measured", by layers and stages.
SPEED = {(8, 2): 1.89, (8, 4): 3.84, (8, 8): 7.09, (12, 11): 5.66, (64, 4): 3.87}


@dataclass(frozen=True)
class Measured:
    """A cell, measured.

    Attributes:
        cell: The cell.
        lr: Its best learning rate so far.
        is_tuned: Whether both of its neighbours were tried.
        finals: The final bits per character of each seed; infinity after a divergence.
        batches: For each seed of which one stage has been run: the batches until the loss that one stage has at 80
            percent of its budget, divided by these 80 percent; infinity if it was not reached.
        budget: These 80 percent, in batches.
    """

    cell: Cell
    lr: float
    is_tuned: bool
    finals: list[float]
    batches: list[float]
    budget: float

    @property
    def final(self) -> float:
        """The mean over seeds."""
        return fmean(self.finals)

    @property
    def mean_batches(self) -> float:
        """The mean over seeds, infinite if one seed has not arrived, NaN if there is nothing to compare with."""
        return fmean(self.batches) if self.batches else math.nan

    @property
    def speed(self) -> float:
        """Batches a second, one process being 1: from the benchmark of throughput."""
        setting = self.cell.setting
        return SPEED[setting.layers, setting.stages] if setting.stages > 1 else 1.0

    @property
    def limit(self) -> float:
        """The greatest of ``batches`` that could have been seen."""
        return self.cell.setting.updates / self.budget

    def speed_up(self, batches: float) -> float:
        """In time to the same loss, if that takes so many of ``batches``; without delay they are as slow as on one."""
        alone = min(batches, self.cell.setting.synchronous_steps / self.budget)
        return 1 / (alone + (batches - alone) / self.speed)


def measure(cell: Cell, results: Results) -> Measured | None:
    """What is known of a cell; ``None``: nothing."""
    runs = best_runs(cell, results)
    if not runs:
        return None
    reference = {run["seed"]: run for run in best_runs(reference_of(cell.setting), results)}
    pairs = [(run, reference[run["seed"]]) for run in runs if run["seed"] in reference]
    budget = reference_of(cell.setting).setting.updates * _SHARE_OF_BUDGET
    return Measured(
        cell=cell,
        lr=runs[0]["lr"],
        is_tuned=is_tuned(cell, results),
        finals=[math.inf if run["final"] is None else run["final"] for run in runs],
        batches=[crossing(run, _loss_at(alone, budget)) / budget for run, alone in pairs],
        budget=budget,
    )


def reference_of(setting: Setting) -> Cell:
    """The cell of the same model and optimizer on one stage."""
    plain = Setting(optimizer=setting.optimizer)
    kept = ("model", "layers", "width", "tied", "rows")
    plain = replace(plain, **{name: getattr(setting, name) for name in kept})
    for cell in (cell for group in GROUPS for cell in group.cells):
        if cell.setting == replace(plain, updates=cell.setting.updates, lr=cell.setting.lr):
            return cell
    raise LookupError(f"There is no cell with one stage for {setting}.")


def crossing(run: Mapping[str, Any], target: float) -> float:
    """After how many updates the curve is at ``target`` first, between its points along a line; infinity: never."""
    before = None
    for step, value in _points(run):
        if value <= target:
            if before is None or value == before[1]:
                return step
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - value)
        before = step, value
    return math.inf


def _loss_at(run: Mapping[str, Any], step: float) -> float:
    """The curve at ``step``, between its points along a line."""
    points = _points(run)
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= step <= x1:
            return y0 + (y1 - y0) * (step - x0) / (x1 - x0)
    return math.nan  # it has diverged before


def _points(run: Mapping[str, Any]) -> list[tuple[float, float]]:
    return [(run["every"] * i, value) for i, value in enumerate(run["bpc"], 1) if value is not None]
