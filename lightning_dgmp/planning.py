"""How a module would be divided, without training it."""

from __future__ import annotations

import warnings
from contextlib import suppress
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_dgmp.ghost import GhostError
from lightning_dgmp.host import LightningModule, MisconfigurationException, Trainer
from lightning_dgmp.plan.cut import PlanError
from lightning_dgmp.plan.memory import Budget, memory_of, table_of_memory
from lightning_dgmp.plan.plan import Plan, make_plan
from lightning_dgmp.plan.record import Trace
from lightning_dgmp.simulator import Prediction, StageCost, delayed, predict
from lightning_dgmp.strategy import DelayedMPStrategy

__all__ = [
    "REFUSALS",
    "as_json",
    "describe",
    "plans_of",
    "predict_plan",
    "trace_of",
]

#: What says that a module cannot be trained so.
REFUSALS = (MisconfigurationException, PlanError, GhostError)


def trace_of(module: LightningModule, data: Any = None) -> tuple[Trace, Budget]:
    """What ``training_step`` runs on the first batch, and what decides how much memory it takes; nothing is trained.

    Args:
        module: The LightningModule.
        data: A data module or a loader; by default the module's own.
    """
    strategy = _Planning(num_stages=2, virtual=True)
    is_module = hasattr(data, "train_dataloader")
    with warnings.catch_warnings(), TemporaryDirectory() as folder:  # with a logger, which hooks and callbacks may use
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu", devices=1, strategy=strategy, default_root_dir=folder, max_epochs=1,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        with suppress(_Planned):
            trainer.fit(module, datamodule=data) if is_module else trainer.fit(module, data)
    assert strategy.trace is not None
    return strategy.trace, strategy.budget


class _Planning(DelayedMPStrategy):
    """Ends training before it begins."""

    trace: Trace | None = None
    budget = Budget()

    def _begin_training(self, batch: Any, batch_idx: int) -> None:
        assert self.lightning_module is not None
        self.trace, self.budget = self._trace(batch, batch_idx), self._make_budget()
        raise _Planned

    @override
    def save_checkpoint(self, *_: Any, **__: Any) -> None:
        """Not even where a callback saves at exceptions."""


class _Planned(Exception):
    """There is a trace."""


def plans_of(trace: Trace, module: nn.Module, numbers: list[int], budget: Budget) -> dict[int, Plan | str]:
    """The plan for each number of stages, or why there is none."""
    plans: dict[int, Plan | str] = {}
    for number in numbers:
        try:
            plans[number] = make_plan(trace, module, number, budget=budget)
        except PlanError as error:
            plans[number] = str(error)
    return plans


def predict_plan(plan: Plan, slack: int = 0) -> Prediction:
    """What the pipeline comes to if devices are equal and messages take no time, in times of one operation."""
    costs = [StageCost(stage.cost / 3, 2 * stage.cost / 3) for stage in plan.stages]
    return predict(delayed(plan.num_stages, 8 * plan.num_stages * (1 + slack) + 8, slack), costs)


def as_json(number: int, plan: Plan | str) -> dict[str, Any]:
    """What there is to say about a plan, or why there is none."""
    if isinstance(plan, str):
        return {"num_stages": number, "refused": plan}
    prediction = predict_plan(plan)
    return {
        "num_stages": number,
        "speedup": prediction.speedup,
        "batches_per_second_per_tflops": 1e12 / prediction.period,
        "split_at": [stage.first_module for stage in plan.stages[1:]],
        "stages": [
            {**vars(stage), "sizes": stage.sizes._asdict(), "memory": {**one._asdict(), "total": one.total}}
            for stage, one in zip(plan.stages, memory_of(plan))
        ],
    }


def describe(plan: Plan, told: dict[str, Any]) -> str:
    """The plan's table, and what it comes to."""
    memory = table_of_memory(memory_of(plan))
    return (
        f"{plan.table()}\n\nWhat a process holds of its stage when it holds most:\n{memory}\n\n"
        f"Predicted: {told['speedup']:.2f} times as fast as one device, if messages take no time:"
        f" {told['batches_per_second_per_tflops']:.3g} batches a second for each TFLOP/s of a device."
    )
