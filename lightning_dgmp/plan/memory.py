"""What the stages of a plan hold."""

from __future__ import annotations

from typing import NamedTuple

from lightning_dgmp.plan.plan import Plan

__all__ = ["Memory", "memory_of"]


class Memory(NamedTuple):
    """What a stage holds, in bytes.

    Attributes:
        parameters: Its weights.
        gradients: Of those that are trained.
        optimizer: Two numbers a trained weight, as Adam keeps them.
        snapshots: The old weights of the batches in flight.
        activations: All values that its forwards make, for each batch in flight whose graph is kept; what the backward
            needs of them is less. Of the others what arrives.
    """

    parameters: int
    gradients: int
    optimizer: int
    snapshots: int
    activations: int

    @property
    def total(self) -> int:
        """All together."""
        return sum(self)


def memory_of(plan: Plan, backward: str = "stash") -> list[Memory]:
    """What each stage holds at most, if batches are kept in such a way until their backward."""
    found = []
    for k, (stage, delay) in enumerate(zip(plan.stages, plan.delays)):
        trained, received = stage.trained_bytes, sum(t.nbytes for t in plan.transfers if t.target == k)
        snapshots = 0 if backward == "replay" else delay * stage.parameter_bytes
        activations = delay * (stage.value_bytes if backward == "stash" else received) + stage.value_bytes
        found.append(Memory(stage.parameter_bytes, trained, 2 * trained, snapshots, activations))
    return found
