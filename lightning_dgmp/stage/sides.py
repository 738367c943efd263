"""What each stage contributes to the gradients of shared parameters, apart, in one process.

For ``tied="ouroboros"``, where each contribution has a delay of its own. Autograd adds up what a parameter gets, so
each stage is given a clone of it, which is put in its place while the calls of that stage run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_dgmp.calls import ParameterSlots, intercepted_calls
from lightning_dgmp.ghost import GhostError
from lightning_dgmp.nests import map_leaves
from lightning_dgmp.plan.plan import Plan

__all__ = ["Sides"]


class Sides:
    """Keeps the contributions of the newest step.

    Args:
        root: The module that is trained.
        slots: Its parameters.
        plan: Which stages share which.
    """

    def __init__(self, root: nn.Module, slots: ParameterSlots, plan: Plan) -> None:
        self._root, self._slots, self._plan = root, slots, plan
        self._gradients: dict[tuple[str, int], Tensor] = {}

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step: let each stage have its own clones."""
        self._gradients = {}
        trained = {name: self._slots.parameters[name] for name in self._plan.shared}
        trained = {name: parameter for name, parameter in trained.items() if parameter.requires_grad}
        clones = {stage: {n: self._clone(n, p, stage) for n, p in trained.items()} for stage in self._stages()}
        counts: Counter[str] = Counter()
        is_inside = False

        def on_call(
            call: Callable[..., Any], module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            nonlocal is_inside
            if is_inside:
                return call(*args, **kwargs)
            owner = self._plan.owner(path, counts[path])
            counts[path] += 1
            if owner is None:
                return call(*args, **kwargs)
            of_step = {id(clone): clones[owner][name] for name, clone in clones[-1].items()}
            is_inside = True
            try:
                with self._slots.holding(clones[owner]):
                    return call(
                        *map_leaves(partial(_swap, of_step), args), **map_leaves(partial(_swap, of_step), kwargs)
                    )
            finally:
                is_inside = False

        with self._slots.holding(clones[-1]), intercepted_calls(self._root, on_call):
            yield

    def take(self) -> dict[tuple[str, int], Tensor]:
        """After the backward: the contributions, by parameter and stage.

        Raises:
            GhostError: If a shared parameter was used outside of the calls that stages own.
        """
        outside = [name for name, stage in self._gradients if stage < 0]
        if outside:
            raise GhostError(
                f"`tied='ouroboros'` must know which stage uses a shared parameter, but `{outside[0]}` is used outside"
                " of the modules that stages own, or in one of which several stages run parts. Use it in a module and"
                " cut elsewhere by `split_at`, or choose `tied='aligned'`."
            )
        return self._gradients

    def _stages(self) -> list[int]:
        return [-1, *range(self._plan.num_stages)]  # -1: what the step itself reads

    def _clone(self, name: str, parameter: nn.Parameter, stage: int) -> Tensor:
        clone = parameter.clone()
        clone.register_hook(partial(self._gradients.__setitem__, (name, stage)))
        return clone


def _swap(clones: Mapping[int, Tensor], leaf: Any) -> Any:
    return clones.get(id(leaf), leaf)
