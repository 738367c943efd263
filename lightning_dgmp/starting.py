"""The start of training: the plan is made on the first batch, and then what runs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.amp import GradScaler
from torchmetrics import Metric
from typing_extensions import override

from lightning_dgmp.agreement import agree_on_plan
from lightning_dgmp.budgets import budget_of
from lightning_dgmp.calls import ParameterSlots
from lightning_dgmp.clipping import clip_by_total_norm, clips_by_norm, hooks_see_gradients
from lightning_dgmp.evaluating import EvaluatingStrategy
from lightning_dgmp.host import (
    LightningModule,
    MisconfigurationException,
    MixedPrecision,
    is_param_in_hook_signature,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_dgmp.metrics import logging_nothing
from lightning_dgmp.nests import copied_tensors, objects_in
from lightning_dgmp.options import Options
from lightning_dgmp.pipeline import Pipeline
from lightning_dgmp.plan.memory import Budget
from lightning_dgmp.plan.plan import Plan, make_plan
from lightning_dgmp.plan.record import Trace
from lightning_dgmp.plan.restore import attributes_saved
from lightning_dgmp.plan.trace import trace_step
from lightning_dgmp.precision import StageGradScaler, VirtualGradScaler
from lightning_dgmp.rebalancing import (
    MIN_BATCHES,
    KeptState,
    Measurement,
    better_plan,
    busy_in,
    move_parameters,
    wait_for_device,
)
from lightning_dgmp.remedies import Moment, Updates
from lightning_dgmp.reports import Reporter
from lightning_dgmp.stage.averaging import BufferSlot
from lightning_dgmp.stage.notes import StageNotes, VirtualNotes
from lightning_dgmp.stage.runner import StageRunner
from lightning_dgmp.stage.sides import Sides
from lightning_dgmp.stage.virtual import GradientQueues, VirtualStages
from lightning_dgmp.support import checked_trace
from lightning_dgmp.timing import Clock, Kind
from lightning_dgmp.transport import Transport
from lightning_dgmp.world import World

__all__ = ["StartingStrategy"]

_Scaler = TypeVar("_Scaler", bound=GradScaler)


class StartingStrategy(EvaluatingStrategy):
    """Plans on the first batch of training, and makes the stage of this process, or the virtual ones.

    Args:
        *args: See :class:`~lightning_dgmp.evaluating.EvaluatingStrategy`.
        **kwargs: See there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._options = Options()
        self._buffers: list[BufferSlot] = []  # that replicas share
        self._undo_scaler: Callable[[], None] = _nothing
        self._undo_clipping: Callable[[], None] = _nothing
        self._reset_pipeline()

    def _reset_pipeline(self) -> None:
        self._plan: Plan | None = None
        self._pipeline = self._trained = None
        self.reporter: Reporter | None = None
        self._traced: Trace | None = None
        self._budget = Budget()
        self._measured_from: int | None = None  # with which batch
        self._call_seconds: dict[str, float] = {}
        self._kept: KeptState | None = None  # since training has begun
        self._virtual_stages: VirtualStages | None = None
        self._updates: Updates | None = None
        self._is_synchronous = False
        self._num_since_flush = 0  # batches
        self._evaluation = None
        self._seed = 0
        self._num_steps = 0

    @property
    def squares(self) -> Tensor | None:
        """The squared norm of each stage's newest gradient, as far as it is known here, if gradients are clipped."""
        return None if self._stages is None else self._stages.squares

    @property
    def _stages(self) -> StageRunner | VirtualStages | None:
        """What trains, once it has begun."""
        return self._virtual_stages if self.runner is None else self.runner

    @property
    def plan(self) -> Plan:
        """How the model is divided. Made when ``fit`` sees the first batch."""
        if self._plan is None:
            raise RuntimeError("There is no plan yet: it is made from the first batch of `trainer.fit`.")
        return self._plan

    @property
    def runner(self) -> StageRunner | None:
        """The stage of this process, once training has begun; ``None`` with virtual stages."""
        return None if self._pipeline is None else self._pipeline.runner

    @property
    def clock(self) -> Clock | None:
        """Measures where the time of this process goes, if it is one of several stages."""
        return None if self._transport is None else self._transport.clock

    def measuring(self, kind: Kind, batch: int) -> AbstractContextManager[None]:
        """A context whose time counts for ``kind``."""
        return nullcontext() if self.clock is None else self.clock.measuring(kind, batch)

    def watch(self) -> Reporter | None:
        """Let this stage report from now on, if it is one of several processes. All of them must call it."""
        if self.reporter is None and self.runner is not None and self._transport is not None:
            self.reporter = Reporter(self.runner, self._transport)
        return self.reporter

    @property
    def has_begun(self) -> bool:
        """Whether the plan of this fit is made."""
        return self._plan is not None

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._num_steps = 0
        assert self.lightning_module is not None
        self._is_synchronous = self.lightning_module.global_step < self._options.remedies.synchronous_steps
        if self.num_stages > 1 and self._plan is None:
            self._begin_training(batch, batch_idx)

    def _begin_training(self, batch: Any, batch_idx: int) -> None:
        """Plan on the first batch, before anything has run on it."""
        module = self.lightning_module
        assert module is not None
        make_plan, self._budget = partial(self._make_plan, batch, batch_idx), self._make_budget()
        if self._world is None:
            self._plan = self.broadcast(make_plan())
        else:
            plan = agree_on_plan(make_plan, self._world, self._stage_ranks) if self.replica == 0 else None
            if self.data_parallel_size > 1:  # which may see other shapes, but must cut alike
                plan = self._world.all_gather(plan, "the plan of the first replica")[0]
            self._plan = plan
        assert self._plan is not None
        rank_zero_info(f"{self.num_stages} {'virtual ' if self._virtual else ''}stages:\n{self._plan.table()}\n")
        is_known = len(self._loaded_squares) == self.num_stages
        squares = (self._loaded_squares if is_known else torch.zeros(self.num_stages)).to(self.root_device)
        if self._world is None or self._transport is None:
            self._begin_virtual(module, self._plan, squares)
        else:
            first_batch = module.trainer.fit_loop.epoch_loop.total_batch_idx
            self._begin_stage(module, self._plan, squares, self._world, self._transport, first_batch)
            self._measure()
        stages = self._stages
        assert stages is not None
        self._undo_clipping = clip_by_total_norm(stages.parts, stages.gradients, module.parameters())

    def _begin_virtual(self, module: LightningModule, plan: Plan, squares: Tensor) -> None:
        copies = self._ddp_kwargs.get("gradient_as_bucket_view", False)
        slots = ParameterSlots(module)
        queues = GradientQueues(slots.parameters, plan, copies, self.optimizers)
        virtual_scaler = self._exchange_scaler(lambda scaler: VirtualGradScaler(scaler, queues.stages))
        notes = VirtualNotes(squares, plan.delays) if clips_by_norm(module) else None
        sides = Sides(module, slots, plan) if self._options.tied == "ouroboros" and plan.shared else None
        if sides is not None and (virtual_scaler is not None or self.data_parallel_size > 1):
            raise MisconfigurationException(
                "`tied='ouroboros'` works on one device and without a loss scale, but"
                f" `data_parallel_size={self.data_parallel_size}` and `precision="
                f"{self.precision_plugin.precision!r}`. Use `tied='aligned'`, or one device and another precision."
            )
        updates, is_late = self._watch_updates(slots), hooks_see_gradients(module)
        self._virtual_stages = VirtualStages(queues, notes, virtual_scaler, sides, slots, updates, is_late)

    def _begin_stage(
        self,
        module: LightningModule,
        plan: Plan,
        squares: Tensor,
        world: World,
        transport: Transport,
        first_batch: int,
    ) -> None:
        if self._placement is not None:
            self._placement.place(plan, self.optimizers)
        self._pipeline = self._trained = Pipeline(
            module,
            self.optimizers,
            plan,
            self.device_mesh.get_group("stage"),
            world,
            transport,
            self.root_device,
            backward=self._options.backward,
            seed=self._seed,
            first_batch=first_batch,
            message_dtype=self._options.message_dtype,
        )
        self._pipeline.load_optimizers(self._loaded_states)
        self._loaded_states = []
        runner = self._pipeline.runner
        runner.updates = self._watch_updates(runner.slots)
        copies = [] if runner.messages.shared is None else list(runner.messages.shared.copies.values())
        scaler = self._exchange_scaler(lambda scaler: StageGradScaler(scaler, runner.is_last, copies))
        takes_norms = clips_by_norm(module)
        if takes_norms or scaler is not None:
            sees = takes_norms and hooks_see_gradients(module)  # a process may have callbacks of its own
            late = transport if any(world.all_gather(sees, "which hooks see gradients")) else None
            gradients = runner.updated_gradients
            runner.messages.notes = StageNotes(self.stage, squares, gradients, takes_norms, scaler, late)
        if self.data_parallel_size > 1:
            group = self.device_mesh.get_group("replica")
            wait = self.wait_among_replicas
            self._pipeline.average(group, self.wrap_in_ddp, wait, self._buffers, self.agree_on_wishes)
        self._interception.use(runner)
        self._evaluation = None  # what was planned with the whole model

    def _measure(self) -> None:
        """Measure what takes how long, from when the pipeline is full, if cuts are to follow from that."""
        runner = self.runner
        if self._options.balance != "measured" or runner is None:
            return
        self._measured_from = runner.num_forwards + 2 * self.plan.delays[0] + 2
        self._call_seconds = {}
        self._kept = self._kept or KeptState(runner.root)
        runner.timing = self._timing

    @contextmanager
    def _timing(self, path: str) -> Iterator[None]:
        assert self.runner is not None
        if self._measured_from is None or self.runner.num_forwards < self._measured_from:
            yield
            return
        wait_for_device(self.root_device)
        begin = time.perf_counter()
        yield
        wait_for_device(self.root_device)
        self._call_seconds[path] = self._call_seconds.get(path, 0.0) + time.perf_counter() - begin

    @property
    def can_rebalance(self) -> bool:
        """Whether enough is measured for cuts to move at a flush; between two batches it is the same on all stages."""
        return (
            self._measured_from is not None
            and self.runner is not None
            and self.runner.num_forwards >= self._measured_from + MIN_BATCHES
        )

    def end_measuring(self) -> None:
        """Let cuts stay from now on."""
        if self._measured_from is not None:
            rank_zero_warn(
                "`balance='measured'` moves cuts before the next validation, checkpoint or epoch after the first"
                " iterations, but training has ended before. Set `val_check_interval`, or train for more epochs."
            )
        self._measured_from = None

    def rebalance(self) -> None:
        """At a flush, where all stages are: move cuts if what was measured makes it worth."""
        module, old, world, transport = self.lightning_module, self._pipeline, self._world, self._transport
        if self._measured_from is None or old is None or world is None or transport is None or module is None:
            return
        mine = Measurement(busy_in(transport.clock.spans, self._measured_from), self._call_seconds)
        measured = self.gather_from_stages(mine, "what the stages have measured")
        if any(one.busy is None for one in measured):
            self._measure()  # until the next flush
            return
        self._measured_from = old.runner.timing = None
        found = None
        if self.is_global_zero:
            assert self._traced is not None
            found = better_plan(self._traced, module, self.plan, measured, self.slack, self._budget)
        found = world.all_gather(found, "the new plan")[0]
        if found is None:
            return
        plan, gain = found
        assert self._kept is not None
        self._kept.look(self.gather_from_stages)
        obstacles = world.all_gather(self._kept.obstacles(self.plan, plan), "what cannot move")
        if any(obstacles):
            rank_zero_warn(
                f"By measured times other cuts make the slowest stage {100 * gain:.0f} % faster, but the cuts stay,"
                f" because what modules keep must be tensors, numbers or texts to move: {max(obstacles)[0]} is not."
            )
            return
        rank_zero_info(f"By measured times the slowest stage gets {100 * gain:.0f} % faster with:\n{plan.table()}\n")
        optimizers = [getattr(optimizer, "_optimizer", optimizer) for optimizer in self.optimizers]
        move_parameters(old.runner.slots, optimizers, self.plan, plan, self.stage, self._stage_ranks, world)
        old.give_way()
        if self._placement is not None:
            self._placement.plan = plan
        self._kept.share(self.plan, self._stage_ranks, world, self.root_device)
        squares = torch.zeros(self.num_stages, device=self.root_device) if self.squares is None else self.squares
        self._end_training()
        self._undo_scaler()
        self._undo_scaler = _nothing
        self._interception.use(None)
        self._plan = plan
        self._begin_stage(module, plan, squares, world, transport, old.runner.num_forwards)
        runner = self.runner
        assert runner is not None
        runner.ending, runner.messages.granted = old.runner.ending, old.runner.messages.granted
        runner.messages.wishes = old.runner.messages.wishes
        self._undo_clipping = clip_by_total_norm(runner.parts, runner.gradients, module.parameters())
        if self.reporter is not None:
            self.reporter.follow(runner)

    def _watch_updates(self, slots: ParameterSlots) -> Updates | None:
        """Let the remedies work that concern updates."""
        if not self._options.remedies.concern_updates:
            return None
        by_parameter = {p: self.plan.delays[self.plan.stage_of(name)[0]] for name, p in slots.parameters.items()}
        optimizers = [getattr(optimizer, "_optimizer", optimizer) for optimizer in self.optimizers]
        self._updates = Updates(self._options.remedies, optimizers, by_parameter, self._now)
        return self._updates

    def _now(self) -> Moment:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        accumulate = trainer.accumulate_grad_batches
        position = trainer.fit_loop.batch_idx % accumulate
        in_flight = max(self._num_since_flush - 1, 0)  # before the present one
        return Moment(trainer.global_step, accumulate, position, in_flight, self._is_synchronous)

    def _exchange_scaler(self, make: Callable[[GradScaler], _Scaler]) -> _Scaler | None:
        """Let the precision plugin, if it scales losses, use what ``make`` makes of its scaler, until the end."""
        plugin = self.precision_plugin
        if not isinstance(plugin, MixedPrecision) or plugin.scaler is None or not plugin.scaler.is_enabled():
            return None
        self._undo_scaler = partial(_give_back, plugin, plugin.scaler)
        plugin.scaler = scaler = make(plugin.scaler)
        return scaler

    def _make_plan(self, batch: Any, batch_idx: int) -> Plan:
        module = self.lightning_module
        assert module is not None
        self._traced = self._trace(batch, batch_idx)
        return make_plan(self._traced, module, self.num_stages, self._options.split_at, self.slack, None, self._budget)

    def _make_budget(self) -> Budget:
        assert self.lightning_module is not None
        has_buckets = self.data_parallel_size > 1 and not self._ddp_kwargs.get("gradient_as_bucket_view", False)
        how = self.optimizers, self.root_device, self._world, 1 + has_buckets, self.precision_plugin.precision
        return budget_of(self._options, self.lightning_module, *how)

    def _trace(self, batch: Any, batch_idx: int) -> Trace:
        module = self.lightning_module
        assert module is not None
        batch = batch if self._feed is None else self._feed.read(batch)
        args = (batch, batch_idx)[: 1 + is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)]

        def step(want: Callable[..., None]) -> Any:
            logging = logging_nothing(module, want, with_loggers=True)
            with self.step_alone(), self.precision_plugin.train_step_context(), logging:
                return module.training_step(*copied_tensors(args))

        restore = attributes_saved(*objects_in(args))
        with torch.enable_grad():
            trace = trace_step(step, module, self.root_device, readers=(Metric,))
        restore()
        return checked_trace(trace, self._options.backward)

    def _end_training(self) -> None:
        if self._updates is not None:
            self._updates.close()
            self._updates = None
        self._undo_clipping()
        self._undo_clipping = _nothing

    @override
    def teardown(self) -> None:
        self._end_training()
        self._undo_scaler()
        self._undo_scaler = _nothing
        super().teardown()


def _nothing() -> None: ...


def _give_back(plugin: MixedPrecision, scaler: GradScaler) -> None:
    assert plugin.scaler is not None
    scaler.load_state_dict(plugin.scaler.state_dict())
    plugin.scaler = scaler
