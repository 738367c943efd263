"""All processes begin with the same model and the same plan, or all of them end with the reason."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dgmp.host import MisconfigurationException
from lightning_dgmp.nests import Form
from lightning_dgmp.plan.cut import PlanError
from lightning_dgmp.plan.plan import Plan
from lightning_dgmp.world import PeerError, World

__all__ = ["agree_on_model", "agree_on_plan"]


def agree_on_model(module: nn.Module, world: World) -> None:
    """Give every process the parameters and buffers of rank 0, as DDP does.

    Raises:
        MisconfigurationException: If their names, shapes or dtypes differ.
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    mine = {name: f"a {tuple(tensor.shape)} {tensor.dtype} tensor" for name, tensor in tensors.items()}
    theirs = world.all_gather(mine if world.rank == 0 else None, "the model of rank 0")[0]
    for difference in world.all_gather(_difference(mine, theirs, world.rank), "the comparison of models"):
        if difference is not None:
            raise MisconfigurationException(
                f"All processes must make the same model, but {difference}. Make it independent of the rank."
            )
    for name in theirs:
        if tensors[name].layout == torch.strided:
            _broadcast(tensors[name], world)
    for entries in (m._buffers for m in module.modules()):
        for name, buffer in entries.items():
            if buffer is not None and buffer.layout != torch.strided:
                shared = world.share(buffer, "the buffers of rank 0", range(world.size), 0, buffer.device)
                entries[name] = shared.to(buffer.device)


def _difference(mine: Mapping[str, str], theirs: Mapping[str, str], rank: int) -> str | None:
    name = next((name for name in [*theirs, *mine] if mine.get(name) != theirs.get(name)), None)
    if name is None:
        return None
    return f"`{name}` is {mine.get(name, 'missing')} on rank {rank} and {theirs.get(name, 'missing')} on rank 0"


@torch.no_grad()
def _broadcast(tensor: Tensor, world: World) -> None:
    dense = tensor.detach().contiguous()
    if not dense.numel():
        return
    group = world.group if dense.device.type == "cpu" else None
    work = dist.broadcast(dense.view(-1).view(torch.uint8), 0, group, async_op=True)  # of any dtype
    world.wait(work, "the weights of rank 0")
    if dense.data_ptr() != tensor.data_ptr():
        tensor.data = Form(tensor).lay_out(dense)


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
            f"All stages must make the same plan, but they disagree: {digests}. `training_step`, or a"
            " module that it calls, ran differently on different processes: make it independent of the rank."
        )
    assert plan is not None
    return plan
