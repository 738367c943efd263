"""The plan as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_dgmp.plan.memory import Sizes

__all__ = ["StageSummary", "table_of"]

_MAX_NOTES = 5


@dataclass(frozen=True)
class StageSummary:
    """A row of the plan's table.

    Attributes:
        first_module: Its first module.
        last_module: Its last module.
        cost: Of its forward, backward and update, in floating point operations or what takes as long.
        num_parameters: How many numbers it holds.
        bytes_sent: To other stages, for one batch.
        sizes: What decides how much memory it takes.
    """

    first_module: str
    last_module: str
    cost: float
    num_parameters: int
    bytes_sent: int
    sizes: Sizes = field(default_factory=Sizes)


def table_of(stages: Sequence[StageSummary], shared: Mapping[str, Sequence[int]], remarks: Sequence[str] = ()) -> str:
    """One row a stage, what is shared, and what else there is to say."""
    total = sum(stage.cost for stage in stages) or 1.0
    rows = [("stage", "first module", "last module", "compute", "parameters", "sends")]
    for k, stage in enumerate(stages):
        share = f"{100 * stage.cost / total:.1f} %"
        sends = _human(stage.bytes_sent, "B") if k < len(stages) - 1 else "-"
        rows.append((str(k), stage.first_module, stage.last_module, share, _human(stage.num_parameters, ""), sends))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = ["  ".join(_align(cell, widths[i], i) for i, cell in enumerate(row)).rstrip() for row in rows]
    notes = [f"shared: {name} on stages {', '.join(map(str, holders))}" for name, holders in shared.items()]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], *notes[:_MAX_NOTES], *remarks])


def _human(number: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G"):
        if number < 1000 or prefix == "G":
            return f"{number:.3g} {prefix}{unit}".rstrip()
        number /= 1000
    raise AssertionError


def _align(cell: str, width: int, column: int) -> str:
    align: Literal["<", ">"] = "<" if column in (1, 2) else ">"
    return f"{cell:{align}{width}}"
