"""What a process of the pipeline holds: its stage, its channels, its share of the weights and of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_dgmp.calls import ParameterSlots, custom_functions, data_assignments, intercepted_calls
from lightning_dgmp.checkpoint import OptimizerShards, WeightShards
from lightning_dgmp.plan.plan import Plan
from lightning_dgmp.stage.averaging import Averaging, BufferSlot
from lightning_dgmp.stage.runner import BackwardMode, StageRunner
from lightning_dgmp.stage.shared import SharedParameters
from lightning_dgmp.stage.skip import remove_ghosts
from lightning_dgmp.transport import Transport
from lightning_dgmp.wire import Wish
from lightning_dgmp.world import World

__all__ = ["Interception", "Pipeline"]


class Interception:
    """Who handles the calls of a module: one runner at a time, or none."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._stack = ExitStack()
        self._runner: StageRunner | None = None

    def use(self, runner: StageRunner | None) -> None:
        if runner is self._runner:
            return
        self._stack.close()
        self._runner = runner
        if runner is not None:
            self._stack.enter_context(intercepted_calls(self._module, runner.on_call, runner.watched))
            self._stack.enter_context(custom_functions(runner.on_function))
            self._stack.enter_context(data_assignments())
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))  # compilers cannot read ghosts

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let nobody handle them meanwhile."""
        runner = self._runner
        self.use(None)
        try:
            yield
        finally:
            self.use(runner)


class Pipeline:
    """One stage of a replica and all that belongs to it.

    All stages make it together. From then on a process has the values of its own parameters alone.

    Args:
        module: The LightningModule.
        optimizers: As the user made them, for all parameters.
        plan: The plan.
        group: The process group of the replica.
        world: All processes.
        transport: The channels of this stage.
        device: Where this stage lives.
        backward: What to keep of a batch until its backward.
        seed: Equal on all stages of the replica.
        first_batch: How many batches have been trained on before.
        message_dtype: Of floating point tensors on their way.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        plan: Plan,
        group: Any,
        world: World,
        transport: Transport,
        device: torch.device,
        backward: BackwardMode,
        seed: int,
        first_batch: int,
        message_dtype: torch.dtype | None = None,
    ) -> None:
        ranks = dist.get_process_group_ranks(group)[::-1]
        stage = ranks.index(dist.get_rank())
        slots = ParameterSlots(module)
        self._optimizers = [OptimizerShards(optimizer, slots, plan, stage, ranks, world) for optimizer in optimizers]
        transport.open(plan.edges())
        delay = plan.delays[stage]
        how = backward, seed, device, first_batch, message_dtype
        self.runner = runner = StageRunner(module, slots, plan, stage, delay, transport, *how)
        runner.optimizers = optimizers
        if plan.shared:
            runner.messages.shared = SharedParameters(plan, stage, runner.own, transport)
        self._weights = WeightShards(module, slots, plan, stage, ranks, group, world)
        self._weights.disperse()

    def average(
        self,
        group: dist.ProcessGroup,
        wrap: Callable[..., DistributedDataParallel],
        wait: Callable[[Any, str], None],
        buffers: Sequence[BufferSlot],
        agree: Callable[[Wish], Wish],
    ) -> None:
        """Average with other replicas from now on; see :class:`~lightning_dgmp.stage.averaging.Averaging`.

        Args:
            group: The process group of this stage in all replicas.
            wrap: Makes DDP of a module.
            wait: Waits for a collective in the group.
            buffers: Those, on all stages, of which all replicas use the values of the first one.
            agree: What wishes of this first stage become together with those of the others.
        """
        runner = self.runner
        owners = runner.plan.modules
        modules = {path: m for path, m in runner.root.named_modules() if owners.get(path) in (None, runner.stage)}
        copies = {} if runner.messages.shared is None else runner.messages.shared.copies  # the home averages for all
        own = [parameter for name, parameter in runner.own.items() if name not in copies]
        runner.averaging = Averaging(own, buffers, modules, group, wrap, wait, runner.device)
        runner.agree = agree

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Give every process all values meanwhile. Nothing may be in flight, and all stages must enter it."""
        if self.runner.whole:
            yield
            return
        self._weights.assemble()
        self.runner.whole = True
        try:
            yield
        finally:
            self.runner.whole = False
            self._weights.disperse()

    def optimizer_state(self, optimizer: Optimizer, only_own: bool = False) -> dict[str, Any] | None:
        """The state of ``optimizer``; ``None`` if it is not one of ours.

        That for all parameters, on the last stage, or that for the parameters of this stage by their names.
        """
        shards = next((s for s in self._optimizers if s.optimizer is optimizer), None)
        if shards is None:
            return None
        return shards.own_state_dict() if only_own else shards.state_dict()

    def own_state_dict(self) -> dict[str, Any]:
        """What this stage owns of the module's ``state_dict()``."""
        return self._weights.own_state_dict()

    def give_way(self) -> None:
        """Leave what a pipeline with another plan begins with, the parameters apart. All stages must call it."""
        remove_ghosts(self.runner.root)
        self._weights.share_buffers()
        self.unite_optimizers()

    def unite_optimizers(self) -> None:
        """Let the groups of optimizers have all parameters."""
        for shards in self._optimizers:
            shards.unite()

    def divide_optimizers(self) -> None:
        """Leave in them those of this stage."""
        for shards in self._optimizers:
            shards.divide()

    def load_optimizers(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Load what checkpoints have of the optimizers, this stage's part of it."""
        for shards, state in zip(self._optimizers, states):
            shards.load(state)

    def close(self, stay_apart: bool = False) -> None:
        """Give every process all values for good, or if parameters stay apart all buffers. Nothing may be in flight."""
        remove_ghosts(self.runner.root)
        if stay_apart:
            self._weights.share_buffers()
        elif not self.runner.whole:
            self._weights.assemble()
            self.runner.whole = True
