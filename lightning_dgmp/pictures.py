"""Pictures of a pipeline: when its stages do what, and how equal they are. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lightning_dgmp.logs import Comparison, Run, names_of
from lightning_dgmp.plan.memory import memory_of
from lightning_dgmp.plan.plan import Plan
from lightning_dgmp.timing import Span

__all__ = ["draw_balance", "draw_runs", "draw_timeline"]

# The colours of Okabe and Ito, which people with any sight tell apart; waits are white with a grey hatch.
_COLORS = {
    "forward": "#56B4E9", "backward": "#E69F00", "inputs": "#E69F00", "weights": "#F0E442", "update": "#009E73",
}  # fmt: skip
_NAMES = {"wait_activation": "waits for activation", "wait_error": "waits for error",
          "wait_data": "waits for data", "wait_send": "waits for receiver", "inputs": "backward, inputs",
          "weights": "backward, weights"}  # fmt: skip
_MEMORY = (
    ("weights", "#56B4E9", ("parameters",)),
    ("gradients, optimizer", "#009E73", ("gradients", "optimizer")),
    ("old weights", "#F0E442", ("snapshots",)),
    ("activations, messages", "#E69F00", ("activations", "messages")),
)
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
_HATCHES = {"wait_activation": "///", "wait_error": "\\\\\\", "wait_data": "...", "wait_send": "xxx"}
_NUMBERED = ("forward", "backward", "inputs")
_WIDTH = (
    4.2  # inches: TensorBoard shows a picture some 350 pixels wide, in which what is 9 points high is 10 pixels high
)
_FONT = 9


def draw_timeline(stages: Sequence[Sequence[Span]], title: str = "", num_batches: int | None = None) -> Figure:
    """One row a stage, input first: boxes with the numbers of batches, in milliseconds.

    From batch 100 on only the last two digits stand in the boxes.

    Args:
        stages: The spans of each; only the time for which all have some is shown.
        title: Above it.
        num_batches: How many of the last batches of the first stage to show; ``None``: all.
    """
    begin = max((min(span.start for span in spans) for spans in stages if spans), default=0.0)
    end = max((span.end for spans in stages for span in spans), default=1.0)
    begins = sorted(
        span.start for span in (stages[0] if stages else ()) if span.kind == "forward" and span.start >= begin
    )
    if num_batches is not None:
        begins = begins[-num_batches:]
        begin = max([begin, *begins[:1]])
    figure, axes = _figure(len(stages), min(max(_WIDTH, 0.8 * len(begins)), 3 * _WIDTH))
    width_of_digit = (end - begin) / figure.get_figwidth() / 14
    shortest_wait = 0.003 * (end - begin)
    is_late = max((span.batch for spans in stages for span in spans), default=0) > 99
    numbers = set()
    kinds: dict[str, None] = {}
    for stage, spans in enumerate(stages):
        for span in sorted(spans, key=lambda span: span.start):  # so that what is inside is drawn over it
            start, length = max(span.start, begin), span.end - max(span.start, begin)
            if length <= 0 or (span.kind in _HATCHES and length < shortest_wait):
                continue
            kinds.setdefault(span.kind)
            axes.barh(stage, 1000 * length, left=1000 * (start - begin), height=0.8, **_look(span.kind))
            first, end_of_first = _longest_work(start, span.end, spans)
            number = f"{span.batch % 100:02}" if is_late else str(span.batch)
            if span.kind in _NUMBERED and end_of_first - first > len(number) * width_of_digit:
                middle = 1000 * ((first + end_of_first) / 2 - begin)
                numbers.add(span.batch)
                axes.text(middle, stage, number, ha="center", va="center", fontsize=_FONT - 2)
    axes.set_yticks(range(len(stages)), [f"stage {stage}" for stage in range(len(stages))])
    axes.set_ylim(len(stages) - 0.5, -0.5)
    axes.set_xlim(0, 1000 * (end - begin))
    those = "numbers are those of batches"
    if is_late and numbers:
        those = f"last two digits of batches {min(numbers)} to {max(numbers)}"
    axes.set_xlabel(f"milliseconds; {those}")
    axes.set_title(title, fontsize=_FONT)
    figure.legend(handles=[Patch(label=_NAMES.get(kind, kind), **_look(kind)) for kind in sorted(kinds)],
                  loc="outside lower center", ncols=round(figure.get_figwidth() / 1.6), fontsize=_FONT - 1,
                  frameon=False)  # fmt: skip
    return figure


def _longest_work(start: float, end: float, spans: Sequence[Span]) -> tuple[float, float]:
    """The longest stretch between ``start`` and ``end`` without a wait."""
    waits = sorted(s[2:] for s in spans if s.kind in _HATCHES and s.start < end and s.end > start)
    edges = [start, *(edge for wait in waits for edge in wait), end]
    return max(zip(edges[::2], edges[1::2]), key=lambda stretch: stretch[1] - stretch[0])


def draw_balance(plan: Plan, backward: str = "stash") -> Figure:
    """The share of each stage in the work, and what it holds at most.

    Args:
        plan: The plan.
        backward: How batches are kept until their backward.
    """
    figure, (work, memory) = _figure(2 * plan.num_stages + 2, num_axes=2)
    rows, total = range(plan.num_stages), sum(stage.cost for stage in plan.stages) or 1
    shares = [100 * stage.cost / total for stage in plan.stages]
    bars = work.barh(rows, shares, height=0.7, color="#CC79A7", edgecolor="black", linewidth=0.5)
    work.bar_label(bars, [f"{share:.1f} %" for share in shares], padding=2, fontsize=_FONT - 1,
                   bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip
    work.axvline(100 / plan.num_stages, color="black", linestyle=":", linewidth=1)
    work.set_xlabel("percent of the work; dotted: equal stages")
    found = memory_of(plan, backward)
    unit, name = next((u, n) for u, n in _UNITS if max(one.total for one in found) >= u or u == 1)
    left = [0.0] * plan.num_stages
    for label, color, fields in _MEMORY:
        sizes = [sum(getattr(one, field) for field in fields) / unit for one in found]
        bars = memory.barh(rows, sizes, left=left, height=0.7, color=color, edgecolor="black", linewidth=0.5,
                           label=label)  # fmt: skip
        left = [a + b for a, b in zip(left, sizes)]
    memory.bar_label(bars, [f"{one:.3g} {name}" for one in left], padding=2, fontsize=_FONT - 1)
    memory.set_xlabel(f"{name} held at most")
    for axes in (work, memory):
        axes.set_yticks(rows, [f"stage {k}" for k in rows])
        axes.set_ylim(plan.num_stages - 0.5, -0.5)
        axes.margins(x=0.25)
    figure.legend(loc="outside lower center", ncols=2, fontsize=_FONT - 1, frameon=False)
    return figure


def draw_runs(runs: Sequence[Run], comparison: Comparison | None) -> Figure:
    """How each stage of each run has spent its time; above it, if there is a comparison, it and the losses."""
    heights = [3.0, 1.0] if comparison else []
    heights.append(2.2 + 0.4 * sum(len(run.shares()) for run in runs))
    figure = Figure(figsize=(9, sum(heights)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    labels = names_of(runs)
    bars = parts[-1].subplots()
    names: list[str] = []
    for run, label_of_run in zip(runs, labels):
        for k, shares in enumerate(run.shares()):
            left = 0.0
            for kind, share in shares.items():
                label = _NAMES.get(kind, kind) if not names else None
                bars.barh(len(names), 100 * share, left=left, height=0.8, label=label, **_look(kind))
                left += 100 * share
            names.append(f"{label_of_run}, stage {k}")
    if not names:
        bars.text(0.5, 0.5, "No run has logged what its stages do.", ha="center", transform=bars.transAxes)
    bars.set_yticks(range(len(names)), names, fontsize=8)
    bars.invert_yaxis()
    bars.set_xlabel("percent of the time")
    if names:
        bars.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.3), frameon=False)
    if comparison:
        by_step, by_time = parts[0].subplots(1, 2, sharey=True)
        for run, label, style in zip(runs, labels, ("-", "--")):
            events = run.scalars[comparison.tag]
            values = [event.value for event in events]
            by_step.plot([event.step for event in events], values, style, label=label)
            by_time.plot([event.time - events[0].time for event in events], values, style)
        by_step.set_ylabel(comparison.tag)
        by_step.set_xlabel("steps")
        by_time.set_xlabel("seconds")
        by_step.legend(fontsize=8)
        table = comparison.table(labels, [run.seconds_per_step for run in runs])
        parts[1].text(0.5, 0.5, table, family="monospace", fontsize=8, ha="center", va="center")
    return figure


def _figure(num_rows: int, width: float = _WIDTH, num_axes: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, 1.3 + 0.5 * num_rows), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the project does with matplotlib
    all_axes = figure.subplots(num_axes, squeeze=False)[:, 0]
    for axes in all_axes:
        axes.tick_params(labelsize=_FONT)
        axes.xaxis.label.set_fontsize(_FONT)
    return figure, all_axes[0] if num_axes == 1 else all_axes


def _look(kind: str) -> dict[str, Any]:
    if kind in _HATCHES:
        return {"facecolor": "white", "edgecolor": "#999999", "hatch": _HATCHES[kind], "linewidth": 0.4}
    return {"facecolor": _COLORS.get(kind, "#CC79A7"), "edgecolor": "black", "linewidth": 0.4}
