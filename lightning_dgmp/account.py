"""What reports of all stages come to: how fast the pipeline is, and what would make it faster."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_dgmp.reports import Report
from lightning_dgmp.timing import KINDS

__all__ = ["advice_for", "efficiency", "period", "scalars_of", "speedup", "summary_of"]

_LONG_WAIT = 0.2  # of the time of a stage
_BUSY = 0.8  # a stage that computes for so much of the time leaves little to gain but by balance


def period(reports: Sequence[Report]) -> float:
    """Seconds from one batch to the next."""
    return sum(report.period for report in reports) / len(reports)


def efficiency(reports: Sequence[Report]) -> float:
    """The share of the time in which the slowest stage computes."""
    return max(report.busy for report in reports) / period(reports)


def speedup(reports: Sequence[Report]) -> float:
    """How many times faster than one device that runs all stages one after another."""
    return sum(report.busy for report in reports) / period(reports)


def scalars_of(reports: Sequence[Report]) -> dict[str, float]:
    """All numbers by the names under which they are logged."""
    values = {
        "pipeline/period": period(reports),
        "pipeline/efficiency": efficiency(reports),
        "pipeline/speedup": speedup(reports),
    }
    numbers = [
        "delay", "in_flight", "bytes_sent", "parameter_bytes", "snapshot_bytes", "activation_bytes", "gradient_norm",
        "snapshot_distance",
    ]  # fmt: skip
    for stage, report in enumerate(reports):
        values |= {f"stage_{stage}/{kind}": report.shares[kind] for kind in (*KINDS, "other")}
        values |= {f"stage_{stage}/{name}": getattr(report, name) for name in numbers}
    return values


def summary_of(intervals: Sequence[Sequence[Report]]) -> str:
    """One line about several intervals."""
    mean = [sum(f(reports) for reports in intervals) / len(intervals) for f in (period, efficiency, speedup)]
    return (
        f"a batch takes {1000 * mean[0]:.1f} ms, the slowest of {len(intervals[0])} stages computes in"
        f" {100 * mean[1]:.0f} % of that, {mean[2]:.2f} times as fast as one device."
    )


def advice_for(reports: Sequence[Report]) -> str | None:
    """What to do if a stage waits for much of its time; ``None`` if there is nothing to gain.

    The text up to the colon says which stage waits for what.
    """
    waits = {
        (report.shares[kind], stage, kind)
        for stage, report in enumerate(reports)
        for kind in KINDS
        if kind.startswith("wait_")
    }
    share, stage, kind = max(waits)
    if share <= _LONG_WAIT:
        return None
    loading = max(report.shares["wait_data"] for report in reports[:1])
    slowest = max(range(len(reports)), key=lambda k: reports[k].busy)
    others, distracted = max((report.shares["other"], k) for k, report in enumerate(reports))
    what = {
        "wait_activation": "an activation",
        "wait_error": "an error",
        "wait_data": "data",
        "wait_send": "a receiver",
    }
    text = f"Stage {stage} of the pipeline waits for {what[kind]} in {100 * share:.0f} % of the time: "
    if loading > _LONG_WAIT:
        return text + "stage 0 waits for its data loader. Give the `DataLoader` more `num_workers`, or cheaper work."
    if efficiency(reports) > _BUSY:
        return text + (
            f"stage {slowest} computes in {100 * efficiency(reports):.0f} % of the time, so the others wait for it."
            ' Move modules away from it with `balance="measured"` or `split_at`, or use fewer stages.'
        )
    if others > _LONG_WAIT:
        return text + (
            f"callbacks, hooks and logging take {100 * others:.0f} % of the time of stage {distracted}. Log less often,"
            " or use larger batches."
        )
    return text + (
        "no stage computes all the time, so messages take long in comparison with a batch. Use larger batches, or"
        " `slack=1`, so that more of them are under way."
    )
