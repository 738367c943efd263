"""The strategy: how Lightning sees the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dgmp.agreement import not_synchronised
from lightning_dgmp.callbacks import adapt_callbacks
from lightning_dgmp.clipping import after_clipping
from lightning_dgmp.flush import flush_batches
from lightning_dgmp.host import (
    MisconfigurationException,
    StrategyRegistry,
    Trainer,
    TrainerFn,
    _StrategyRegistry,
    default_pg_timeout,
)
from lightning_dgmp.learned import Learned
from lightning_dgmp.loops import clock_at, install_loops
from lightning_dgmp.metrics import logging_nothing, logging_what_is_here
from lightning_dgmp.nests import copied_tensors, map_leaves, objects_in
from lightning_dgmp.options import Options, Tied
from lightning_dgmp.pipeline import Interception
from lightning_dgmp.plan.restore import attributes_of_now
from lightning_dgmp.precision import StageGradScaler
from lightning_dgmp.remedies import Remedies
from lightning_dgmp.replicas import in_hook
from lightning_dgmp.signals import Signals
from lightning_dgmp.stage.averaging import buffer_slots
from lightning_dgmp.stage.runner import BackwardMode
from lightning_dgmp.starting import StartingStrategy
from lightning_dgmp.support import ONCE, SEVERAL_OPTIMIZERS, check_arguments, check_optimizers, check_supported

__all__ = ["DelayedMPStrategy"]

_Scaler = TypeVar("_Scaler", bound=GradScaler)


class DelayedMPStrategy(StartingStrategy):
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
        predict_weights: Run forwards with the weights that gradients are expected to meet, by the optimizer's momentum
            (SpecTrain, arXiv 1809.02839; XPipe, arXiv 1911.04610; FTPipe, Eliad et al., USENIX ATC 2021).
        lr_discount_steps: For so many steps a gradient that is ``d`` updates old changes its parameters by less, at
            first by ``1 / d`` (T1 of PipeMare, Yang et al., MLSys 2021).
        correct_updates: Twice the update less the one before it, where gradients are old (one-step correction, arXiv
            2606.30634).
        synchronous_steps: So many steps without delays come first: stages wait for each other (T3 of PipeMare, and the
            warm-up of Ouroboros).
        balance: By what cuts make the stages equal: ``"flops"``, a guess from the trace; ``"measured"``, the times of
            the first iterations, by which cuts move before the next validation, checkpoint or epoch if that makes the
            slowest stage faster by more than 5 %.
        slack: So many batches more than necessary are in flight between neighbours, to hide a link that is slow beside
            a batch; each makes gradients older by as many batches for every stage that follows.
        memory_limit: The most bytes that a stage may need: only such cuts are made, and if there are none it is an
            error before training; by default, on CUDA, the memory of the smallest device.
        message_dtype: Activations and errors of training with more bits travel as this, such as ``torch.bfloat16``; by
            default as they are, which under autocast is its dtype.
        save_distributed_checkpoint: Whether checkpoints are folders into which each process writes what it holds, so
            that the whole model is nowhere; otherwise ordinary files.
        load_weights: A file or folder with weights, of which each process reads what it needs: safetensors, Lightning's
            or torch's checkpoints. They take the place of initial ones, not of those of a ``ckpt_path``.
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
        tied: Tied = "aligned",
        virtual: bool = False,
        predict_weights: bool = False,
        lr_discount_steps: int = 0,
        correct_updates: bool = False,
        synchronous_steps: int = 0,
        balance: Literal["flops", "measured"] = "flops",
        slack: int = 0,
        memory_limit: int | None = None,
        message_dtype: torch.dtype | None = None,
        save_distributed_checkpoint: bool = False,
        load_weights: str | Path | None = None,
        timeout: timedelta | None = default_pg_timeout,
        **kwargs: Any,
    ) -> None:
        check_arguments(type(self), kwargs)
        remedies = Remedies(predict_weights, lr_discount_steps, correct_updates, synchronous_steps)
        options = Options(virtual, split_at, backward, tied, message_dtype, remedies, slack, balance, memory_limit)
        super().__init__(num_stages, data_parallel_size, virtual, timeout, save_distributed_checkpoint, **kwargs)
        self._options, self.slack, self._weights_path = options, slack, load_weights
        self._undo_callbacks: Callable[[], None] = _nothing

    # ----- setup

    @override
    def setup(self, trainer: Trainer) -> None:
        self.check_built()
        if trainer.state.fn == TrainerFn.FITTING and self.num_stages > 1:
            assert self.lightning_module is not None
            module, replicas = self.lightning_module, self.data_parallel_size
            check_supported(trainer, module, self._virtual, self._options.backward, replicas)
            self.check_hyperparameters(module)
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
            self._undo_callbacks = adapt_callbacks(trainer, self)
            if self._is_pipeline:
                assert self._world is not None
                assert self._feed is not None
                self.signals = Signals(trainer, self, self._feed, self._world)
        is_fitting = trainer.state.fn == TrainerFn.FITTING
        if self.num_stages == 1 or is_fitting or not (self._is_pipeline or self.world_size == 1):
            super().setup(trainer)
            return
        assert self.lightning_module is not None
        with not_synchronised(self.lightning_module):  # as DDP does: buffers that modules cache may differ
            super().setup(trainer)
        self.agree_on_model()

    @override
    def configure_ddp(self) -> None:
        if self._is_pipeline:
            assert self.lightning_module is not None
            self.agree_on_model()
            shares = self.data_parallel_size > 1 and self._ddp_kwargs.get("broadcast_buffers", True)
            self._buffers = buffer_slots(self.lightning_module) if shares else []
            if self.data_parallel_size > 1 and self._ddp_comm_hook is not None:
                self.wrap_in_ddp(nn.Linear(1, 1, device=self.root_device))  # to see whether the hook is accepted
        elif self.world_size > 1:
            super().configure_ddp()

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        try:
            with in_hook():  # an optimizer that divides its work does so among the replicas
                super().setup_optimizers(trainer)
        except RuntimeError as error:
            if self.num_stages == 1 or "multiple optimizers" not in str(error):
                raise
            raise MisconfigurationException(SEVERAL_OPTIMIZERS) from None
        if self.num_stages > 1:
            check_optimizers([getattr(o, "_optimizer", o) for o in self.optimizers], self._virtual)

    # ----- training

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        runner = self.runner
        if self.num_stages > 1:
            self._num_steps += 1
            if self._num_steps > 1:
                raise MisconfigurationException(ONCE)
        module = self.lightning_module
        assert module is not None
        self._num_since_flush += not self._is_synchronous
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
                objects_of_now() if again else nullcontext(),
                clock_at(module.trainer, *moment),
            ):
                return module.training_step(*fresh(args), **fresh(kwargs))

        if runner.is_last:
            self.learned.before_step()
        # A step may take its batch apart; where it runs twice, it may not even change the tensors.
        runs_twice = self._options.backward != "stash"
        fresh = copied_tensors if runs_twice else partial(map_leaves, lambda leaf: leaf)
        objects_of_now = attributes_of_now(*objects_in((args, kwargs)) if runs_twice else ())

        is_first = module.trainer.fit_loop.batch_idx % module.trainer.accumulate_grad_batches == 0
        number = runner.num_forwards
        moment = module.global_step, module.current_epoch, module.trainer.fit_loop.batch_idx
        if runner.averaging is not None and is_first:  # as DDP does
            runner.averaging.share_buffers()
        with self.measuring("forward", number):
            result = runner.forward(step)
        if not runner.is_last:
            return runner.absent_loss
        self.learned.after_step()
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
            with (
                self.step_among_replicas(),
                self.averaging(),
                self.measuring("backward", runner.in_flight[0].batch),
            ):
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
        module = self.lightning_module
        assert module is not None
        runner, virtual = self.runner, self._virtual_stages
        if runner is None:
            with nullcontext() if virtual is None else after_clipping(module, virtual.tell_norms):
                return super().optimizer_step(optimizer, closure, model, **kwargs)
        result, calls = closure(), count()

        def closure_of_result() -> Any:
            if next(calls):
                raise MisconfigurationException(ONCE)
            return result

        exchange = partial(self._exchange_shared, optimizer)
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            with in_hook(), self.measuring("update", runner.num_forwards - 1), after_clipping(module, exchange):
                return super().optimizer_step(optimizer, closure_of_result, model, **kwargs)
        # No gradient is due yet, or nothing here is trained. A step without gradients changes nothing; clipping could
        # not cope with that, and a scheduler wants to see it.
        exchange()
        with in_hook():
            optimizer.step(closure_of_result)
        scaler = getattr(self.precision_plugin, "scaler", None)
        if isinstance(scaler, StageGradScaler) and runner.has_run_backward:
            scaler.update_without_gradients(optimizer)
        return result

    def _exchange_shared(self, optimizer: Optimizer) -> None:
        assert self.runner is not None
        self.runner.messages.tell_norms()
        if self.runner.messages.shared is not None:
            scaler = getattr(self.precision_plugin, "scaler", None)
            is_skipped = isinstance(scaler, StageGradScaler) and scaler.has_overflowed(optimizer)
            self.runner.messages.shared.exchange(is_skipped)

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
        self._num_since_flush = 0
        if stages is not None and stages.begin_flush():
            if not self._is_synchronous:  # or nothing is in flight
                flush_batches(self, stages)
            stages.end_flush()
            if self.runner is not None and self.runner.averaging is not None:
                self.runner.averaging.share_buffers()  # before an evaluation, as DDP does, and for what is saved
            self.rebalance()

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Flush, and give every process the whole model meanwhile. All stages must enter it at the same iteration."""
        self.flush()
        parts = self._pipeline or self._placement
        if parts is None:
            yield
            return
        with parts.whole_model(), self._interception.suspended():
            yield

    @contextmanager
    def whole_optimizers(self) -> Iterator[None]:
        """Let the groups of optimizers have all parameters meanwhile, for who looks which are in them."""
        if self._pipeline is not None:
            self._pipeline.unite_optimizers()
        yield
        if self._pipeline is not None:  # which may have other cuts now
            self._pipeline.divide_optimizers()

    def finish_training(self) -> None:
        """Flush and leave the whole model on every process, unless none may have it."""
        self.end_measuring()
        self.flush()
        if self._pipeline is not None:
            self._pipeline.close(stay_apart=self._placement is not None)
            self._interception.use(None)
        self._end_training()
        if self._feed is not None:
            self._feed.settle()

    # ----- the end

    @override
    def teardown(self) -> None:
        self._undo_callbacks()
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
