"""Virtual stages: the exact delays of K stages in one process.

The delayed update applies the gradient of a batch that was computed, for all stages, at one consistent version of the
weights. So one process computes whole gradients as ever and lets those of stage ``k`` wait in a queue of length
``d_k``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dgmp.calls import ParameterSlots
from lightning_dgmp.clipping import Part, updated_by
from lightning_dgmp.plan.plan import Plan
from lightning_dgmp.precision import VirtualGradScaler
from lightning_dgmp.remedies import Updates
from lightning_dgmp.stage.notes import VirtualNotes
from lightning_dgmp.stage.sides import Sides

__all__ = ["GradientQueues", "VirtualStages"]


class VirtualStages:
    """All stages in one process, with what they tell each other.

    Args:
        queues: The gradients.
        notes: Their norms, if wanted.
        scaler: By what they are scaled, if they are.
        sides: What tells their parts of shared parameters apart, if these have delays of their own.
        slots: The parameters.
        updates: What foretells the weights of forwards, if a remedy does.
        is_late: Whether hooks may change gradients, so that norms are measured behind them.
    """

    def __init__(
        self,
        queues: GradientQueues,
        notes: VirtualNotes | None = None,
        scaler: VirtualGradScaler | None = None,
        sides: Sides | None = None,
        slots: ParameterSlots | None = None,
        updates: Updates | None = None,
        is_late: bool = False,
    ) -> None:
        self._queues, self._notes, self._scaler, self._sides = queues, notes, scaler, sides
        self._slots, self._updates = slots, updates
        self._is_synchronous = self._has_run = self._is_noted = False
        self._is_late, self._is_open = is_late, False
        self._held: dict[str, Tensor] = {}  # with what the forward has run

    def step(self, is_synchronous: bool) -> AbstractContextManager[None]:
        """Around a step of the user's code.

        Args:
            is_synchronous: Whether there is no delay in this iteration.
        """
        self.tell_norms()
        self._is_synchronous = is_synchronous
        if self._sides is not None:  # which predictions do not go with
            return self._sides.step()
        if self._updates is not None and self._slots is not None:
            self._held = self._updates.predicted(self._slots.parameters)
            return self._slots.holding(self._held)
        return nullcontext()

    @property
    def squares(self) -> Tensor | None:
        """The squared norm of each stage's newest gradient, if wanted."""
        return None if self._notes is None else self._notes.squares

    def parts(self) -> list[Part]:
        """The parameters of each stage, and what tells the norm of all gradients as far as it knows; none: unknown."""
        notes = self._notes
        if notes is None or not self._is_noted:
            return []
        stages = enumerate(self._queues.updated())
        return [Part(own, partial(self._total_norm, k), partial(notes.note_clipping, k)) for k, own in stages]

    def _total_norm(self, stage: int) -> Tensor:
        assert self._notes is not None
        if self._is_open and stage == 0:  # the first to be asked
            self._notes.note(self._queues.gradients())
        return self._notes.total_norm(stage)

    def tell_norms(self) -> None:
        """Hooks change the gradients no more."""
        if self._is_open and self._notes is not None:
            self._notes.note(self._queues.gradients())
        self._is_open = False

    def gradients(self) -> list[Tensor]:
        """What is ``.grad`` now."""
        return [p.grad for own in self._queues.stages for p in own if p.grad is not None]

    def iterate(self, of_loss: Callable[[], Any], is_step: bool) -> None:
        """Run the backward of today's batch by ``of_loss``, and let the due gradients be ``.grad``.

        Args:
            of_loss: Runs it from the loss.
            is_step: Whether a step of the optimizer follows.
        """
        self._begin()
        self._queues.set_aside()
        with nullcontext() if self._slots is None else self._slots.holding(self._held):  # what runs again sees them too
            of_loss()
        sides = None if self._sides is None else self._sides.take()
        scale = None if self._scaler is None else self._scaler.remove_scale()
        self._queues.exchange(scale, sides, self._is_synchronous)
        self._has_run = True
        self._end(is_step)

    @property
    def num_in_flight(self) -> int:
        """How many batches have no update on the first stage yet."""
        return self._queues.num_waiting

    def begin_flush(self) -> bool:
        """Returns whether there is anything to flush."""
        self.tell_norms()
        has_run, self._has_run = self._has_run, False
        if has_run:
            self._begin(self.num_in_flight)
        return has_run

    def drain(self, is_open: bool, is_step: bool) -> None:
        """One iteration of the flush.

        Args:
            is_open: Whether the present gradients wait for a step.
            is_step: Whether one follows.
        """
        self._queues.drain(is_open)
        self._end(is_step)

    def end_flush(self) -> None:
        """Let the last stage know what the others have found."""
        if self._scaler is not None:
            self._scaler.begin()
            self._scaler.settle()

    def _begin(self, num_in_flight: int | None = None) -> None:
        """What travels with activations arrives; a flush says of how many batches it is."""
        if self._notes is not None:
            self._notes.begin(num_in_flight)
        if self._scaler is not None:
            self._scaler.begin()

    def _end(self, is_step: bool) -> None:
        """Note what belongs to the gradients that are there now."""
        queues = self._queues
        if self._scaler is not None:
            self._scaler.use(queues.scales)
        if self._notes is not None:
            self._is_noted = self._is_open = is_step
            self._notes.end(queues.had_backward, self._is_synchronous)
            if not self._is_late:
                self.tell_norms()


class GradientQueues:
    """One queue of gradients a stage.

    Args:
        parameters: All parameters, by name.
        plan: The stage of each. A shared one waits with its home.
        copies: Whether gradients must be copied, because the next backward writes to the same place.
        optimizers: What updates them.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        plan: Plan,
        copies: bool = False,
        optimizers: Sequence[Optimizer] = (),
    ) -> None:
        self._delays, self._copies, self._optimizers = plan.delays, copies, optimizers
        self.stages: list[list[nn.Parameter]] = [[] for _ in self._delays]
        for name, parameter in parameters.items():
            self.stages[plan.stage_of(name)[0]].append(parameter)
        self._waiting: list[deque[tuple[Tensor | None, list[Tensor | None]]]] = [deque() for _ in self._delays]
        self._shared = {name: (parameters[name], stages) for name, stages in plan.shared.items()}
        self._waiting_sides: list[deque[dict[str, Tensor]]] = [deque() for _ in self._delays]
        self.scales: list[Tensor | None] = [None] * len(self._delays)  # of what the last iteration has brought
        self._kept: dict[nn.Parameter, Tensor] = {}
        self.had_backward = [False] * len(self._delays)  # which stages, in the last iteration

    def updated(self) -> list[list[nn.Parameter]]:
        """The parameters that the optimizer updates, for each stage."""
        return [updated_by(self._optimizers, parameters) for parameters in self.stages]

    def gradients(self) -> list[list[Tensor]]:
        """What is their ``.grad`` now."""
        return [[p.grad for p in parameters if p.grad is not None] for parameters in self.updated()]

    @property
    def num_waiting(self) -> int:
        """How many batches are in flight on the first stage."""
        return max(map(len, self._waiting))

    def set_aside(self) -> None:
        """Before a backward: put gradients that the user's code has not zeroed apart from those of today."""
        self._kept = {p: self._own(p.grad) for parameters in self.stages for p in parameters if p.grad is not None}
        for parameter in self._kept:
            parameter.grad = None

    def exchange(
        self,
        scale: Tensor | None = None,
        sides: Mapping[tuple[str, int], Tensor] | None = None,
        is_synchronous: bool = False,
    ) -> None:
        """Put today's gradients in line and let the due ones, or none, be ``.grad``, with what was set aside.

        Args:
            scale: By what the loss was scaled, to be known when they are due.
            sides: What each stage has contributed to those of shared parameters. Then these are not the sums of what
                stages contribute for one batch, but the means of what is due on each: the rule of Ouroboros (Yang et
                al., NeurIPS 2019), ``V - lr / 2 (input side's of K - 1 iterations ago + output side's)``.
            is_synchronous: Whether today's are due at once.
        """
        if sides is not None:
            for parameter, _ in self._shared.values():
                parameter.grad = None
            for stage, waiting_sides in enumerate(self._waiting_sides):
                waiting_sides.append({name: grad for (name, k), grad in sides.items() if k == stage})
        for parameters, waiting in zip(self.stages, self._waiting):
            waiting.append((scale, [None if p.grad is None else self._own(p.grad) for p in parameters]))
        self._take([0] * len(self._delays) if is_synchronous else self._delays)

    def drain(self, is_open: bool) -> None:
        """Let the oldest waiting gradients, or none, be ``.grad``: one iteration of the flush.

        Args:
            is_open: Whether the present gradients wait for a step; if not, a stage where nothing waits rests.
        """
        self.set_aside()
        if not is_open:
            resting = [p for ps, waiting in zip(self.stages, self._waiting) if not waiting for p in ps]
            self._kept = {p: grad for p, grad in self._kept.items() if p not in set(resting)}
        self._take([0] * len(self._delays))

    def _own(self, grad: Tensor) -> Tensor:
        return grad.clone() if self._copies else grad

    def _take(self, stay: Sequence[int]) -> None:
        self.had_backward = [len(waiting) > delay for waiting, delay in zip(self._waiting, stay)]
        for stage, (parameters, waiting, delay) in enumerate(zip(self.stages, self._waiting, stay)):
            nothing: tuple[Tensor | None, list[Tensor | None]] = None, [None] * len(parameters)
            self.scales[stage], due = waiting.popleft() if len(waiting) > delay else nothing
            for parameter, grad in zip(parameters, due):
                parameter.grad = _sum(self._kept.get(parameter), grad if parameter.requires_grad else None)
        due_sides = [w.popleft() if len(w) > delay else {} for w, delay in zip(self._waiting_sides, stay)]
        for name, (parameter, stages) in self._shared.items():
            for stage in stages if parameter.requires_grad else ():
                if name in due_sides[stage]:
                    parameter.grad = _sum(parameter.grad, due_sides[stage][name] / len(stages))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
