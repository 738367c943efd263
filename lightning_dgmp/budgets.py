"""How much memory a stage may take, and what decides how much it does, as far as a strategy knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_dgmp.options import Options
from lightning_dgmp.plan.memory import Budget
from lightning_dgmp.plan.state import state_bytes
from lightning_dgmp.world import World

__all__ = ["budget_of"]


def budget_of(
    options: Options,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    device: torch.device,
    world: World | None,
    num_gradients: int,
    precision: Any,
) -> Budget:
    """The budget of each stage: the least of what processes have. All of them must call it.

    Args:
        options: Those of the strategy.
        module: The LightningModule.
        optimizers: With all of its parameters.
        device: Of this process.
        world: All processes; ``None`` if there is one, which is not limited.
        num_gradients: How many there are of each parameter.
        precision: Lightning's name of it.
    """
    limit = options.memory_limit
    if world is not None:
        if limit is None and device.type == "cuda":
            limit = torch.cuda.get_device_properties(device).total_memory
        limits = world.all_gather(limit, "the memory of the devices")
        limit = min((one for one in limits if one is not None), default=None)
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    state = {
        names[parameter]: nbytes
        for optimizer in optimizers
        for parameter, nbytes in state_bytes(getattr(optimizer, "_optimizer", optimizer)).items()
        if parameter in names
    }
    is_on_host = device.type == "cpu"
    return Budget(limit, options.backward, state, num_gradients, not is_on_host, precision == "32-true")
