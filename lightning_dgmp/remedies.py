"""Remedies for the delay: what a step of the optimizer does, and with which weights a forward runs.

All of them look at the *update* by which a step of the optimizer changes a parameter, whatever the optimizer is. So
they are the same on a stage and for virtual stages, know nothing of other stages, and cost a few passes over the
parameters. A parameter whose gradients are ``d`` iterations old has a delay of ``d / M`` updates if gradients are
accumulated over ``M`` batches; one without delay is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dgmp.host import MisconfigurationException
from lightning_dgmp.stage.shadow import Shadow

__all__ = ["Moment", "Remedies", "Updates"]

_KEY = "last_update"  # in the optimizer's state, and so in checkpoints


@dataclass(frozen=True)
class Remedies:
    """Which remedies are wanted; see :class:`~lightning_dgmp.strategy.DelayedMPStrategy`.

    Raises:
        ValueError: If one is out of its range, or two do not go together.
    """

    predict_weights: bool = False
    lr_discount_steps: int = 0
    correct_updates: bool = False
    synchronous_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("lr_discount_steps", "synchronous_steps"):
            if not isinstance(steps := getattr(self, name), int) or steps < 0:
                raise ValueError(f"`{name}` must be a number of steps, at least 0, but is {steps!r}.")
        if self.predict_weights and self.correct_updates:
            raise ValueError(
                "`predict_weights=True` and `correct_updates=True` both make up for the same delay, so that together"
                " they would do it twice. Use one of them."
            )

    @property
    def concern_updates(self) -> bool:
        """Whether an update is changed or kept."""
        return self.predict_weights or self.correct_updates or self.lr_discount_steps > 0


class Moment(NamedTuple):
    """Where training is.

    ``step`` counts the steps of the optimizer, ``accumulate`` the batches of one, ``position`` those of the present one
    that have been before, ``num_in_flight`` the batches since nothing was in flight; ``is_synchronous`` says that there
    are no delays yet.
    """

    step: int
    accumulate: int
    position: int
    num_in_flight: int
    is_synchronous: bool


class Updates:
    """The updates of one process.

    Args:
        remedies: What to do.
        optimizers: Whose steps.
        delays: The delay of each parameter, in batches.
        now: Tells where training is.

    Raises:
        MisconfigurationException: If weights shall be predicted and the optimizer has no momentum.
    """

    def __init__(
        self,
        remedies: Remedies,
        optimizers: Iterable[Optimizer],
        delays: Mapping[nn.Parameter, int],
        now: Callable[[], Moment],
    ) -> None:
        self._remedies, self._optimizers, self._delays, self._now = remedies, list(optimizers), delays, now
        self._before: list[tuple[nn.Parameter, Tensor]] = []
        self._handles: list[Any] = []
        for optimizer in self._optimizers:
            if remedies.predict_weights and not any(map(_momentum, optimizer.param_groups)):
                raise MisconfigurationException(
                    "`predict_weights=True` foretells the next updates from the momentum, but"
                    f" `{type(optimizer).__name__}` has none. Use one that has, as SGD with `momentum=0.9` or AdamW."
                )
            self._handles.append(optimizer.register_step_pre_hook(self._note))
            self._handles.append(optimizer.register_step_post_hook(self._change))

    def close(self) -> None:
        """Let the optimizers be."""
        for handle in self._handles:
            handle.remove()

    def predicted(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """The weights for the next forward, as far as they are not those of today.

        The forward of a batch runs with the weights that its gradient is expected to meet: those of today plus the last
        update times ``b + b^2 + ... + b^s`` for a momentum ``b`` and ``s`` updates to come (after SpecTrain, Chen et
        al., arXiv 1809.02839; XPipe, Guan et al., arXiv 1911.04610). For SGD with momentum that is FTPipe's rule (Eliad
        et al., USENIX ATC 2021). For AdamW FTPipe corrects each step to come by its own number and decays the weights
        in each in full; here bias correction and learning rate are those of the last step, and its weight decay fades
        with the momentum. So one rule does for all optimizers. It looks further in the first updates (for AdamW by 70 %
        in the first, by some percent after five), and later differs by less than ``s`` times a step's weight decay.
        """
        moment = self._now()
        if not self._remedies.predict_weights or moment.is_synchronous:
            return {}
        found = {}
        known = {
            p: (_momentum(g), o.state.get(p, {})) for o in self._optimizers for g in o.param_groups for p in g["params"]
        }
        for name, parameter in parameters.items():
            momentum, state = known.get(parameter, (0.0, {}))
            # The gradient is there at `end`. Only the batches in flight, the last ones before it, bring updates.
            end = moment.position + self._delays[parameter]
            begin = end - min(self._delays[parameter], moment.num_in_flight)
            num_updates = end // moment.accumulate - begin // moment.accumulate
            factor = sum(momentum**j for j in range(1, num_updates + 1))
            if factor and _KEY in state and parameter.requires_grad:
                with torch.enable_grad():
                    found[name] = torch.add(parameter, state[_KEY].to(parameter.dtype), alpha=factor)
        return found

    def _note(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Before a step."""
        moment = self._now()
        is_over = moment.step >= self._remedies.lr_discount_steps
        rests = is_over and not self._remedies.predict_weights and not self._remedies.correct_updates
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        here = [p for p in parameters if p.requires_grad and not isinstance(p, Shadow)]
        delayed = [p for p in here if self._delays.get(p, 0) > 0]
        self._before = [] if rests or moment.is_synchronous else [(p, p.detach().clone()) for p in delayed]

    @torch.no_grad()
    def _change(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """After a step."""
        before, self._before = [(p, old) for p, old in self._before if p.grad is not None], []
        overflow = getattr(optimizer, "found_inf", None)  # of fused optimizers, which then do nothing
        if not before or (overflow is not None and bool(overflow)):
            return
        parameters: list[Tensor] = [p for p, _ in before]
        old = [value for _, value in before]
        updates = torch._foreach_sub(parameters, old)
        discounts = self._discounts([p for p, _ in before])
        states = [optimizer.state[p] for p, _ in before]
        if self._remedies.lr_discount_steps:
            torch._foreach_mul_(updates, discounts)
        if self._remedies.correct_updates:
            # One step, arXiv 2606.30634: the update of a gradient that is one update old, twice, less the one before.
            torch._foreach_add_(old, updates, alpha=2.0)
            for value, state in zip(old, states):
                if _KEY in state:
                    value.sub_(state[_KEY])
            torch._foreach_copy_(parameters, old)
        elif self._remedies.lr_discount_steps:
            torch._foreach_copy_(parameters, torch._foreach_add(old, updates))
        if self._remedies.predict_weights or self._remedies.correct_updates:
            for state, update in zip(states, updates):
                state[_KEY] = update

    def _discounts(self, parameters: Sequence[nn.Parameter]) -> list[float]:
        """Smaller steps for old gradients early on: ``d^-(1 - t/T)`` (PipeMare T1, Yang et al., MLSys 2021)."""
        moment = self._now()
        exponent = 1 - min(moment.step / max(self._remedies.lr_discount_steps, 1), 1.0)
        return [max(1.0, self._delays[p] / moment.accumulate) ** -exponent for p in parameters]


def _momentum(group: dict[str, Any]) -> float:
    return float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))
