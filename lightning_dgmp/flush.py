"""The end of a stretch of training: what is in flight has its backward, without new forwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dgmp.host import Trainer, call

if TYPE_CHECKING:
    from lightning_dgmp.strategy import DelayedMPStrategy

__all__ = ["flush_batches"]


def flush_batches(
    strategy: DelayedMPStrategy, num_in_flight: Callable[[], int], backward: Callable[[bool, bool], None]
) -> None:
    """Run iterations without forwards until nothing is in flight, with a step where one is due and at the end.

    With accumulation over M batches the count goes on: a step is due when the first stage has the gradients of M.

    Args:
        strategy: Whose training this is.
        num_in_flight: Says how many batches have no backward yet.
        backward: ``backward(is_open, is_step)`` runs that of the oldest, if any; ``is_open``: there are gradients that
            wait for a step; ``is_step``: a step follows.
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
        backward(is_open, is_step)
        return strategy.precision_plugin.post_backward(torch.zeros((), device=strategy.root_device), module)

    for i in range(strategy.num_stages - 1):
        count += 1
        is_step = count % trainer.accumulate_grad_batches == 0 or i == strategy.num_stages - 2
        if is_step and (is_open or num_in_flight()):
            # Not by the user's `optimizer_step`, which may count or set learning rates: stages have some or none.
            optimizer.step(closure)
            is_open = False
        elif num_in_flight():
            closure()
            is_open = True
    if begun:  # Lightning goes on with the accumulation
        zero_grad()


def _num_accumulated(trainer: Trainer) -> int:
    """Over how many batches gradients have been accumulated since the last step."""
    if not trainer.fit_loop._should_accumulate():
        return 0
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.accumulate_grad_batches)
