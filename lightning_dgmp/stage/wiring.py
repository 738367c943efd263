"""The transfers of a plan as one stage sees them."""

from __future__ import annotations

from lightning_dgmp.plan.plan import Event, Plan, Transfer

__all__ = ["Wiring"]


class Wiring:
    """What one stage sends and receives, and when in a step.

    Attributes:
        events: The transfers at each event, with their slots: the place in the message between two stages.
        sources: How many values come from each earlier stage.
        targets: How many values go to each later stage.
        last_event: After this the stage has nothing more to do in the step; ``None``: it runs to the end.
    """

    def __init__(self, plan: Plan, stage: int) -> None:
        self.events: dict[Event, list[tuple[int, Transfer]]] = {}
        self.sources = {a: 0 for a, b in plan.edges() if b == stage}
        self.targets = {b: 0 for a, b in plan.edges() if a == stage}
        self.last_event = plan.last_events[stage]
        for transfer in plan.transfers:
            if stage == transfer.source:
                counts, peer = self.targets, transfer.target
            elif stage == transfer.target:
                counts, peer = self.sources, transfer.source
            else:
                continue
            self.events.setdefault(transfer.event, []).append((counts[peer], transfer))
            counts[peer] += 1
