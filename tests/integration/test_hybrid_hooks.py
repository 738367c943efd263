"""Communication hooks of DDP on delayed gradients: what they get, how often, and while what goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from tests import models
from tests.integration.test_hybrid import ThawsTheEnd, assert_agree, fit_on
from tests.pool import Failure, WorkerPool
from tests.training import Outcome, fit


def fit_with_hook(
    hook: Any, wrapper: Any = None, state: Any = None, num_stages: int = 2, module: Any = models.MLP, **kwargs: Any
) -> Outcome:
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2) if state else None
    hooks = {"ddp_comm_hook": hook, "ddp_comm_wrapper": wrapper, "ddp_comm_state": state}
    buckets = {"bucket_cap_mb": kwargs.pop("bucket_cap_mb", None)}
    return fit(module, models.vectors, {"num_stages": num_stages, **hooks, **buckets}, 2 * num_stages, **kwargs)


@pytest.mark.parametrize(
    ("hook", "wrapper", "state", "tolerance"),
    [
        (default_hooks.fp16_compress_hook, None, False, 1e-3),
        (default_hooks.allreduce_hook, default_hooks.fp16_compress_wrapper, False, 1e-3),
        (powerSGD_hook.powerSGD_hook, None, True, 0.1),
    ],
    ids=["fp16", "wrapper", "powerSGD"],
)
def test_communication_hooks(pool: WorkerPool, hook: Any, wrapper: Any, state: bool, tolerance: float) -> None:
    expected = fit_on(pool, 2, 2)[0]
    outcomes = pool.run(fit_with_hook, 4, hook, wrapper, state)
    assert_agree(outcomes)
    differences = [(outcomes[0].state[name] - value).abs().max().item() for name, value in expected.state.items()]
    assert 1e-7 < max(differences) < tolerance


largest: list[float] = []


def note_largest(state: Any, bucket: Any) -> Any:
    largest.append(float(bucket.buffer().abs().max()))
    return default_hooks.allreduce_hook(None, bucket)


note_largest.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}  # checked by DDP


def largest_in_buckets() -> list[float]:
    largest.clear()
    fit_with_hook(note_largest)
    return list(largest)


def test_powersgd_knows_its_buckets(pool: WorkerPool) -> None:
    for result in pool.try_run(fit_with_hook, 4, powerSGD_hook.powerSGD_hook, None, True, module=ThawsTheEnd):
        assert "`powerSGD_hook` needs the same trained parameters all the time" in result.message


events: list[str] = []


def note_reduction(state: Any, bucket: Any) -> Any:
    events.append("reduction")
    return default_hooks.allreduce_hook(None, bucket)


note_reduction.__annotations__ = note_largest.__annotations__


class NotesGradients(models.MLP):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(depth=6, width=64, **kwargs)

    def on_fit_start(self) -> None:
        for name, parameter in self.named_parameters():
            parameter.register_hook(lambda grad, name=name: events.append(name))


def order_of_events(accumulate: int, **kwargs: Any) -> list[str]:
    events.clear()
    args = {"accumulate_grad_batches": accumulate, "limit_train_batches": 8, "max_epochs": 1}
    fit_with_hook(note_reduction, module=NotesGradients, **args, **kwargs)
    return list(events)


def test_replicas_reduce_once_an_update(pool: WorkerPool) -> None:
    """Of 8 batches by fours; on a first stage the last one comes in the flush, and has an update for itself."""
    assert [seen.count("reduction") for seen in pool.run(order_of_events, 4, 4)] == [2, 3, 2, 3]
    assert [seen.count("reduction") for seen in pool.run(order_of_events, 4, 1)] == [8] * 4


def test_replicas_reduce_while_a_delayed_backward_goes_on(pool: WorkerPool) -> None:
    seen = pool.run(order_of_events, 4, 1, bucket_cap_mb=0.02)[1]  # of a first stage
    last = max(i for i, event in enumerate(seen) if event == "inp.weight")  # the end of a backward
    begin = max(i for i, event in enumerate(seen[:last]) if event == "inp.weight")
    assert "reduction" in seen[begin + 2 : last - 2], seen[begin : last + 2]


def test_hooks_see_gradients_alone(pool: WorkerPool) -> None:
    assert max(max(seen) for seen in pool.run(largest_in_buckets, 4)) < 0.9


def test_a_hook_that_needs_nccl(pool: WorkerPool) -> None:
    for result in pool.try_run(fit_with_hook, 4, default_hooks.bf16_compress_hook):
        assert isinstance(result, Failure)
        assert result.type == MisconfigurationException.__name__
        assert "The communication hook `bf16_compress_hook` does not work here" in result.message
        assert "NCCL" in result.message
