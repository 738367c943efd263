"""The queues of virtual stages follow the schedule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_dgmp.plan.plan import Plan
from lightning_dgmp.plan.table import StageSummary
from lightning_dgmp.schedule import delayed_schedule, delays_of
from lightning_dgmp.stage.virtual import GradientQueues


@pytest.mark.parametrize("num_batches", [1, 2, 9])
@pytest.mark.parametrize("num_stages", [1, 3, 4])
def test_queues_follow_the_schedule(num_stages: int, num_batches: int) -> None:
    parameters = [nn.Parameter(torch.zeros(())) for _ in range(num_stages)]
    delays = delays_of(num_stages)
    stages = {str(k): (k,) for k in range(num_stages)}
    plan = Plan(stages, {}, set(), [], [None] * num_stages, [StageSummary("", "", 0.0, 0, 0)] * num_stages)
    queues = GradientQueues({str(k): p for k, p in enumerate(parameters)}, plan)
    seen: list[list[int]] = [[] for _ in parameters]

    def note() -> None:
        for p, batches in zip(parameters, seen):
            if p.grad is not None:
                batches.append(int(p.grad))

    for batch in range(num_batches):
        for p in parameters:
            p.grad = torch.tensor(float(batch))
        queues.exchange()
        note()
        for k, stage in enumerate(delayed_schedule(delays, num_batches)):
            assert (parameters[k].grad is None) == (stage[batch].backward is None)
    while queues.num_waiting:
        for p in parameters:
            p.grad = None
        queues.drain(is_open=False)
        note()
    assert seen == [list(range(num_batches))] * num_stages
