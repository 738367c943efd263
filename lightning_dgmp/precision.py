"""Loss scales for `16-mixed`: the last stage owns the scale, and gradients carry the one that made them.

A gradient is applied iterations after its loss was scaled, and the scale may be another one by then. So the errors of a
batch bring its scale; each stage divides its gradients by that, and skips an update whose gradients have overflowed.
The scale that overflowed travels to the last stage with the next activations, which backs off if its own scale is not
smaller already. Nobody waits.

The classes are scalers of torch that Lightning's precision plugin uses in the place of its own. They touch the private
parts ``_scale``, ``_growth_tracker``, ``_per_optimizer_states`` and ``_unscale_grads_`` of ``GradScaler``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from typing_extensions import override

__all__ = ["StageGradScaler", "VirtualGradScaler"]


class _DelayedGradScaler(GradScaler):
    """What scalers of stages have in common.

    Args:
        scaler: Whose settings and state to take.
    """

    def __init__(self, scaler: GradScaler) -> None:
        state = scaler.state_dict()
        names = "growth_factor", "backoff_factor", "growth_interval"
        super().__init__(scaler._device, state["scale"], **{name: state[name] for name in names})
        self._init_growth_tracker = state["_growth_tracker"]
        #: The smallest scale that has overflowed on an earlier stage, or was told to have; infinite: none.
        self.overflow = torch.tensor(math.inf, device=scaler._device)

    @property
    def scale_here(self) -> Tensor:
        """The scale of the gradients that are here, as a tensor of one number."""
        if self._scale is None:
            self._lazy_init_scale_growth_tracker(torch.device(self._device))
        assert self._scale is not None
        return self._scale

    def _update_of_owner(self, optimizer: Optimizer | None = None) -> None:
        """Update the scale by what this stage has found, and by what others have told.

        Args:
            optimizer: If it has made no step with gradients here.
        """
        told = (self.overflow <= self.scale_here).float()
        states = self._per_optimizer_states
        state = next(iter(states.values())) if optimizer is None else states[id(optimizer)]
        state["found_inf_per_device"]["told"] = told
        self.overflow = torch.full_like(self.overflow, math.inf)
        super().update()

    def settle(self) -> None:
        """At a flush: back off at once if others have told of an overflow. For the owner of the scale."""
        if bool(self.overflow <= self.scale_here):
            self.scale_here.mul_(self._backoff_factor)
            assert self._growth_tracker is not None
            self._growth_tracker.zero_()
        self.overflow = torch.full_like(self.overflow, math.inf)


class StageGradScaler(_DelayedGradScaler):
    """The scaler of one stage; its scale is that of the gradients which are due.

    Args:
        scaler: Whose settings and state to take.
        is_owner: Whether this is the last stage.
        copies: Parameters whose gradients are made by another stage, which decides about their update.
    """

    def __init__(self, scaler: GradScaler, is_owner: bool, copies: Sequence[nn.Parameter] = ()) -> None:
        super().__init__(scaler)
        self._is_owner, self._copies = is_owner, copies

    @property
    def scale_now(self) -> Tensor | None:
        """By what the gradients are scaled now; ``None`` once the scale is removed."""
        states = [state["stage"] for state in self._per_optimizer_states.values()]
        return self.scale_here if all(stage is type(stage).READY for stage in states) else None

    def use(self, scale: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """Take over the ``scale`` of the next backward; gradients that wait for more get it too."""
        grads, factor = [p.grad for p in parameters if p.grad is not None], scale / self.scale_here
        if grads:
            torch._foreach_mul_(grads, factor)
        self._scale = scale.clone()

    def update_without_gradients(self, optimizer: Optimizer) -> None:
        """As ``update``, after a step of ``optimizer`` for which this stage has no gradients of its own."""
        if self._is_owner:
            self._update_of_owner(optimizer)

    def tell(self) -> Tensor:
        """The smallest scale that has overflowed since the last time, here or earlier."""
        told, self.overflow = self.overflow, torch.full_like(self.overflow, math.inf)
        return told

    def hear(self, overflow: Tensor) -> None:
        """Take what the stage before has told."""
        self.overflow = torch.minimum(self.overflow, overflow)

    def has_overflowed(self, optimizer: Optimizer) -> bool:
        """Remove the scale, if that is not done yet, and say whether gradients of this stage are not finite."""
        state = self._per_optimizer_states[id(optimizer)]
        has_gradients = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        if has_gradients and state["stage"] is type(state["stage"]).READY:
            self.unscale_(optimizer)
        return any(found.item() for found in state["found_inf_per_device"].values())

    @override
    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        if self._copies and self.has_overflowed(optimizer):  # the step is for the copies alone
            self.overflow = torch.minimum(self.overflow, self.scale_here)
            copies = {id(copy) for copy in self._copies}
            for parameter in (p for group in optimizer.param_groups for p in group["params"] if id(p) not in copies):
                parameter.grad = None
            founds = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
            founds.update({device: torch.zeros_like(found) for device, found in founds.items()})
        return super().step(optimizer, *args, **kwargs)

    @override
    def update(self, new_scale: Any = None) -> None:
        if new_scale is not None:
            super().update(new_scale)
        elif self._is_owner:
            self._update_of_owner()
        else:
            founds = [f for s in self._per_optimizer_states.values() for f in s["found_inf_per_device"].values()]
            found = torch.stack(founds).sum() > 0
            self.overflow = torch.where(found, torch.minimum(self.overflow, self.scale_here), self.overflow)
            super().update(self.scale_here)


class VirtualGradScaler(_DelayedGradScaler):
    """The scaler of all stages in one process.

    Each batch is scaled as the last stage scales it, and its gradients lose the scale before they wait. What has
    overflowed is found when it is due, as by the stages.

    Args:
        scaler: Whose settings and state to take.
        stages: The parameters of each stage.
    """

    def __init__(self, scaler: GradScaler, stages: Sequence[Sequence[nn.Parameter]]) -> None:
        super().__init__(scaler)
        self._stages = stages
        none = torch.full_like(self.overflow, math.inf)
        self._scales = [none] * len(stages)  # of the gradients that are due on each stage
        self._found = none  # in this iteration
        self._owner_has_found: Tensor | None = None  # in this update, if it has one
        self._owner_is_due = False

    def remove_scale(self) -> Tensor:
        """Divide the gradients that a backward has left by the scale; returns the scale, to wait with them."""
        self._divide([p for own in self._stages for p in own], self.scale_here)
        return self.scale_here.clone()

    def begin(self) -> None:
        """Before an iteration, and at the end of a flush: what was found in the last one is told."""
        self.overflow, self._found = torch.minimum(self.overflow, self._found), torch.full_like(self._found, math.inf)

    def use(self, scales: Sequence[Tensor | None]) -> None:
        """Take over the scales of the gradients that are due now on each stage, if any."""
        self._scales = [old if new is None else new for old, new in zip(self._scales, scales)]
        self._owner_is_due = scales[-1] is not None

    def _divide(self, parameters: Sequence[nn.Parameter], scale: Tensor) -> Tensor:
        """Divide gradients; returns a number above zero if one of them is not finite."""
        found = torch.zeros((), device=self._device)
        group = SimpleNamespace(param_groups=[{"params": parameters}])
        founds = self._unscale_grads_(group, scale.double().reciprocal().float(), found, False)  # type: ignore[arg-type]
        return sum(founds.values(), found)

    @override
    def unscale_(self, optimizer: Optimizer) -> None:
        state, ones = self._per_optimizer_states[id(optimizer)], torch.ones_like(self.scale_here)
        owned = self._stages[-1]
        has_update = any(p.grad is not None for p in owned)
        self._owner_has_found = None
        for own, scale in zip(self._stages, self._scales):
            found = self._divide(own, ones)
            if own is owned:
                found_none = torch.zeros_like(found) if self._owner_is_due else None
                self._owner_has_found = found if has_update else found_none
            if bool(found):
                self._found = self._found if own is owned else torch.minimum(self._found, scale)
                for parameter in own:  # so that its optimizer skips it
                    parameter.grad = None
        state["found_inf_per_device"] = {ones.device: torch.zeros_like(ones)}
        state["stage"] = type(state["stage"]).UNSCALED

    @override
    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is type(state["stage"]).READY:
            self.unscale_(optimizer)
        kept, self._scale = self._scale, torch.ones_like(self.scale_here)  # for those that divide by it themselves
        try:
            return super().step(optimizer, *args, **kwargs)
        finally:
            self._scale = kept

    @override
    def update(self, new_scale: Any = None) -> None:
        if new_scale is not None or self._owner_has_found is None:
            super().update(self.scale_here if new_scale is None else new_scale)
            return
        next(iter(self._per_optimizer_states.values()))["found_inf_per_device"]["owner"] = self._owner_has_found
        self._update_of_owner()
