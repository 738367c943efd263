"""Steps without a backward, through the pipeline without delays: validate, test and predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torchmetrics import Metric

from lightning_dgmp.agreement import agree_on_plan
from lightning_dgmp.calls import ParameterSlots
from lightning_dgmp.ghost import GhostError
from lightning_dgmp.host import LightningModule, MisconfigurationException, rank_zero_warn
from lightning_dgmp.metrics import logging_nothing, logging_what_is_here
from lightning_dgmp.pipeline import Interception, Pipeline
from lightning_dgmp.placement import Placement
from lightning_dgmp.plan.cut import PlanError
from lightning_dgmp.plan.plan import Plan, make_evaluation_plan, make_plan
from lightning_dgmp.plan.restore import attributes_saved
from lightning_dgmp.plan.trace import trace_step
from lightning_dgmp.stage.randomness import mix_seed
from lightning_dgmp.stage.runner import StageRunner
from lightning_dgmp.transport import Transport
from lightning_dgmp.world import World

__all__ = ["Evaluation"]


class Evaluation:
    """The evaluation steps of one process.

    Each kind of step has a plan of its own, made on its first batch: it calls other modules than the training step.
    While a model is being trained, or if it was made without holding it, its parameters stay where they are; otherwise
    every process has all of them, and the plan is free. A step that cannot be divided, as one that generates text by
    calling the network again and again, runs with the whole model on every process, if that may have it.

    Args:
        module: The LightningModule.
        pipeline: The pipeline that is being trained, if any.
        placement: Of the parameters, if no process may have all of them.
        interception: Of the module's calls.
        transport: The channels of this stage.
        world: All processes.
        ranks: The global rank of each stage of this replica.
        stage: The stage of this process.
        device: Where it lives.
        seed: Equal on all stages of the replica.
    """

    def __init__(
        self,
        module: LightningModule,
        pipeline: Pipeline | None,
        placement: Placement | None,
        interception: Interception,
        transport: Transport,
        world: World,
        ranks: Sequence[int],
        stage: int,
        device: torch.device,
        seed: int,
    ) -> None:
        self._module, self._pipeline, self._interception = module, pipeline, interception
        self._transport, self._world, self._ranks, self._stage = transport, world, ranks, stage
        self._device, self._seed = device, mix_seed(seed, 0, 0)
        self._slots, self._placement = ParameterSlots(module), placement
        self._runners: dict[Any, StageRunner | None] = {}
        self._whole = ExitStack()
        if placement is not None:
            placement.end()

    def run(self, key: Any, step: Callable[[], Any]) -> Any:
        """Run this stage's part of ``step``; steps with the same ``key`` share a plan.

        Returns:
            What the step returns on the last stage, ``None`` on the others.
        """
        if not self.has_run(key):
            return self._run_first(key, step)
        runner = self._runners[key]
        if runner is None:
            return self._run_whole(step)
        try:
            return self._run_stage(runner, step)
        except GhostError as error:
            raise GhostError(
                f"`{key[0]}` was divided among the stages by its first batch, but a later one cannot be: {error} A step"
                " that cannot be divided runs with the whole model on every process if that shows in its first batch:"
                " make the calls and reads of later batches happen in the first one too."
            ) from None

    def has_run(self, key: Any) -> bool:
        """Whether there was a step with this ``key``."""
        return key in self._runners

    def end(self) -> None:
        """Go back to where training was. All stages must call it when an evaluation is over."""
        self._whole.close()
        self._interception.use(None if self._pipeline is None else self._pipeline.runner)

    def _run_first(self, key: Any, step: Callable[[], Any]) -> Any:
        try:
            plan = agree_on_plan(lambda: self._make_plan(step), self._world, self._ranks)
        except PlanError as error:
            reason = str(error).replace("training_step", key[0])
        else:
            if self._placement is not None and self._placement.plan is None:
                self._placement.place(plan)
            self._transport.open(plan.edges(), by_all=False)
            runner = self._make_runner(plan)
            results: dict[str, Metric] | None = self._module.trainer._results
            logged = {} if results is None else results
            names, restore = set(logged), attributes_saved(self._module, *logged.values())
            failure, result = "", None
            try:
                result = self._run_stage(runner, step)
            except GhostError as error:
                failure = str(error)
            failures = self._world.all_gather(failure, "the first step of an evaluation", self._ranks)
            if not any(failures):
                self._runners[key] = runner
                return result
            restore()
            for name in set(logged) - names:
                del logged[name]
            reason = next(filter(None, failures))
        if self._placement is not None:
            raise MisconfigurationException(
                f"`{key[0]}` needs the whole model on every process, because it cannot be divided among the stages, but"
                " the module was made in `configure_model` or under `trainer.init_module`, so that no process holds it."
                f" Make it in `__init__`. ({reason})"
            )
        rank_zero_warn(
            f"`{key[0]}` runs with the whole model on every process, because it cannot be divided among the stages:"
            f" {reason}"
        )
        self._runners[key] = None
        return self._run_whole(step)

    def _make_plan(self, step: Callable[[], Any]) -> Plan:
        def noting(want: Callable[..., None]) -> Any:
            with logging_nothing(self._module, want, with_loggers=True):
                return step()

        try:
            trace = trace_step(noting, self._module, self._device, readers=(Metric,))
        except GhostError as error:
            raise PlanError(str(error)) from error
        trace.returned_none = False
        placed = None if self._placement is None else self._placement.plan
        if self._pipeline is not None and not self._pipeline.runner.whole:
            placed = self._pipeline.runner.plan
        if placed is not None:
            return make_evaluation_plan(trace, self._module, placed)
        return make_plan(trace, self._module, len(self._ranks))

    def _make_runner(self, plan: Plan) -> StageRunner:
        runner = StageRunner(
            self._module, self._slots, plan, self._stage, 0, self._transport, "stash", self._seed, self._device
        )
        runner.whole = self._placement is None and (self._pipeline is None or self._pipeline.runner.whole)
        return runner

    def _run_stage(self, runner: StageRunner, step: Callable[[], Any]) -> Any:
        self._whole.close()
        self._interception.use(runner)
        with logging_what_is_here(self._module, runner.is_last):
            return runner.evaluate(step)

    def _run_whole(self, step: Callable[[], Any]) -> Any:
        self._interception.use(None)
        if self._pipeline is not None and not self._pipeline.runner.whole:
            self._whole.enter_context(self._pipeline.whole_model())
        return step()
