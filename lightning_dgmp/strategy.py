"""The strategy: how Lightning sees the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import override

from lightning_dgmp.agreement import agree_on_plan
from lightning_dgmp.callbacks import adapt_callbacks, reads_outputs
from lightning_dgmp.calls import ParameterSlots
from lightning_dgmp.clipping import clipping_by_total_norm, clips_by_norm
from lightning_dgmp.data import Feed, check_sampler, own_loader
from lightning_dgmp.evaluation import Evaluation
from lightning_dgmp.flush import flush_batches
from lightning_dgmp.host import (
    MisconfigurationException,
    MixedPrecision,
    StrategyRegistry,
    Trainer,
    TrainerFn,
    _augment_message,
    _StrategyRegistry,
    default_pg_timeout,
    is_param_in_hook_signature,
    rank_zero_info,
)
from lightning_dgmp.learned import Learned
from lightning_dgmp.loops import clock_at, install_loops
from lightning_dgmp.metrics import logging_nothing, logging_what_is_here
from lightning_dgmp.nests import map_leaves
from lightning_dgmp.pipeline import Interception, Pipeline
from lightning_dgmp.plan.plan import Plan, make_plan
from lightning_dgmp.plan.trace import trace_step
from lightning_dgmp.precision import StageGradScaler, VirtualGradScaler
from lightning_dgmp.saving import SavingStrategy
from lightning_dgmp.signals import Signals
from lightning_dgmp.stage.notes import StageNotes, VirtualNotes
from lightning_dgmp.stage.randomness import OwnRandomness, RandomState, mix_seed, seed_all
from lightning_dgmp.stage.runner import BackwardMode, StageRunner
from lightning_dgmp.stage.virtual import GradientQueues
from lightning_dgmp.support import check_optimizers, check_supported

__all__ = ["DelayedMPStrategy"]

_HOST = torch.device("cpu")


class DelayedMPStrategy(SavingStrategy):
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
        virtual: Train on one device with exactly the delays of ``num_stages`` stages.
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
        virtual: bool = False,
        save_distributed_checkpoint: bool = False,
        timeout: timedelta | None = default_pg_timeout,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_stages, data_parallel_size, virtual, timeout, save_distributed_checkpoint, **kwargs)
        if backward not in ("stash", "recompute", "replay"):
            raise ValueError(f"`backward` must be 'stash', 'recompute' or 'replay', but is {backward!r}.")
        self._split_at = None if split_at is None else list(split_at)
        self._backward: BackwardMode = backward
        self._feed: Feed | None = None
        self._undo_callbacks: Callable[[], None] = _nothing
        self._undo_scaler: Callable[[], None] = _nothing
        self._reset_pipeline()

    def _reset_pipeline(self) -> None:
        self._plan: Plan | None = None
        self._pipeline = None
        self._queues: GradientQueues | None = None
        self._notes: VirtualNotes | None = None
        self._scaler: VirtualGradScaler | None = None
        self._evaluation: Evaluation | None = None
        self._seed = 0
        self._num_steps = 0

    @property
    def squares(self) -> Tensor | None:
        """The squared norm of each stage's newest gradient, as far as it is known here, if gradients are clipped."""
        if self._notes is not None:
            return self._notes.squares
        notes = None if self.runner is None else self.runner.notes
        return notes.squares if notes is not None and notes.takes_norms else None

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
    def has_feed(self) -> bool:
        """Whether stage 0 loads for the others."""
        return self._feed is not None

    @contextmanager
    def keeping_loading(self) -> Iterator[None]:
        """Let the data that are loaded meanwhile draw nothing from the random numbers of those loaded later."""
        with self._loading.kept():
            yield

    @property
    def has_begun(self) -> bool:
        """Whether the plan of this fit is made."""
        return self._plan is not None

    # ----- setup

    @override
    def setup(self, trainer: Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self.num_stages > 1:
            assert self.lightning_module is not None
            check_supported(trainer, self.lightning_module, self._virtual, self._backward)
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
            self.learned = Learned(self.lightning_module, self.share_of_last_stage)
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
            check_optimizers(list(self.optimizers))

    def _share_randomness(self, trainer: Trainer) -> None:
        """Put all stages in the random state of the last one; loading has one for itself from then on."""
        mine = RandomState.current(_HOST), torch.initial_seed()
        state, seed = self.share_of_last_stage(mine, "the random state")
        state.apply(_HOST)
        if self._loaded_seeds:
            seeds = self._loaded_seeds
            seed = seeds[self.replica] if self.replica < len(seeds) else mix_seed(seeds[0], self.replica, 0)
        self._seed, self._seeds = seed, self.gather_from_replicas(seed, "the random seed")
        self._loading = OwnRandomness()
        if self._transport is not None:
            together = None if self._vote is None else self._together(lambda: trainer.training)
            share = self.share_of_first_stage
            self._feed = Feed(self._transport, self.stage, self.num_stages, self._loading, share, together)

    def align_randomness(self, epoch: int) -> None:
        """Begin an epoch in the same random state on all stages, without asking them."""
        seed = mix_seed(self._seed, epoch, 0)
        seed_all(seed, _HOST)
        self._loading.seed(seed)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        if self._feed is None:
            return dataloader
        check_sampler(own_loader(dataloader), self.data_parallel_size, self.replica)
        return self._feed.wrap(dataloader)

    # ----- the plan

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._num_steps = 0
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
        if self._world is None or self._transport is None:
            copies = self._ddp_kwargs.get("gradient_as_bucket_view", False)
            self._queues = GradientQueues(ParameterSlots(module).parameters, self._plan, copies)
            self._prepare_notes()
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
        )
        self._prepare_notes()
        if self.data_parallel_size > 1:
            broadcasts_buffers = self._ddp_kwargs.get("broadcast_buffers", True)
            group = self.device_mesh.get_group("replica")
            wait = self.wait_among_replicas
            self._pipeline.average(group, self.wrap_in_ddp, wait, broadcasts_buffers, self.agree_on_wishes)
        self._interception.use(self._pipeline.runner)
        self._evaluation = None  # what was planned with the whole model

    def _prepare_notes(self) -> None:
        """Let norms travel, if they are wanted, and the scales of `16-mixed`."""
        module, plugin, queues, runner = self.lightning_module, self.precision_plugin, self._queues, self.runner
        assert module is not None
        norms = clips_by_norm(module)
        original = plugin.scaler if isinstance(plugin, MixedPrecision) else None
        is_known = len(self._loaded_squares) == self.num_stages
        squares = self._loaded_squares if is_known else torch.zeros(self.num_stages)
        squares = squares.to(self.root_device)
        if queues is not None:
            self._scaler = None if original is None else VirtualGradScaler(original, queues.stages)
            self._notes = VirtualNotes(squares) if norms else None
            self._use_scaler(self._scaler)
        elif runner is not None and (norms or original is not None):
            scaler = None if original is None else StageGradScaler(original, runner.is_last)
            runner.notes = StageNotes(self.stage, squares, norms, scaler)
            self._use_scaler(scaler)

    def _use_scaler(self, scaler: GradScaler | None) -> None:
        """Let the precision plugin use ``scaler`` instead of its own, until the end."""
        plugin = self.precision_plugin
        if scaler is not None and isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
            self._undo_scaler = partial(_give_back, plugin, plugin.scaler)
            plugin.scaler = scaler

    def _make_plan(self, batch: Any, batch_idx: int) -> Plan:
        module = self.lightning_module
        assert module is not None
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        batch = batch if self._feed is None else self._feed.read(batch)
        args = (batch, batch_idx) if takes_index else (batch,)

        def step(want: Callable[..., None]) -> Any:
            logging = logging_nothing(module, want, with_loggers=True)
            with self.step_alone(), self.precision_plugin.train_step_context(), logging:
                return module.training_step(*map_leaves(_copy_tensor, args))

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
        if runner is None:
            return super().training_step(*args, **kwargs)
        module = self.lightning_module
        assert module is not None

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
        fresh = partial(map_leaves, _copy_tensor if self._backward != "stash" else _same)

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
        runner, queues = self.runner, self._queues
        if runner is None and queues is None:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        module = self.lightning_module
        assert module is not None
        loss = self.precision_plugin.pre_backward(closure_loss, module)

        def of_loss() -> None:
            root = loss if runner is None else runner.averaged(loss)
            self.precision_plugin.backward(root, module, optimizer, *args, **kwargs)

        is_step = not module.trainer.fit_loop._should_accumulate()
        if queues is not None:
            self._begin_iteration()
            queues.set_aside()
            of_loss()
            queues.exchange(None if self._scaler is None else self._scaler.remove_scale())
            self._end_iteration(is_step)
        elif runner is not None and runner.due:
            with self.step_among_replicas(), self.averaging():
                runner.backward(of_loss, is_step)
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
        result = closure()
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            with self._clipping():
                return super().optimizer_step(optimizer, lambda: result, model, **kwargs)
        # No gradient is due yet, or nothing here is trained. A step without gradients changes nothing; clipping could
        # not cope with that, and a scheduler wants to see it.
        optimizer.step(lambda: result)
        return result

    def _begin_iteration(self) -> None:
        """With virtual stages: what would travel with activations has arrived."""
        if self._notes is not None:
            self._notes.begin()
        if self._scaler is not None:
            self._scaler.begin()

    def _end_iteration(self, is_step: bool) -> None:
        """With virtual stages: note what belongs to the gradients that are there now."""
        queues = self._queues
        assert queues is not None
        if self._scaler is not None:
            self._scaler.use(queues.scales)
        if self._notes is not None:
            self._notes.note(queues.gradients() if is_step else [[]] * self.num_stages, queues.had_backward)

    def _clipping(self) -> AbstractContextManager[None]:
        """Around a step: clipping by norm takes that of all stages."""
        runner, queues, notes = self.runner, self._queues, self._notes
        if runner is not None and runner.notes is not None and runner.notes.takes_norms:
            return clipping_by_total_norm([(list(runner.own.values()), runner.notes.total_norm)])
        if queues is not None and notes is not None:
            return clipping_by_total_norm([(own, partial(notes.total_norm, k)) for k, own in enumerate(queues.stages)])
        return nullcontext()

    def flush(self) -> None:
        """Run the outstanding backwards and steps, without new forwards, until nothing is in flight.

        The learning rate stays as it is. All stages must call it at the same iteration.
        """
        runner, queues = self.runner, self._queues
        if queues is not None and queues.num_waiting:
            self._begin_iteration()

            def drain(is_open: bool, is_step: bool) -> None:
                queues.drain(is_open)
                self._end_iteration(is_step)

            flush_batches(self, lambda: queues.num_waiting, drain)
            if self._scaler is not None:
                self._scaler.begin()
                self._scaler.settle()
        elif runner is not None and runner.begin_flush():

            def backward(is_open: bool, is_step: bool) -> None:
                if runner.in_flight:
                    with self.step_among_replicas(), self.averaging():
                        runner.backward(_no_loss, is_step)
                elif is_step and is_open:
                    runner.close_update()

            flush_batches(self, lambda: len(runner.in_flight), backward)
            runner.end_flush()

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
        if self._feed is not None:
            self._feed.settle()

    # ----- evaluation

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("validation_step", self.precision_plugin.val_step_context, args, kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("test_step", self.precision_plugin.test_step_context, args, kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("predict_step", self.precision_plugin.predict_step_context, args, kwargs)

    def _evaluate(self, name: str, context: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.lightning_module
        assert module is not None

        def step() -> Any:
            with self.step_among_replicas(), context():
                return getattr(module, name)(*map_leaves(_copy_tensor, args), **kwargs)

        if self._world is None or self._transport is None:
            return getattr(super(), name)(*args, **kwargs)
        if self._evaluation is None:
            self._evaluation = Evaluation(
                module,
                self._pipeline,
                self._interception,
                self._transport,
                self._world,
                self._stage_ranks,
                self.stage,
                self.root_device,
                self._seed,
            )
        key = name, args[2] if len(args) > 2 else 0
        if self._feed is not None and not self._evaluation.has_run(key):
            args = self._feed.read(args)  # for the trace, which runs everything
        result = self._evaluation.run(key, step)
        if reads_outputs(name, module):
            result = self.share_of_last_stage(result, f"the output of `{name}`")
        return result

    @override
    def on_validation_end(self) -> None:
        self._end_evaluation()

    @override
    def on_test_end(self) -> None:
        self._end_evaluation()

    @override
    def on_predict_end(self) -> None:
        self._end_evaluation()

    def _end_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.end()
        if self._feed is not None:
            self._feed.settle()

    # ----- the end

    @override
    def on_exception(self, exception: BaseException) -> None:
        _augment_message(
            exception,
            pattern=".*more than one element of the written-to tensor refers to a single memory location.*",
            new_message=(
                "A hook or callback may change parameters of its own stage alone, but it wrote into one of another"
                " stage. Averages of weights and the like are not supported yet: remove them, or use another strategy."
            ),
        )
        super().on_exception(exception)

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


def _copy_tensor(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _no_loss() -> None:
    raise AssertionError("The last stage has nothing in flight between iterations.")
