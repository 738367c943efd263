"""The strategy: how Lightning sees the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import override

from lightning_dgmp.agreement import agree_on_plan
from lightning_dgmp.callbacks import adapt_callbacks
from lightning_dgmp.calls import ParameterSlots
from lightning_dgmp.clipping import after_clipping, clipping_by_total_norm, clips_by_norm, no_clipping_by_norm
from lightning_dgmp.evaluating import EvaluatingStrategy
from lightning_dgmp.flush import flush_batches
from lightning_dgmp.host import (
    MisconfigurationException,
    MixedPrecision,
    StrategyRegistry,
    Trainer,
    TrainerFn,
    _StrategyRegistry,
    default_pg_timeout,
    is_param_in_hook_signature,
    rank_zero_info,
)
from lightning_dgmp.learned import Learned
from lightning_dgmp.loops import clock_at, install_loops
from lightning_dgmp.metrics import logging_nothing, logging_what_is_here
from lightning_dgmp.nests import copied_tensors, map_leaves
from lightning_dgmp.pipeline import Interception, Pipeline
from lightning_dgmp.plan.plan import Plan, make_plan
from lightning_dgmp.plan.trace import trace_step
from lightning_dgmp.precision import StageGradScaler, VirtualGradScaler
from lightning_dgmp.remedies import Moment, Remedies, Updates
from lightning_dgmp.schedule import delays_of
from lightning_dgmp.signals import Signals
from lightning_dgmp.stage.notes import StageNotes, VirtualNotes
from lightning_dgmp.stage.runner import BackwardMode, StageRunner
from lightning_dgmp.stage.sides import Sides
from lightning_dgmp.stage.virtual import GradientQueues, VirtualStages
from lightning_dgmp.support import check_optimizers, check_supported

__all__ = ["DelayedMPStrategy"]

_Scaler = TypeVar("_Scaler", bound=GradScaler)


class DelayedMPStrategy(EvaluatingStrategy):
    """Pipeline model parallelism with delayed gradients.

    The model is cut into stages, each device holds one, and no stage waits until the others have finished a batch:
    stage ``k`` of ``K`` is updated with the true gradient of the batch ``K - 1 - k`` iterations ago (Ouroboros, Yang et
    al., NeurIPS 2019, arXiv 1909.06695).

    Arguments:
        num_stages: Into how many stages the model is cut; ``"auto"``: one for each device of a node, or of a replica
            if ``data_parallel_size`` is given.
        data_parallel_size: How many replicas of the stages see different data, as with DDP; ``"auto"``: as many as the
            devices hold.
        split_at: The modules with which the stages 1, 2, ... begin, by their names in ``named_modules()``; by default
            the cuts are chosen so that the slowest stage is as fast as possible.
        backward: What a stage keeps of a batch until its backward: ``"stash"`` the graph; ``"recompute"`` the inputs
            and the weights, with the same result for less memory and one more forward; ``"replay"`` the inputs alone,
            and the backward uses the weights of that time (Features Replay, Huo et al., NeurIPS 2018).
        tied: What happens to a parameter that several stages use, as the matrix of tied embeddings. ``"aligned"``: the
            contributions of all of them for the same batch are added, and applied everywhere when that of the first is
            known, so its copies stay equal and nobody waits; ``"ouroboros"``: as in the paper, the mean of what each
            contributes now, fresh on the last stage and old on the first. That makes the ends of a pipeline wait for
            each other, so it is for ``virtual=True``.
        virtual: Train on one device with exactly the delays of ``num_stages`` stages.
        predict_weights: Run forwards with the weights that gradients are expected to meet, by the optimizer's momentum.
        lr_discount_steps: For so many steps a gradient that is ``d`` updates old changes its parameters by less, at
            first by ``1 / d`` (PipeMare).
        correct_updates: Twice the update less the one before it, where gradients are old (one-step correction).
        synchronous_steps: So many steps without delays come first: stages wait for each other.
        message_dtype: Activations and errors of training with more bits travel as this, such as ``torch.bfloat16``; by
            default as they are, which under autocast is its dtype.
        save_distributed_checkpoint: Whether checkpoints are folders into which each process writes what it holds, so
            that the whole model is nowhere; otherwise ordinary files.
        timeout: How long a stage waits for another before it gives up with an error.
        **kwargs: Further arguments of :class:`~lightning.pytorch.strategies.DDPStrategy`, which wraps each stage of
            several replicas.
    """

    strategy_name = "delayed_mp"

    def __init__(
        self,
        num_stages: int | Literal["auto"] = "auto",
        data_parallel_size: int | Literal["auto"] = "auto",
        *,
        split_at: Sequence[str] | None = None,
        backward: BackwardMode = "stash",
        tied: Literal["aligned", "ouroboros"] = "aligned",
        virtual: bool = False,
        predict_weights: bool = False,
        lr_discount_steps: int = 0,
        correct_updates: bool = False,
        synchronous_steps: int = 0,
        message_dtype: torch.dtype | None = None,
        save_distributed_checkpoint: bool = False,
        timeout: timedelta | None = default_pg_timeout,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_stages, data_parallel_size, virtual, timeout, save_distributed_checkpoint, **kwargs)
        if backward not in ("stash", "recompute", "replay"):
            raise ValueError(f"`backward` must be 'stash', 'recompute' or 'replay', but is {backward!r}.")
        if tied not in ("aligned", "ouroboros"):
            raise ValueError(f"`tied` must be 'aligned' or 'ouroboros', but is {tied!r}.")
        if tied == "ouroboros" and not virtual:
            raise ValueError(
                "`tied='ouroboros'` makes the first stage and the last wait for each other in every batch, so it needs"
                " `virtual=True`. Use `tied='aligned'` for processes."
            )
        if message_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"`message_dtype` must be float32, bfloat16, float16 or None, but is {message_dtype}.")
        if virtual and message_dtype is not None:
            raise ValueError("`virtual=True` sends no messages, so `message_dtype` must be None.")
        self._remedies = Remedies(predict_weights, lr_discount_steps, correct_updates, synchronous_steps)
        if predict_weights and (backward == "replay" or tied == "ouroboros"):
            other = "backward='replay'" if backward == "replay" else "tied='ouroboros'"
            raise ValueError(
                f"`predict_weights=True` gives a batch one version of the weights, but `{other}` uses several. Use one"
                " of them."
            )
        self._message_dtype = message_dtype
        self._split_at = None if split_at is None else list(split_at)
        self._backward: BackwardMode = backward
        self._tied = tied
        self._undo_callbacks: Callable[[], None] = _nothing
        self._undo_scaler: Callable[[], None] = _nothing
        self._reset_pipeline()

    def _reset_pipeline(self) -> None:
        self._plan: Plan | None = None
        self._pipeline = None
        self._virtual_stages: VirtualStages | None = None
        self._updates: Updates | None = None
        self._is_synchronous = False
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
    def has_begun(self) -> bool:
        """Whether the plan of this fit is made."""
        return self._plan is not None

    # ----- setup

    @override
    def setup(self, trainer: Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self.num_stages > 1:
            assert self.lightning_module is not None
            module, replicas = self.lightning_module, self.data_parallel_size
            check_supported(trainer, module, self._virtual, self._backward, replicas)
            self._reset_pipeline()
            if self.data_parallel_size == 1:
                self._layer_sync = None  # the statistics of a stage are those of its replica
        if self.data_parallel_size == 1:  # all processes see the data as a single one would
            trainer._accelerator_connector.use_distributed_sampler = False
        if self.num_stages > 1:
            self._pipeline = self._evaluation = None
            assert self.lightning_module is not None
            self._interception = Interception(self.lightning_module)
            self._share_randomness(trainer)
            install_loops(trainer)
            self.learned = Learned(self.lightning_module, self.share_of_last_stage, self.gather_from_stages)
            if self._is_pipeline:
                assert self._world is not None
                assert self._feed is not None
                self._undo_callbacks = adapt_callbacks(trainer, self)
                self.signals = Signals(trainer, self, self._feed, self._world.flag())
        super().setup(trainer)

    @override
    def configure_ddp(self) -> None:
        if self._is_pipeline:
            if self.data_parallel_size > 1 and self._ddp_comm_hook is not None:
                self.wrap_in_ddp(nn.Linear(1, 1, device=self.root_device))  # to see whether the hook is accepted
        elif self.world_size > 1:
            super().configure_ddp()

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        try:
            super().setup_optimizers(trainer)
        except RuntimeError as error:
            if self.num_stages == 1 or "multiple optimizers" not in str(error):
                raise
            raise MisconfigurationException(
                "`strategy='delayed_mp'` needs a single optimizer, but `configure_optimizers` returned several. Use one"
                " optimizer with several parameter groups."
            ) from None
        if self.num_stages > 1:
            check_optimizers([getattr(o, "_optimizer", o) for o in self.optimizers], self._virtual)

    # ----- the plan

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._num_steps = 0
        assert self.lightning_module is not None
        self._is_synchronous = self.lightning_module.global_step < self._remedies.synchronous_steps
        if self.num_stages > 1 and self._plan is None:
            self._begin_training(batch, batch_idx)

    def _begin_training(self, batch: Any, batch_idx: int) -> None:
        """Plan on the first batch, before anything has run on it."""
        module = self.lightning_module
        assert module is not None
        make_plan = partial(self._make_plan, batch, batch_idx)
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
            copies = self._ddp_kwargs.get("gradient_as_bucket_view", False)
            slots = ParameterSlots(module)
            queues = GradientQueues(slots.parameters, self._plan, copies, self.optimizers)
            virtual_scaler = self._exchange_scaler(lambda scaler: VirtualGradScaler(scaler, queues.stages))
            notes = VirtualNotes(squares) if clips_by_norm(module) else None
            sides = Sides(module, slots, self._plan) if self._tied == "ouroboros" and self._plan.shared else None
            if sides is not None and (virtual_scaler is not None or self.data_parallel_size > 1):
                raise MisconfigurationException(
                    "`tied='ouroboros'` works on one device and without a loss scale, but"
                    f" `data_parallel_size={self.data_parallel_size}` and `precision="
                    f"{self.precision_plugin.precision!r}`. Use `tied='aligned'`, or one device and another precision."
                )
            self._virtual_stages = VirtualStages(
                queues, notes, virtual_scaler, sides, slots, self._watch_updates(slots)
            )
            return
        self._pipeline = Pipeline(
            module,
            self.optimizers,
            self._plan,
            self.device_mesh.get_group("stage"),
            self._world,
            self._transport,
            self.root_device,
            backward=self._backward,
            seed=self._seed,
            first_batch=module.trainer.fit_loop.epoch_loop.total_batch_idx,
            message_dtype=self._message_dtype,
        )
        runner = self._pipeline.runner
        runner.updates = self._watch_updates(runner.slots)
        copies = [] if runner.shared is None else list(runner.shared.copies.values())
        scaler = self._exchange_scaler(lambda scaler: StageGradScaler(scaler, runner.is_last, copies))
        if clips_by_norm(module) or scaler is not None:
            runner.notes = StageNotes(self.stage, squares, clips_by_norm(module), scaler)
        if self.data_parallel_size > 1:
            broadcasts_buffers = self._ddp_kwargs.get("broadcast_buffers", True)
            group = self.device_mesh.get_group("replica")
            wait = self.wait_among_replicas
            self._pipeline.average(group, self.wrap_in_ddp, wait, broadcasts_buffers, self.agree_on_wishes)
        self._interception.use(runner)
        self._evaluation = None  # what was planned with the whole model

    def _watch_updates(self, slots: ParameterSlots) -> Updates | None:
        """Let the remedies work that concern updates."""
        if not self._remedies.concern_updates:
            return None
        delays = delays_of(self.num_stages)
        by_parameter = {p: delays[self.plan.stage_of(name)[0]] for name, p in slots.parameters.items()}
        optimizers = [getattr(optimizer, "_optimizer", optimizer) for optimizer in self.optimizers]
        self._updates = Updates(self._remedies, optimizers, by_parameter, self._now)
        return self._updates

    def _now(self) -> Moment:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        accumulate = trainer.accumulate_grad_batches
        return Moment(trainer.global_step, accumulate, trainer.fit_loop.batch_idx % accumulate, self._is_synchronous)

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
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        batch = batch if self._feed is None else self._feed.read(batch)
        args = (batch, batch_idx) if takes_index else (batch,)

        def step(want: Callable[..., None]) -> Any:
            logging = logging_nothing(module, want, with_loggers=True)
            with self.step_alone(), self.precision_plugin.train_step_context(), logging:
                return module.training_step(*copied_tensors(args))

        with torch.enable_grad():
            trace = trace_step(step, module, self.root_device, readers=(Metric,))
        if self._backward != "stash" and trace.changed_frozen:
            raise MisconfigurationException(
                f"`backward={self._backward!r}` runs steps twice, but `training_step` changes frozen parameters in"
                f" place, such as `{min(trace.changed_frozen)}`. Change them in a hook, or use `backward='stash'`."
            )
        return make_plan(trace, module, self.num_stages, self._split_at)

    # ----- training

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        runner = self.runner
        if self.num_stages > 1:
            self._num_steps += 1
            if self._num_steps > 1:
                raise MisconfigurationException(
                    "`strategy='delayed_mp'` needs an optimizer that evaluates each batch once, but its closure was"
                    " called again for the same batch. Use a first-order optimizer, and call the closure once in"
                    " `optimizer_step`."
                )
        module = self.lightning_module
        assert module is not None
        if runner is None:
            stages = self._virtual_stages
            with nullcontext() if stages is None else stages.step(self._is_synchronous):
                return super().training_step(*args, **kwargs)
        runner.is_synchronous = self._is_synchronous

        def step() -> Any:
            again = runner.num_forwards > number
            logging = logging_nothing(module) if again else logging_what_is_here(module, runner.is_last)
            with (
                self.step_among_replicas(),
                self.precision_plugin.train_step_context(),
                logging,
                clock_at(module.trainer, *moment),
            ):
                return module.training_step(*fresh(args), **fresh(kwargs))

        # A step may take its batch apart; where it runs twice, it may not even change the tensors.
        fresh = copied_tensors if self._backward != "stash" else partial(map_leaves, _same)

        is_first = module.trainer.fit_loop.batch_idx % module.trainer.accumulate_grad_batches == 0
        number = runner.num_forwards
        moment = module.global_step, module.current_epoch, module.trainer.fit_loop.batch_idx
        if runner.averaging is not None and is_first:  # as DDP does
            runner.averaging.share_buffers()
        result = runner.forward(step)
        if not runner.is_last:
            return runner.absent_loss
        if result is None:
            raise MisconfigurationException(
                "`training_step` must return a loss on every batch, but it returned None. The stages work on several"
                " batches at once and cannot skip one: return a loss, for example multiplied by zero."
            )
        return result

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        runner, virtual = self.runner, self._virtual_stages
        if runner is None and virtual is None:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        module = self.lightning_module
        assert module is not None
        loss = self.precision_plugin.pre_backward(closure_loss, module)

        def of_loss() -> None:
            root = loss if runner is None else runner.averaged(loss)
            self.precision_plugin.backward(root, module, optimizer, *args, **kwargs)

        is_step = not module.trainer.fit_loop._should_accumulate()
        if virtual is not None:
            virtual.iterate(of_loss, is_step)
        elif runner is not None and runner.due:
            with self.step_among_replicas(), self.averaging():
                runner.backward(of_loss, is_step)
        with no_clipping_by_norm():
            return self.precision_plugin.post_backward(loss, module)

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Any = None,
        **kwargs: Any,
    ) -> Any:
        if self.runner is None:
            with self._clipping():
                return super().optimizer_step(optimizer, closure, model, **kwargs)
        module = self.lightning_module
        assert module is not None
        result = closure()
        exchange = partial(self._exchange_shared, optimizer)
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            with self._clipping(), after_clipping(module, exchange):
                return super().optimizer_step(optimizer, lambda: result, model, **kwargs)
        # No gradient is due yet, or nothing here is trained. A step without gradients changes nothing; clipping could
        # not cope with that, and a scheduler wants to see it.
        exchange()
        optimizer.step(lambda: result)
        return result

    def _exchange_shared(self, optimizer: Optimizer) -> None:
        assert self.runner is not None
        if self.runner.shared is not None:
            scaler = getattr(self.precision_plugin, "scaler", None)
            is_skipped = isinstance(scaler, StageGradScaler) and scaler.has_overflowed(optimizer)
            self.runner.shared.exchange(is_skipped)

    def _clipping(self) -> AbstractContextManager[None]:
        """Around a step: clipping by norm takes that of all stages."""
        return nullcontext() if self._stages is None else clipping_by_total_norm(self._stages.parts())

    def flush(self) -> None:
        """Run the outstanding backwards and steps, without new forwards, until nothing is in flight.

        The learning rate stays as it is. All stages must call it at the same iteration.
        """
        stages = self._stages
        if self._pipeline is not None and self._world is None:
            raise RuntimeError(
                "Training has failed, so the weights cannot be collected from the stages any more. Go on from the last"
                " checkpoint."
            )
        if stages is not None and stages.begin_flush():
            if not self._is_synchronous:  # or nothing is in flight
                flush_batches(self, stages)
            stages.end_flush()
            if self.runner is not None and self.runner.averaging is not None:
                self.runner.averaging.share_buffers()  # before an evaluation, as DDP does, and for what is saved

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Flush, and give every process the whole model meanwhile. All stages must enter it at the same iteration."""
        self.flush()
        if self._pipeline is None:
            yield
            return
        with self._pipeline.whole_model(), self._interception.suspended():
            yield

    def finish_training(self) -> None:
        """Flush and leave the whole model on every process."""
        self.flush()
        if self._pipeline is not None:
            self._pipeline.close()
            self._interception.use(None)
        if self._updates is not None:
            self._updates.close()
            self._updates = None
        if self._feed is not None:
            self._feed.settle()

    # ----- the end

    @override
    def teardown(self) -> None:
        self._undo_callbacks()
        self._undo_scaler()
        self._undo_scaler = _nothing
        if self._feed is not None:
            self._feed.close()
            self._feed = None
        interception = getattr(self, "_interception", None)  # which setup makes
        if interception is not None:
            interception.use(None)
        super().teardown()

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        for name, start_method in (
            ("delayed_mp", "popen"),
            ("delayed_mp_spawn", "spawn"),
            ("delayed_mp_fork", "fork"),
        ):
            strategy_registry.register(
                name,
                cls,
                description=f"Pipeline model parallelism with delayed gradients, `start_method` '{start_method}'",
                start_method=start_method,
            )


if "delayed_mp" not in StrategyRegistry:
    DelayedMPStrategy.register_strategies(StrategyRegistry)


def _nothing() -> None: ...


def _give_back(plugin: MixedPrecision, scaler: GradScaler) -> None:
    assert plugin.scaler is not None
    scaler.load_state_dict(plugin.scaler.state_dict())
    plugin.scaler = scaler


def _same(leaf: Any) -> Any:
    return leaf
