"""Make RESULTS.md and its figures from the file of results, and from nothing else.

python examples/study/report.py
"""

from __future__ import annotations

import math
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from study.measures import Measured, measure
from study.plan import GROUPS, RECOMMENDED, RECOMMENDED_CODE, Cell, Group, best_runs, progress
from study.results import RESULTS, Results, read_results
from study.setting import Setting
from study.svg import line_chart

__all__ = ["figures", "page"]

_NAMES = {"adamw": "AdamW", "nadamw": "NAdamW (0.99)", "muon": "Muon", "rotated": "RotatedAdamW"}
_GOALS = {4: 1.02, 8: 1.05}
_CAUSES = {  # why a delay may cost more if embeddings are tied, by what takes each away
    "large embeddings": "Tokens are small beside their positions",
    "synchronous beginning": "The matrix is led astray at the very beginning",
    "small tied steps": "The steps of the shared matrix are too large",
    "paper's rule": "The gradient of the output side is as old as that of the input side",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page and its figures."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of results (default beside this one)")
    parser.add_argument("--folder", type=Path, default=RESULTS.parent, help="where the page goes (default here)")
    args = parser.parse_args(argv)
    results = read_results(args.results)
    if not results:
        raise SystemExit(f"error: there are no results in '{args.results}': run examples/study/run.py first")
    for name, figure in figures(results).items():
        (args.folder / name).write_text(figure)
    (args.folder / "RESULTS.md").write_text(page(results))


def page(results: Results) -> str:
    """The text of RESULTS.md."""
    parts = ["# What the delay costs, and what takes it back", _how(results), "## In short", _in_short(results)]
    drawn = figures(results)
    for group in GROUPS:
        if table := _table(group.cells, results):
            parts += [f"## {group.title}", f"{group.remark} {_sizes(group, results)}".strip(), table]
            parts += [_delay_costs(results)] if group.name == "tied" else []
            parts += [_why_tied(results)] if group.name == "tied-remedies" else []
            parts += [f"![{name}]({name})" for name in _FIGURES.get(group.name, ()) if name in drawn]
    parts += ["## What did not help", _without_effect(results) or "Nothing that has been tuned so far."]
    parts += ["## How to read this", _LEGEND]
    return "\n\n".join(part for part in parts if part)


# ----- parts of the page


def _how(results: Results) -> str:
    rows = list(results.values())
    texts = sorted({row["text"] for row in rows})
    versions = sorted({", ".join(f"{name} {v}" for name, v in row["versions"].items()) for row in rows})
    done, planned = progress([cell for group in GROUPS for cell in group.cells], results)
    missing = f" **{planned - done} or more are still to come**, so this page is preliminary." if done < planned else ""
    hours = sum(row["seconds"] for row in rows) / 3600
    return (
        f"Made by `examples/study/report.py` from `results.jsonl`, which `examples/study/run.py` has written: {done} of"
        f" {planned} planned runs, {hours:.1f} hours of one thread, pauses of the machine included. At this rate all"
        f" take {hours / len(rows) * planned:.0f} hours of one thread; the most informative come first, `--hours` ends"
        f" the study anywhere, and it goes on where it was.{missing} Text: {'; '.join(texts)}."
        " Its bits per character must not be set beside published ones. Software:"
        f" {'; '.join(versions)}."
    )


def _sizes(group: Group, results: Results) -> str:
    """How large the models and their trainings are, and how much of the group there is."""
    runs = [run for m in _all_measured(group.cells, results) for run in best_runs(m.cell, results)]
    sizes = {
        f"{run['layers']} layers of width {run['width']}, {run['parameters']:,} parameters, {run['updates']:,} updates"
        f" of {run['tokens_per_update']:,} characters"
        for run in runs
    }
    done, planned = progress(group.cells, results)
    state = "" if done == planned else f" {done} of at least {planned} runs are there."
    return f"{'; '.join(sorted(sizes))}.{state}"


def _in_short(results: Results) -> str:
    lines = []
    for tied in (False, True):
        for stages, goal in _GOALS.items():
            cells = _of(stages=stages, tied=tied, model="transformer", layers=8)
            found = [m for m in _all_measured(cells, results) if not math.isnan(m.mean_batches)]
            if not found:
                continue
            best = min(found, key=lambda m: (m.mean_batches, m.final))
            recommended = [m for m in found if (m.cell.setting.optimizer, m.cell.method) == RECOMMENDED]
            where = f"{'Tied' if tied else 'Untied'}, K = {stages}"
            for title, m in [("recommended", m) for m in recommended] + [("best", best)] * ([best] != recommended):
                lines.append(f"- {where}, {title}: {_name(m)}. {_verdict(m, goal)}")
    optimizer, method = RECOMMENDED
    first = (
        f"The recommendation is **{method} with {_NAMES[optimizer]}**:\n\n```python\n{RECOMMENDED_CODE}\n```\n\n"
        "The goal: against one stage with the same optimizer at its own best learning rate, K = 4 needs at most 2 % and"
        " K = 8 at most 5 % more batches to the same loss. Speed-ups take the time per batch of full batches: the"
        " smaller batches of accumulation cost extra, measured by `examples/benchmarks/throughput.py --only options`."
    )
    pairs = (("adamw", "bare"), RECOMMENDED)
    tables = []
    for tied in (False, True):
        wanted = [
            _of(m, optimizer=o, stages=k, tied=tied, model="transformer", layers=8) for k in (2, 4, 8) for o, m in pairs
        ]
        if table := _table([cell for cells in wanted for cell in cells], results):
            tables += ["", f"Both factors and their product, {'tied' if tied else 'untied'}:", "", table]
    return "\n".join([first, "", *lines, *tables])


def _verdict(measured: Measured, goal: float) -> str:
    allowed = f"{(goal - 1) * 100:.0f} %"
    if math.isinf(measured.mean_batches):
        return f"The loss was not reached in {measured.limit:.2f} times the batches; {allowed} more are allowed."
    more = (measured.mean_batches - 1) * 100
    met = "met" if measured.mean_batches <= goal else f"missed by {more - (goal - 1) * 100:.1f} points"
    seeds = "one seed so far" if len(measured.batches) == 1 else f"{len(measured.batches)} seeds"
    return f"{more:+.1f} % batches, {allowed} are allowed: {met} ({seeds}). Speed-up in time {_speed_up(measured)}."


def _table(cells: Iterable[Cell], results: Results) -> str:
    names = list(_NAMES)
    measured = sorted(
        _all_measured(cells, results), key=lambda m: (m.cell.setting.stages, names.index(m.cell.setting.optimizer))
    )
    if not measured:
        return ""
    lines = [
        "| K | optimizer | method | learning rate | seeds | bits per character | against bare |"
        " batches to the same loss | batches a second | speed-up in time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for m in measured:
        setting = m.cell.setting
        lines.append(
            f"| {setting.stages} | {_NAMES[setting.optimizer]} | {m.cell.method} | {m.lr:g}{' ?' * (not m.is_tuned)} |"
            f" {len(m.finals)} | {_number(m.final, 3)} | {_against_bare(m, results)} | {_batches(m)} | {m.speed:.2f} |"
            f" {_speed_up(m)} |"
        )
    return "\n".join(lines)


def _delay_costs(results: Results) -> str:
    """The bits that a delay costs, tied and untied, as far as they are known."""
    lines = []
    for optimizer, method in (("adamw", "bare"), ("adamw", "large embeddings"), (RECOMMENDED[0], "bare"), RECOMMENDED):
        for stages in (4, 8):
            found = [_delay_cost(method, tied, optimizer, stages, results) for tied in (False, True)]
            costs = ["" if cost is None else f"{cost:+.3f}" for cost in found]
            if any(costs):
                lines.append(f"| {stages} | {_NAMES[optimizer]} | {method} | {' | '.join(costs)} |")
    head = "| K | optimizer | method | untied | tied |\n|---|---|---|---|---|"
    text = "What the delay costs at the end of training, in bits per character against one stage:"
    return "\n".join([text, "", head, *lines]) if lines else ""


def _why_tied(results: Results) -> str:
    """By how much more a delay costs if embeddings are tied, and what of that the causes tried would explain."""
    both = {k: [_delay_cost("bare", tied, "adamw", k, results) for tied in (False, True)] for k in (4, 8)}
    known = {k: (untied, tied) for k, (untied, tied) in both.items() if untied is not None and tied is not None}
    if not known:
        return ""
    costs = "; ".join(
        f"for K = {k} {tied:+.3f} bits tied and {untied:+.3f} untied, {tied - untied:+.3f} for tying"
        for k, (untied, tied) in known.items()
    )
    lines = ["", "Causes tried for K = 4, by what the delay costs without them:", ""] if 4 in known else []
    for method, cause in _CAUSES.items():
        cost = _delay_cost(method, True, "adamw", 4, results)
        if 4 in known and cost is not None:
            gain = known[4][1] - cost
            verdict = f"{gain:.3f} bits less, so it may have a part in it" if gain > 0 else "not less, so it is refuted"
            lines.append(f"- {cause} ({method}): {cost:+.3f} instead of {known[4][1]:+.3f}, {verdict}.")
    open_cause = (
        "Not tried: that AdamW has one second moment for the sparse gradients of the input side and the dense ones of"
        " the output side. That would need an optimizer to which each side gives its gradient apart."
    )
    return "\n".join([f"What the delay costs, each at its own best learning rate: {costs}.", *lines, "", open_cause])


def _delay_cost(method: str, tied: bool, optimizer: str, stages: int, results: Results) -> float | None:
    """The bits at the end of training against one stage; ``None``: not known."""
    small = {"model": "transformer", "layers": 8}
    delayed = _of(method, **small, tied=tied, optimizer=optimizer, stages=stages)
    found = [m for cells in (delayed, _alone(method, tied, optimizer)) for m in _all_measured(cells, results)]
    return _difference(*found) if len(found) == 2 else None


def _alone(method: str, tied: bool, optimizer: str) -> list[Cell]:
    """One stage with what is no remedy for the delay but another model, or else bare."""
    small = {"model": "transformer", "layers": 8, "stages": 1, "tied": tied, "optimizer": optimizer}
    return _of(method, **small) or _of("bare", **small)


def _without_effect(results: Results) -> str:
    lines = []
    for m in _all_measured([cell for group in GROUPS for cell in group.cells], results):
        gain = _gain(m, results)
        if gain is not None and gain <= 0:
            lines.append(f"- {_model(m.cell.setting)}, K = {m.cell.setting.stages}, {_name(m)}: {-gain:+.3f} bits")
    return (
        "\n".join(["At its own best learning rate, against the bare method at its own:", "", *lines]) if lines else ""
    )


_LEGEND = """\
- *Bits per character* are those of the end of training on a fixed part of the validation text, a mean over seeds.
- *Against bare* is the difference to the same model, optimizer and K without a remedy.
- *Batches to the same loss*: the updates to the loss that one stage, with the same model, optimizer, seed and its own
  best learning rate, has at 80 percent of its updates, divided by these 80 percent. In brackets the single seeds.
  `> 1.25`: not reached until the end.
- *Batches a second* are relative to one process, from the table "Measured" of the README: for K = 2 measured on two
  cores with 12 blocks, for K = 4 and 8 emulated by 16 blocks that sleep, for the two regimes emulated by as many blocks
  as they have. What remedies, smaller batches and optimizers cost in time is not in these figures.
- *Speed-up in time* is the quotient of both. Updates of a synchronous beginning count as those of one process.
- A learning rate with `?` is the best of an unfinished search. Rates differ by factors of 2, so a method may be a
  little better than it looks here, and so may one stage.
- With one stage nothing is corrected or predicted, because nothing is old. Whether the corrected update would help
  there too has not been tried, so a part of its gain may not be due to the delay.
- Accumulation makes an update of several smaller batches, so all methods see the same tokens an update. With
  Transformer-XL the parts of an update are then consecutive segments of fewer streams.
- Runs are short, and say nothing of longer trainings.
"""


# ----- figures

_FIGURES = {"bare": ["bare.svg"], "best": ["batches.svg", "speed-up.svg"], "tied-remedies": ["tied.svg"]}


def figures(results: Results) -> dict[str, str]:
    """The figures that can be drawn, by their file names."""
    small = {"model": "transformer", "layers": 8}
    pairs = [_of("bare", **small, tied=False, optimizer=name) for name in ("adamw", RECOMMENDED[0])]
    drawn = {
        "bare.svg": _curves("Without remedy, untied", [cell for cells in pairs for cell in cells], results),
        "tied.svg": _curves("Tied, AdamW", _of(**small, tied=True, optimizer="adamw"), results),
        "batches.svg": _by_stages("Batches to the same loss", lambda m: m.mean_batches, results),
        "speed-up.svg": _by_stages("Speed-up in time to the same loss", lambda m: m.speed_up(m.mean_batches), results),
    }
    return {name: figure for name, figure in drawn.items() if figure}


def _curves(title: str, cells: Iterable[Cell], results: Results) -> str:
    lines = {}
    for m in _all_measured(cells, results):
        run = best_runs(m.cell, results)[0]
        points = [(run["every"] * i, value) for i, value in enumerate(run["bpc"], 1) if value is not None]
        lines[f"K = {m.cell.setting.stages}, {_name(m)}"] = points
    return line_chart(title, "updates", "bits per character", lines, y_max=4.5) if lines else ""


def _by_stages(title: str, value: Callable[[Measured], float], results: Results) -> str:
    lines: dict[str, list[tuple[float, float]]] = {}
    for m in _all_measured(_of(model="transformer", layers=8, tied=False), results):
        if math.isfinite(m.mean_batches):
            lines.setdefault(_name(m), []).append((math.log2(m.cell.setting.stages), value(m)))
    lines = {name: sorted(points) for name, points in lines.items() if len(points) > 1}
    ticks = {math.log2(k): str(k) for k in (1, 2, 4, 8)}
    return line_chart(title, "stages", "relative to one stage", lines, x_ticks=ticks) if lines else ""


# ----- cells and numbers


def _all_measured(cells: Iterable[Cell], results: Results) -> Iterator[Measured]:
    return (m for cell in dict.fromkeys(cells) if (m := measure(cell, results)) is not None)


def _of(method: str | None = None, **setting: Any) -> list[Cell]:
    """The cells of which the method, if it is given, and the settings are these."""
    cells = dict.fromkeys(cell for group in GROUPS for cell in group.cells)
    wanted = [c for c in cells if all(getattr(c.setting, name) == value for name, value in setting.items())]
    return [cell for cell in wanted if method in (None, cell.method)]


def _gain(measured: Measured, results: Results) -> float | None:
    """By how much less the loss is than without a remedy; ``None``: nothing to compare with."""
    kept = ("model", "layers", "width", "tied", "rows", "optimizer", "stages", "updates")
    bare = _of("bare", **{name: getattr(measured.cell.setting, name) for name in kept})
    if measured.cell.method == "bare" or not bare or (other := measure(bare[0], results)) is None:
        return None
    return _difference(other, measured)


def _difference(one: Measured, other: Measured) -> float:
    """By how much the final loss of ``one`` is greater, with the seeds that both have."""
    return fmean(a - b for a, b in zip(one.finals, other.finals))


def _against_bare(measured: Measured, results: Results) -> str:
    gain = _gain(measured, results)
    return "" if gain is None else f"{-gain:+.3f}"


def _name(measured: Measured) -> str:
    return f"{_NAMES[measured.cell.setting.optimizer]}, {measured.cell.method}"


def _model(setting: Setting) -> str:
    name = {"transformer": "Transformer", "transformer-xl": "Transformer-XL"}[setting.model]
    return f"{name} of {setting.layers} layers, {'tied' if setting.tied else 'untied'}"


def _batches(measured: Measured) -> str:
    if not measured.batches:
        return ""
    if math.isinf(measured.mean_batches):
        arrived = [f"{x:.2f}" for x in measured.batches if math.isfinite(x)]
        return f"> {measured.limit:.2f}" + (f" (one seed {', '.join(arrived)})" if arrived else "")
    return f"{measured.mean_batches:.3f} ({', '.join(f'{x:.3f}' for x in measured.batches)})"


def _speed_up(measured: Measured) -> str:
    if not measured.batches:
        return ""
    if math.isinf(measured.mean_batches):
        return f"< {measured.speed_up(measured.limit):.2f}"
    return f"{measured.speed_up(measured.mean_batches):.2f}"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "diverged"


if __name__ == "__main__":
    main()
