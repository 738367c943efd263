"""Pictures of a pipeline: when its stages do what, and how equal they are. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lightning_dgmp.logs import Run
from lightning_dgmp.plan.plan import Plan
from lightning_dgmp.timing import Span

__all__ = ["draw_balance", "draw_runs", "draw_timeline"]

# The colours of Okabe and Ito, which people with any sight tell apart; waits are white with a grey hatch.
_COLORS = {
    "forward": "#56B4E9", "backward": "#E69F00", "inputs": "#E69F00", "weights": "#F0E442", "update": "#009E73",
}  # fmt: skip
_NAMES = {"wait_activation": "waits for an activation", "wait_error": "waits for an error",
          "wait_data": "waits for data", "wait_send": "waits for a receiver", "inputs": "backward, inputs",
          "weights": "backward, weights"}  # fmt: skip
_HATCHES = {"wait_activation": "///", "wait_error": "\\\\\\", "wait_data": "...", "wait_send": "xxx"}
_SHORTEST_WAIT = 0.003  # of the picture's width


def draw_timeline(stages: Sequence[Sequence[Span]], title: str = "") -> Figure:
    """One row a stage, input first: boxes with the numbers of batches, in milliseconds.

    Args:
        stages: The spans of each; only the time for which all have some is shown.
        title: Above it.
    """
    figure, axes = _figure(len(stages))
    begin = max((min(span.start for span in spans) for spans in stages if spans), default=0.0)
    end = max((span.end for spans in stages for span in spans), default=1.0)
    length = max(end - begin, 1e-9)
    kinds: dict[str, None] = {}
    for stage, spans in enumerate(stages):
        for span in sorted(spans, key=lambda span: span.start):  # so that what is inside is drawn over it
            if span.end <= begin or (span.kind in _HATCHES and span.end - span.start < _SHORTEST_WAIT * length):
                continue
            kinds.setdefault(span.kind)
            left, width = 1000 * (max(span.start, begin) - begin), 1000 * (span.end - max(span.start, begin))
            axes.barh(stage, width, left=left, height=0.8, **_look(span.kind))
            if span.kind in ("forward", "backward", "inputs") and width > 18 * length:
                axes.text(left + width / 2, stage, str(span.batch), ha="center", va="center", fontsize=8)
    axes.set_yticks(range(len(stages)), [f"stage {stage}" for stage in range(len(stages))])
    axes.set_ylim(len(stages) - 0.5, -0.5)
    axes.set_xlim(0, 1000 * length)
    axes.set_xlabel("milliseconds")
    axes.set_title(title or "What the stages have done lately; numbers are those of batches", fontsize=9)
    handles = [Patch(label=_NAMES.get(kind, kind), **_look(kind)) for kind in sorted(kinds)]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.32 if len(stages) < 4 else -0.18), ncols=4,
                fontsize=8, frameon=False)  # fmt: skip
    return figure


def draw_balance(plan: Plan) -> Figure:
    """The share of each stage in the work and in the parameters, as bars beside each other."""
    figure, axes = _figure(plan.num_stages)
    totals = [max(sum(getattr(s, name) for s in plan.stages), 1) for name in ("cost", "num_parameters")]
    for i, (name, label, color) in enumerate(
        (("cost", "work", "#56B4E9"), ("num_parameters", "parameters", "#E69F00"))
    ):
        shares = [100 * getattr(stage, name) / totals[i] for stage in plan.stages]
        bars = axes.barh([k + 0.4 * i - 0.2 for k in range(plan.num_stages)], shares, height=0.36, color=color,
                         edgecolor="black", linewidth=0.5, label=label)  # fmt: skip
        axes.bar_label(bars, [f"{share:.1f} %" for share in shares], padding=2, fontsize=8)
    axes.axvline(100 / plan.num_stages, color="black", linestyle=":", linewidth=1)
    names = [f"stage {k}: {stage.first_module}" for k, stage in enumerate(plan.stages)]
    axes.set_yticks(range(plan.num_stages), names, fontsize=8)
    axes.set_ylim(plan.num_stages - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set_xlabel("percent of the whole model; dotted: equal stages")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.32 if plan.num_stages < 4 else -0.2), ncols=2, fontsize=8,
                frameon=False)  # fmt: skip
    return figure


def draw_runs(runs: Sequence[Run], tag: str | None) -> Figure:
    """How each stage of each run has spent its time and, if there is a ``tag``, that scalar by steps and seconds."""
    figure = Figure(figsize=(9, 2.2 + 0.4 * sum(len(run.shares()) for run in runs) + (3 if tag else 0)), dpi=110,
                    layout="constrained")  # fmt: skip
    FigureCanvasAgg(figure)
    parts = figure.subfigures(2 if tag else 1, 1, squeeze=False)[:, 0]
    bars = parts[-1].subplots()
    names: list[str] = []
    for run in runs:
        for k, shares in enumerate(run.shares()):
            left = 0.0
            for kind, share in shares.items():
                label = _NAMES.get(kind, kind) if not names else None
                bars.barh(len(names), 100 * share, left=left, height=0.8, label=label, **_look(kind))
                left += 100 * share
            names.append(f"{run.folder.name}, stage {k}")
    if not names:
        bars.text(0.5, 0.5, "No run has logged what its stages do.", ha="center", transform=bars.transAxes)
    bars.set_yticks(range(len(names)), names, fontsize=8)
    bars.invert_yaxis()
    bars.set_xlabel("percent of the time")
    if names:
        bars.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.3), frameon=False)
    if tag:
        by_step, by_time = parts[0].subplots(1, 2, sharey=True)
        for run, style in zip(runs, ("-", "--")):
            events = run.scalars[tag]
            values = [event.value for event in events]
            by_step.plot([event.step for event in events], values, style, label=run.folder.name)
            by_time.plot([event.time - events[0].time for event in events], values, style)
        by_step.set_ylabel(tag)
        by_step.set_xlabel("steps")
        by_time.set_xlabel("seconds")
        by_step.legend(fontsize=8)
    return figure


def _figure(num_rows: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9, 1.6 + 0.55 * num_rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the project does with matplotlib
    return figure, figure.subplots()


def _look(kind: str) -> dict[str, Any]:
    if kind in _HATCHES:
        return {"facecolor": "white", "edgecolor": "#999999", "hatch": _HATCHES[kind], "linewidth": 0.4}
    return {"facecolor": _COLORS.get(kind, "#CC79A7"), "edgecolor": "black", "linewidth": 0.4}
