"""How a module would be divided, without training it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

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
    "make",
    "make_data",
    "place_of",
    "plans_of",
    "predict_plan",
    "text_of",
    "trace_of",
]

#: What says that a module cannot be trained so.
REFUSALS = (MisconfigurationException, PlanError, GhostError)


def _load(spec: str, what: str) -> Any:
    """What ``spec`` names, as ``package.module:Name`` or ``path/to/script.py:Name``.

    Raises:
        ValueError: If there is no such thing, with the reason.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(f"{what} must be given as `package.module:Name` or `script.py:Name`, but is {spec!r}.")
    argv, sys.argv = sys.argv, [place]  # those of the command are not for it
    try:
        if place.endswith(".py"):
            path = Path(place).resolve()
            sys.path.insert(0, str(path.parent))
            found = importlib.util.spec_from_file_location(path.stem, path)
            assert found is not None
            assert found.loader is not None
            module = sys.modules[path.stem] = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
        else:
            sys.path.insert(0, "")
            module = importlib.import_module(place)
    except Exception as error:
        raise ValueError(f"{what} is {spec!r}, but `{place}` cannot be imported: {text_of(error)}") from error
    except SystemExit:
        raise ValueError(
            f"{what} is {spec!r}, but `{place}` ends the process when it is imported, as scripts do that parse"
            ' arguments. Let it do that under `if __name__ == "__main__":` alone, or name a module that does not.'
        ) from None
    finally:
        sys.argv = argv
    try:
        return getattr(module, name)
    except AttributeError:
        near = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")][:10]
        raise ValueError(f"{what} is {spec!r}, but `{place}` has no `{name}`. It has {', '.join(near)}.") from None


def make(spec: str, what: str, arguments: dict[str, Any], kind: type | None = None) -> Any:
    """What ``spec`` names, called with ``arguments`` if it is a class or a function.

    Raises:
        ValueError: If it cannot be made, or is not of the ``kind``.
    """
    found = _load(spec, what)
    if inspect.isclass(found) or inspect.isroutine(found):
        try:
            found = found(**arguments)
        except Exception as error:
            raise ValueError(f"{what} is {spec!r}, but calling it failed: {text_of(error)}") from error
    if kind is not None and not isinstance(found, kind):
        raise ValueError(f"{what} must be a `{kind.__name__}`, but {spec!r} is a `{type(found).__name__}`.")
    return found


def make_data(spec: str, arguments: dict[str, Any]) -> Any:
    """The data module or loader that ``spec`` names.

    Raises:
        ValueError: If it cannot be made, or is neither.
    """
    found = make(spec, "`--data`", arguments)
    if isinstance(found, nn.Module) or not (hasattr(found, "train_dataloader") or isinstance(found, Iterable)):
        raise ValueError(
            f"`--data` must be a LightningDataModule or a loader, but {spec!r} is a `{type(found).__name__}`."
        )
    return found


def trace_of(module: LightningModule, data: Any = None) -> tuple[Trace, Budget]:
    """What ``training_step`` runs on the first batch, and what decides how much memory it takes; nothing is trained.

    Args:
        module: The LightningModule.
        data: A data module or a loader; by default the module's own.
    """
    strategy = _Planning(num_stages=2, virtual=True)
    trainer = Trainer(
        accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False, max_epochs=1,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    is_module = hasattr(data, "train_dataloader")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
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
    """What the pipeline comes to if all devices are equal and messages take no time; its unit of time means nothing."""
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
        f"Predicted: {told['speedup']:.2f} times as fast as one device, if messages take no time."
    )


def place_of(error: BaseException) -> str:
    """The file and the line of the project's code from which an error comes."""
    libraries = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    foreign = {Path(__file__).parent, *libraries}
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if foreign.isdisjoint(Path(frame.filename).parents)]
    return "{0.filename}:{0.lineno}".format((own or frames)[-1])


def text_of(error: BaseException) -> str:
    """Its type and what it says."""
    return f"{type(error).__name__}: {error}"
