"""All processes begin with the same model and the same plan, or all of them end with the reason."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dgmp.host import MisconfigurationException
from lightning_dgmp.plan.cut import PlanError
from lightning_dgmp.plan.plan import Plan
from lightning_dgmp.plan.restore import generators_in, get_state, set_state
from lightning_dgmp.stage.shadow import Shadow
from lightning_dgmp.world import PeerError, World

__all__ = ["agree_on_model", "agree_on_plan", "not_synchronised", "put_buffers"]

_IGNORED = "_ddp_params_and_buffers_to_ignore"  # as DDP calls it


def agree_on_model(module: nn.Module, world: World, ranks: Sequence[int], is_apart: bool = False) -> None:
    """Give every process the parameters and buffers of rank 0, as DDP does; not parameters that are nowhere yet.

    Buffers may differ in shape, or be missing: an evaluation makes those that modules cache on some ranks alone. Random
    generators that modules keep go on alike within a replica, of which ``ranks`` are. If each process has parameters of
    its own already (``is_apart``), these stay as they are.

    Raises:
        MisconfigurationException: If names, shapes or dtypes of parameters differ.
    """
    parameters = dict(module.named_parameters())
    mine = {name: f"a {tuple(tensor.shape)} {tensor.dtype} tensor" for name, tensor in parameters.items()}
    theirs = world.all_gather(mine if world.rank == 0 else None, "the model of rank 0")[0]
    for difference in world.all_gather(_difference(mine, theirs, world.rank), "the comparison of models"):
        if difference is not None:
            raise MisconfigurationException(
                f"All processes must make the same model, but {difference}. Make it independent of the rank."
            )
    for name in theirs:
        if not is_apart and not isinstance(parameters[name], Shadow):
            _broadcast(parameters[name], world)
    buffers = {path: m._buffers for path, m in module.named_modules() if m._buffers}
    device = next((p.device for p in parameters.values()), torch.device("cpu"))
    shared = world.share(buffers, "the buffers of rank 0", range(world.size), 0, device)
    if world.rank != 0:
        for path, entries in shared.items():
            put_buffers(module.get_submodule(path)._buffers, entries)
    generators = generators_in(module)
    states = [get_state(generator) for generator in generators]
    theirs = world.all_gather(states, "the states of random generators", ranks)[-1]
    if len(theirs) == len(states):
        for generator, state in zip(generators, theirs):
            set_state(generator, state)


def put_buffers(mine: dict[str, Tensor | None], theirs: Mapping[str, Tensor | None]) -> None:
    """Give the buffers of a module the values of another process: in place, or in the place of those that differ."""
    for name, value in theirs.items():
        buffer = mine.get(name)
        if buffer is not None and value is not None and _can_take(buffer, value):
            buffer.data.copy_(value)
        else:
            mine[name] = value


def _can_take(buffer: Tensor, value: Tensor) -> bool:
    if not buffer.layout == value.layout == torch.strided or buffer.dtype != value.dtype or buffer.shape != value.shape:
        return False
    return all(stride > 0 or n <= 1 for stride, n in zip(buffer.stride(), buffer.shape))  # or it overlaps itself


def _difference(mine: Mapping[str, str], theirs: Mapping[str, str], rank: int) -> str | None:
    name = next((name for name in [*theirs, *mine] if mine.get(name) != theirs.get(name)), None)
    if name is None:
        return None
    return f"`{name}` is {mine.get(name, 'missing')} on rank {rank} and {theirs.get(name, 'missing')} on rank 0"


@torch.no_grad()
def _broadcast(parameter: Tensor, world: World) -> None:
    dense = parameter.detach().contiguous()
    if not dense.numel():
        return
    group = world.group if dense.device.type == "cpu" else None
    work = dist.broadcast(dense.view(-1).view(torch.uint8), 0, group, async_op=True)  # of any dtype
    world.wait(work, "the weights of rank 0")
    if dense.data_ptr() != parameter.data_ptr():
        parameter.copy_(dense)


@contextmanager
def not_synchronised(module: nn.Module) -> Iterator[None]:
    """Let Lightning's DDP leave the parameters and buffers of ``module`` as they are."""
    names = [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
    before = module.__dict__.get(_IGNORED)
    module.__dict__[_IGNORED] = names
    try:
        yield
    finally:
        del module.__dict__[_IGNORED]
        if before is not None:
            module.__dict__[_IGNORED] = before


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
