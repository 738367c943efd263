"""The end of a stretch of training: what is in flight has its backward, without new forwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dgmp.host import Trainer, call

if TYPE_CHECKING:
    from lightning_dgmp.stage.runner import StageRunner
    from lightning_dgmp.stage.virtual import VirtualStages
    from lightning_dgmp.strategy import DelayedMPStrategy

__all__ = ["flush_batches"]


def flush_batches(strategy: DelayedMPStrategy, stages: StageRunner | VirtualStages) -> None:
    """Run iterations without forwards until nothing is in flight, with a step where one is due and at the end.

    With accumulation over M batches the count goes on: a step is due when the first stage has the gradients of M.

    Args:
        strategy: Whose training this is.
        stages: What has batches in flight.
    """
    module = strategy.lightning_module
    assert module is not None
    trainer = module.trainer
    optimizer = strategy._lightning_optimizers[0]
    begun = count = _num_accumulated(trainer)
    is_open, is_step = begun > 0, False

    def zero_grad() -> None:
        where = trainer.current_epoch, trainer.fit_loop.batch_idx
        call._call_lightning_module_hook(trainer, "optimizer_zero_grad", *where, optimizer)

    @torch.enable_grad()
    def closure() -> Tensor:
        if not is_open:
            zero_grad()
        with strategy.step_among_replicas(), strategy.averaging():
            stages.drain(is_open, is_step)
        return strategy.precision_plugin.post_backward(torch.zeros((), device=strategy.root_device), module)

    num_iterations = strategy.plan.delays[0]
    for i in range(num_iterations):
        count += 1
        is_step = count % trainer.accumulate_grad_batches == 0 or i == num_iterations - 1
        if is_step and (is_open or stages.num_in_flight):
            # Not by the user's `optimizer_step`, which may count or set learning rates: stages have some or none.
            optimizer.step(closure)
            is_open = False
        elif stages.num_in_flight:
            closure()
            is_open = True
    if begun:  # Lightning goes on with the accumulation
        zero_grad()


def _num_accumulated(trainer: Trainer) -> int:
    """Over how many batches gradients have been accumulated since the last step."""
    if not trainer.fit_loop._should_accumulate():
        return 0
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.accumulate_grad_batches)
