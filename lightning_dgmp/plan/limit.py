"""Cuts whose stages all fit into a limit, or what there is to say if there are none."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

from lightning_dgmp.plan.cut import PlanError, choose_cuts
from lightning_dgmp.plan.memory import Memory, Parts, Sizes, memory_at_peak, table_of_memory
from lightning_dgmp.schedule import delays_of

__all__ = ["cuts_that_fit"]


def cuts_that_fit(parts: Parts, positions: list[int] | None, num_stages: int, slack: int) -> list[int]:
    """The best cuts of which no stage needs more than the limit.

    Args:
        parts: What stages may be.
        positions: The cuts, if they are given.
        num_stages: How many stages to make.
        slack: How many batches more than necessary are in flight between neighbours.

    Raises:
        PlanError: If there are no such cuts, with what the stages need at best, and what would help.
    """
    cuts, limit, delays = parts.cuts, parts.budget.limit, delays_of(max(num_stages, 0), slack)
    found = choose_cuts(cuts, num_stages) if positions is None else positions
    assert found is not None
    if limit is None or max(one.total for one in _needs(parts, found, delays)) <= limit:
        return found

    def fits(start: int, end: int, stage: int) -> bool:
        return parts.memory(start, end, delays[stage]).total <= limit

    if positions is None and (found := choose_cuts(cuts, num_stages, fits=fits)) is not None:
        return found
    raise PlanError(_refusal(parts, positions, num_stages, slack, limit))


def _needs(parts: Parts, positions: Sequence[int], delays: Sequence[int]) -> list[Memory]:
    bounds = pairwise([0, *positions, len(parts.cuts.units)])
    return [parts.memory(start, end, delay) for (start, end), delay in zip(bounds, delays)]


def _refusal(parts: Parts, given: list[int] | None, num_stages: int, slack: int, limit: int) -> str:
    backward = parts.budget.backward

    def at_best(
        num_stages: int = num_stages,
        positions: list[int] | None = given,
        slack: int = slack,
        backward: str = backward,
        activations: float = 1,
        parameters: float = 1,
    ) -> list[Memory]:
        """What each stage needs, if need be for the cuts by which the largest need is least."""
        delays = delays_of(num_stages, slack)

        @cache
        def sizes(start: int, end: int) -> Sizes:
            return parts.sizes(start, end).times(activations, parameters)

        def need(start: int, end: int, stage: int) -> Memory:
            return memory_at_peak(sizes(start, end), delays[stage], backward)

        if positions is None:
            positions = choose_cuts(parts.cuts, num_stages, lambda *stage: need(*stage).total)
        assert positions is not None
        bounds = pairwise([0, *positions, len(parts.cuts.units)])
        return [need(start, end, k) for k, (start, end) in enumerate(bounds)]

    now, most = at_best(), len(parts.cuts.possible) + 1
    cures = {f"`num_stages={k}`": at_best(k, None) for k in (num_stages + 1, 2 * num_stages) if k <= most}
    if given is not None:
        cures["other cuts, without `split_at`"] = at_best(positions=None)
    if slack > 0:
        cures["`slack=0`"] = at_best(slack=0)
    if backward == "stash":
        cures["`backward='recompute'`"] = at_best(backward="recompute")
    cures["half of the batch"] = at_best(activations=0.5)
    if parts.budget.is_single:
        cures["`precision='bf16-true'`"] = at_best(activations=0.5, parameters=0.5)
    needs = {cure: need for cure, found in cures.items() if (need := _largest(found)) < _largest(now)}
    enough = {cure: need for cure, need in needs.items() if need <= limit}
    told = ", ".join(f"{cure} ({_mb(need)} at most)" for cure, need in (enough or needs).items())
    advice = f" What would do: {told}." if enough else f" What would help, but is not enough alone: {told}."
    where = "with the cuts that need least" if given is None else "with the cuts of `split_at`"
    return (
        f"No stage may need more than {_mb(limit)}, by `memory_limit` or the memory of a device, but {where} stages"
        f" need up to {_mb(_largest(now))}.{advice if needs else ''}\n{table_of_memory(now)}"
    )


def _largest(memory: list[Memory]) -> int:
    return max(one.total for one in memory)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
