"""The whole model from its parts: for checkpoints, for validation, and for the end of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dgmp.agreement import put_buffers
from lightning_dgmp.calls import ParameterSlots
from lightning_dgmp.host import MisconfigurationException
from lightning_dgmp.later import read_all
from lightning_dgmp.plan.plan import Plan
from lightning_dgmp.stage.shadow import Shadow, cast_shadow, restore
from lightning_dgmp.world import World

__all__ = ["OptimizerShards", "WeightShards"]


class WeightShards:
    """The parameters and buffers of a module, of which each stage owns some.

    Args:
        root: The module.
        slots: Its parameters.
        plan: Who owns what.
        stage: The stage of this process.
        ranks: The global rank of each stage of this replica.
        group: Their process group.
        world: All processes.
    """

    def __init__(
        self,
        root: nn.Module,
        slots: ParameterSlots,
        plan: Plan,
        stage: int,
        ranks: Sequence[int],
        group: Any,
        world: World,
    ) -> None:
        self._ranks, self._group, self._world, self._stage = ranks, group, world, stage
        self._owners = {name: plan.stage_of(name)[0] for name in slots.parameters}
        self._parameters, self._names = slots.parameters, slots.names
        self._foreign = {name for name in slots.parameters if stage not in plan.stage_of(name)}
        self._root, self._modules = root, plan.modules

    def disperse(self) -> None:
        """Keep the values of this stage alone; the other parameters become shadows."""
        for name in self._foreign:
            if not isinstance(self._parameters[name], Shadow):
                cast_shadow(self._parameters[name], f"`{name}` of stage {self._owners[name]}")

    def own_state_dict(self) -> dict[str, Any]:
        """The part of the module's ``state_dict()`` that this stage owns."""
        state = self._root.state_dict()
        for path, module in self._root.named_modules():
            prefix = f"{path}." if path else ""
            owner = self._owner_of_buffers(path)
            for name, parameter in module._parameters.items():
                if parameter is not None and self._owners[self._names[parameter]] != self._stage:
                    state.pop(prefix + name, None)
            for name in module._buffers:
                if owner != self._stage:
                    state.pop(prefix + name, None)
        return state

    def _owner_of_buffers(self, path: str) -> int:
        owner = self._modules.get(path)
        return len(self._ranks) - 1 if owner is None else owner

    def assemble(self) -> None:
        """Give every process all values. All stages must call it."""
        for name, parameter in self._parameters.items():
            if isinstance(parameter, Shadow):
                restore(parameter)
            self._broadcast(parameter.data, self._owners[name])
        self.share_buffers()

    def share_buffers(self) -> None:
        """Give every process all buffers. All stages must call it."""
        for stage in range(len(self._ranks)):
            self._share_buffers(stage)

    def _share_buffers(self, stage: int) -> None:
        """Give every process the buffers of ``stage``, whose shapes may have changed; the last has those of no one."""
        owned = {
            path: module._buffers
            for path, module in self._root.named_modules()
            if module._buffers and self._owner_of_buffers(path) == stage
        }
        device = next((b.device for b in self._root.buffers()), torch.device("cpu"))
        shared = self._world.share(owned, "the collecting of buffers", self._ranks, self._ranks[stage], device)
        if stage == self._stage:
            return
        for path, entries in shared.items():
            put_buffers(self._root.get_submodule(path)._buffers, entries)

    def _broadcast(self, tensor: Tensor, owner: int) -> None:
        dense = tensor.contiguous()
        work = dist.broadcast(dense, self._ranks[owner], group=self._group, async_op=True)
        self._world.wait(work, "the collecting of weights")
        if dense is not tensor:
            tensor.copy_(dense)


class OptimizerShards:
    """An optimizer of which each stage updates its own parameters.

    Args:
        optimizer: As the user made it, for all parameters. The parameters of other stages, and what it remembers about
            them, are taken out; groups and their order stay.
        slots: The parameters of the module.
        plan: Who owns what.
        stage: The stage of this process.
        ranks: The global rank of each stage of the replica; the last one collects the state.
        world: All processes.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        slots: ParameterSlots,
        plan: Plan,
        stage: int,
        ranks: Sequence[int],
        world: World,
    ) -> None:
        self.optimizer, self._ranks, self._world = optimizer, ranks, world
        self._slots, self._plan, self._stage = slots, plan, stage
        self._names: list[list[str]] = []
        self._own: list[str] = []
        if keys := set(optimizer.state_dict()) - {"state", "param_groups"}:
            raise MisconfigurationException(
                "`strategy='delayed_mp'` needs an optimizer whose `state_dict()` has `state`, by parameters, and"
                f" `param_groups` alone, but that of `{type(optimizer).__name__}` has {sorted(map(str, keys))}: a stage"
                " would save what it knows of its own parameters as if it were of all. Use another optimizer, without a"
                " wrapper as for averages of weights, or `virtual=True`."
            )
        self.divide()

    def divide(self) -> None:
        """Take what is of other stages out of the groups that are new, as those of finetuning callbacks."""
        for param_group in self.optimizer.param_groups[len(self._names) :]:
            known = {name for names in self._names for name in names}  # of others; who adds them again cannot see them
            names = [name for p in param_group["params"] if (name := self._name(p)) not in known]
            own = [name for name in names if self._stage in self._plan.stage_of(name)]
            self._names.append(names)
            self._own += own
            param_group["params"] = [self._slots.parameters[name] for name in own]
        for name, parameter in self._slots.parameters.items():
            if self._stage not in self._plan.stage_of(name):
                self.optimizer.state.pop(parameter, None)

    def unite(self) -> None:
        """Put all parameters into the groups again, until they are divided."""
        self.divide()
        for param_group, names in zip(self.optimizer.param_groups, self._names):
            param_group["params"] = [self._slots.parameters[name] for name in names]
        self._names, self._own = [], []

    def load(self, state: Mapping[str, Any]) -> None:
        """Load what ``state``, of all parameters in the user's order, has of those of this stage."""
        self.divide()
        keys = [key for group in state["param_groups"] for key in group["params"]]
        saved = dict(zip([name for names in self._names for name in names], keys))
        local = self.optimizer.state_dict()
        own = {i: state["state"][key] for i, name in enumerate(self._own) if (key := saved[name]) in state["state"]}
        self.optimizer.load_state_dict({**local, "state": read_all(own)})

    def _name(self, parameter: nn.Parameter) -> str:
        if parameter not in self._slots.names:
            raise MisconfigurationException(
                "The optimizer must update parameters of the LightningModule, but one of shape"
                f" {tuple(parameter.shape)} does not belong to it, so no stage owns it. Register it as an attribute."
            )
        return self._slots.names[parameter]

    def own_state_dict(self) -> dict[str, Any]:
        """The state of this stage's parameters by their names, and the groups of all; nobody is asked."""
        self.divide()
        local = self.optimizer.state_dict()
        groups = [{**saved, "params": names} for saved, names in zip(local["param_groups"], self._names)]
        named = {self._own[i]: state for i, state in local["state"].items()}
        homed = {name: state for name, state in named.items() if self._plan.stage_of(name)[0] == self._stage}
        return {"state": homed, "param_groups": groups}

    def state_dict(self) -> dict[str, Any]:
        """The state for all parameters in the user's order, on the collecting rank; ``{}`` elsewhere.

        All stages must call it.
        """
        own, what = self.own_state_dict(), "the collecting of the optimizer's state"
        parts = self._world.gather(own["state"], what, self._ranks, self._ranks[-1])
        if parts is None:
            return {}
        states = {name: state for part in parts for name, state in part.items()}
        order = [name for names in self._names for name in names]
        indices = iter(range(len(order)))
        groups = [{**group, "params": [next(indices) for _ in group["params"]]} for group in own["param_groups"]]
        numbered = {i: states[name] for i, name in enumerate(order) if name in states}
        return {"state": numbered, "param_groups": groups}
