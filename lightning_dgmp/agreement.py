"""All stages begin with the same batch and the same plan, or all of them end with the reason."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_dgmp.nests import tensors_in
from lightning_dgmp.plan.cut import PlanError
from lightning_dgmp.plan.plan import Plan
from lightning_dgmp.world import PeerError, World

__all__ = ["agree_on_plan"]


def agree_on_plan(make_plan: Callable[[], Plan], batch: Any, world: World, ranks: Sequence[int]) -> Plan:
    """Make the plan on every process and compare.

    Args:
        make_plan: Makes the plan of this process.
        batch: The batch on which it is made.
        world: All processes.
        ranks: The global rank of each stage of the replica.

    Raises:
        PeerError: If another process failed, with its traceback. The error of this process is raised as it is.
        PlanError: If the batches or the plans differ.
    """
    plan: Plan | None = None
    error: Exception | None = None
    try:
        plan = make_plan()
    except Exception as e:
        error = e
    mine = (
        None if plan is None else plan.digest(),
        _fingerprint(batch),
        None if error is None else "".join(traceback.format_exception(error)),
    )
    answers = world.all_gather(mine, "the plan", ranks)
    if error is not None:
        raise error
    for stage, (rank, (_, _, failure)) in enumerate(zip(ranks, answers)):
        if failure is not None:
            raise PeerError(f"Stage {stage} (rank {rank}) failed:\n{failure}")
    if len({fingerprint for _, fingerprint, _ in answers}) > 1:
        raise PlanError(
            "All stages must see the same batches, but their first batches differ. The data are random or depend on the"
            " rank: seed them alike on all processes, for example with `seed_everything(0)`."
        )
    if len({digest for digest, _, _ in answers}) > 1:
        digests = ", ".join(f"rank {rank} has {digest}" for rank, (digest, _, _) in zip(ranks, answers))
        raise PlanError(
            f"All stages must make the same plan, but they disagree: {digests}. `training_step` ran differently on"
            " different processes: make it independent of the rank."
        )
    assert plan is not None
    return plan


def _fingerprint(batch: Any) -> str:
    """A digest of what is in the tensors of a batch, up to a million elements each."""
    digest = hashlib.sha256()
    for tensor in tensors_in(batch):
        flat = tensor.detach().flatten()[: 2**20].cpu().contiguous()
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
