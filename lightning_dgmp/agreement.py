"""All stages begin with the same plan, or all of them end with the reason."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence

from lightning_dgmp.plan.cut import PlanError
from lightning_dgmp.plan.plan import Plan
from lightning_dgmp.world import PeerError, World

__all__ = ["agree_on_plan"]


def agree_on_plan(make_plan: Callable[[], Plan], world: World, ranks: Sequence[int]) -> Plan:
    """Make the plan on every process and compare.

    Args:
        make_plan: Makes the plan of this process.
        world: All processes.
        ranks: The global rank of each stage of the replica.

    Raises:
        PeerError: If another process failed, with its traceback. The error of this process is raised as it is.
        PlanError: If the plans differ.
    """
    plan: Plan | None = None
    error: Exception | None = None
    try:
        plan = make_plan()
    except Exception as e:
        error = e
    mine = (
        None if plan is None else plan.digest(),
        None if error is None else "".join(traceback.format_exception(error)),
    )
    answers = world.all_gather(mine, "the plan", ranks)
    if error is not None:
        raise error
    for stage, (rank, (_, failure)) in enumerate(zip(ranks, answers)):
        if failure is not None:
            raise PeerError(f"Stage {stage} (rank {rank}) failed:\n{failure}")
    if len({digest for digest, _ in answers}) > 1:
        digests = ", ".join(f"rank {rank} has {digest}" for rank, (digest, _) in zip(ranks, answers))
        raise PlanError(
            f"All stages must make the same plan, but they disagree: {digests}. `training_step` ran differently on"
            " different processes: make it independent of the rank."
        )
    assert plan is not None
    return plan
