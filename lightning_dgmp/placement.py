"""The parameters of a module that no process ever holds as a whole: first nowhere, then each on its stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dgmp.calls import ParameterSlots, intercepted_calls
from lightning_dgmp.checkpoint import WeightShards
from lightning_dgmp.deferred import Recording
from lightning_dgmp.ghost import GhostError, GhostRead
from lightning_dgmp.later import read_all
from lightning_dgmp.operations import GhostMode
from lightning_dgmp.plan.plan import Plan
from lightning_dgmp.rebalancing import move_parameters
from lightning_dgmp.stage.shadow import Shadow, cast_shadow, restore, taking_copies
from lightning_dgmp.world import World

__all__ = ["Placement", "await_values"]

await_values = partial(cast_shadow, whose="a parameter that is made when the first batch shows where its stage is")


_NO_WEIGHTS = (
    "The module has no weights yet: they are made with the first batch, which shows where its stages are. Save it, or"
    " look at it, after that."
)


class Placement:
    """Says where parameters are, and makes them there. All stages must do the same with it.

    Args:
        root: The module.
        recordings: Of how its parameters are made.
        stage: The stage of this process.
        ranks: The global rank of each stage of the replica.
        group: Their process group.
        world: All processes.
    """

    def __init__(
        self,
        root: nn.Module,
        recordings: Sequence[Recording],
        stage: int,
        ranks: Sequence[int],
        group: Any,
        world: World,
    ) -> None:
        self.root = root
        self.plan: Plan | None = None  # by which parameters are where they are
        self._where = stage, ranks, group, world
        self.recordings = [recording for recording in recordings if recording.parameters]
        self._given: dict[nn.Parameter, Tensor] = {}
        self._calls = ExitStack()
        own = set(root.parameters())
        for recording in self.recordings:  # what is hidden from `named_parameters()` is everywhere
            self._make(recording, [p for p in recording.parameters if p not in own])

    @property
    def awaited(self) -> set[str]:
        """The names of parameters that this process does not have."""
        parameters = self.root.named_parameters(remove_duplicate=False)
        return {name for name, parameter in parameters if isinstance(parameter, Shadow)}

    def begin(self) -> None:
        """Let calls of the module before any step, as that of a summary, work on shapes."""
        self.end()
        self._calls.enter_context(intercepted_calls(self.root, self._on_call, [""]))

    def end(self) -> None:
        """Let calls be what they are."""
        self._calls.close()

    def _on_call(
        self, call: Callable[..., Any], module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not any(isinstance(parameter, Shadow) for parameter in module.parameters()):  # a step is being traced
            return call(*args, **kwargs)
        slots, ghosts = ParameterSlots(module), GhostMode()
        held = {name: ghosts.like(p, name, False, p.device) for name, p in slots.parameters.items()}
        try:
            with slots.holding(held):
                return call(*args, **kwargs)
        except GhostRead as read:
            raise GhostError(f"{_NO_WEIGHTS} ({read})") from None

    @property
    def loaded(self) -> set[nn.Parameter]:
        """Parameters that no process has yet, and whose values were in a checkpoint."""
        return set(self._given)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool) -> None:
        """Load what this process has, and remember where the values are of what it does not have yet."""

        def take(shadow: Shadow, value: Tensor) -> None:
            if self.plan is None:
                self._given[shadow] = value

        awaited = self.awaited
        here = read_all({key: value for key, value in state.items() if key not in awaited})
        with taking_copies(take):
            self.root.load_state_dict({**state, **here}, strict=strict)

    def place(self, plan: Plan, optimizers: Sequence[Optimizer] = ()) -> None:
        """Let each process have the parameters that ``plan`` gives to its stage, and no others."""
        self.end()
        stage, ranks, _, world = self._where
        slots = ParameterSlots(self.root)
        if self.plan is None:
            own = {p for name, p in slots.parameters.items() if stage in plan.stage_of(name) and isinstance(p, Shadow)}
            given = {p: value for p, value in self._given.items() if p in own}
            for parameter, value in read_all(given).items():
                restore(parameter)
                with torch.no_grad():
                    parameter.copy_(value)
            for recording in self.recordings:
                self._make(recording, [p for p in recording.parameters if p in own and p not in given])
            self._given, self.recordings = {}, []
        elif any(plan.stage_of(name) != self.plan.stage_of(name) for name in slots.parameters):
            self._weights.share_buffers()
            move_parameters(slots, optimizers, self.plan, plan, stage, ranks, world)
        self.plan = plan
        self._weights.disperse()

    @staticmethod
    def _make(recording: Recording, parameters: list[nn.Parameter]) -> None:
        for parameter, value in zip(parameters, recording.make(parameters)):
            restore(parameter, value)

    @property
    def _weights(self) -> WeightShards:
        if self.plan is None:
            raise RuntimeError(_NO_WEIGHTS)
        return WeightShards(self.root, ParameterSlots(self.root), self.plan, *self._where)

    def own_state_dict(self) -> dict[str, Any]:
        """What this stage owns of the module's ``state_dict()``."""
        return self._weights.own_state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The module's ``state_dict()`` on the last stage; ``{}`` elsewhere."""
        _, ranks, _, world = self._where
        parts = world.gather(self.own_state_dict(), "the collecting of weights", ranks, ranks[-1])
        if parts is None:
            return {}
        found = {key: value for part in parts for key, value in part.items()}
        return {key: found[key] for key in self.root.state_dict() if key in found}

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Give every process all values meanwhile."""
        weights = self._weights
        weights.assemble()
        try:
            yield
        finally:
            weights.disperse()
