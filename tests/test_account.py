"""What reports come to, by hand."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_dgmp
from lightning_dgmp.account import advice_for, efficiency, period, scalars_of, speedup, summary_of
from lightning_dgmp.pictures import draw_timeline
from lightning_dgmp.reports import Report, saved_by
from lightning_dgmp.simulator import StageCost, delayed, simulate
from lightning_dgmp.timing import KINDS, Span


def report(period: float = 0.1, **shares: float) -> Report:
    by_kind = {**dict.fromkeys((*KINDS, "other"), 0.0), **shares}
    by_kind["other"] += 1 - sum(by_kind.values())
    return Report(50, by_kind, [], period, *range(1, 9))


FAST = report(forward=0.15, backward=0.3, update=0.05, wait_error=0.45)
SLOW = report(forward=0.3, backward=0.6, update=0.06)


def test_the_slowest_stage_decides() -> None:
    reports = [FAST, SLOW]
    assert period(reports) == pytest.approx(0.1)
    assert efficiency(reports) == pytest.approx(0.96)
    assert speedup(reports) == pytest.approx(1.46)
    assert summary_of([reports, reports]) == (
        "a batch takes 100.0 ms, the slowest of 2 stages computes in 96 % of that, 1.46 times as fast as one device."
    )


def test_the_names_of_scalars() -> None:
    values = scalars_of([FAST, SLOW])
    assert values["stage_0/wait_error"] == 0.45
    assert values["stage_1/delay"] == 1
    assert values["stage_1/snapshot_distance"] == 8
    for stage in range(2):
        assert sum(values[f"stage_{stage}/{kind}"] for kind in (*KINDS, "other")) == pytest.approx(1)


@pytest.mark.parametrize(
    ("reports", "advice"),
    [
        ([SLOW, SLOW], None),
        ([FAST, SLOW], "Stage 0 of the pipeline waits for an error in 45 % of the time: stage 1 computes in 96 %"),
        ([SLOW, report(forward=0.2, wait_activation=0.7)], "Stage 1 of the pipeline waits for an activation in 70 %"),
        ([FAST, SLOW], 'with `balance="measured"`'),
        (
            [report(forward=0.2, backward=0.4, wait_data=0.3), report(forward=0.2, backward=0.4, wait_activation=0.35)],
            "Stage 1 of the pipeline waits for an activation in 35 % of the time: stage 0 waits for its data loader",
        ),
        (
            [report(forward=0.2, backward=0.4, wait_error=0.3), report(forward=0.2, backward=0.4, other=0.35)],
            "callbacks, hooks and logging take 40 % of the time of stage 1.",
        ),
        (
            [report(forward=0.2, backward=0.4, wait_error=0.4), report(forward=0.2, backward=0.4, wait_activation=0.4)],
            "`slack=1`",
        ),
    ],
)
def test_advice_follows_from_where_a_stage_waits(reports: Any, advice: str | None) -> None:
    said = advice_for(reports)
    assert (said is None) if advice is None else (said is not None and advice in said), said


class Warns:
    """In the place of a module that warns when it is imported."""

    def __getattr__(self, _: str) -> Any:
        raise DeprecationWarning("matplotlib is old")


def test_a_monitor_says_what_it_cannot_do_where_warnings_are_errors(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "lightning_dgmp.pictures", raising=False)
    monkeypatch.delattr(lightning_dgmp, "pictures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", Warns())
    trainer: Any = SimpleNamespace(loggers=[TensorBoardLogger(str(tmp_path))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lightning_dgmp.DelayedMPMonitor()._draw("balance", trainer, lambda pictures: pictures.draw_balance(None))
    text = "The pipeline's monitor could not draw: DeprecationWarning: matplotlib is old"
    assert capsys.readouterr().err == f"{text}\n"


def test_what_a_graph_keeps_is_counted_from_outside() -> None:
    calls: list[int] = []
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Dropout(), nn.Flatten(), nn.Linear(64, 8))
    body.register_forward_hook(lambda *_: calls.append(1))
    x, packed = torch.randn(2, 3, 6, 6, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        body(x)[:, torch.tensor([0, 2])].square().sum()
    found = saved_by([body(x)[:, torch.tensor([0, 2])].square().sum()])
    assert sorted(t.shape for t in found) == sorted(t.shape for t in packed if type(t) is Tensor)
    calls.clear()
    assert saved_by([checkpoint(body, x, use_reentrant=False)]) == []
    assert calls == [1]  # nothing runs again


def test_the_number_of_a_batch_stands_beside_waits() -> None:
    spans = [Span("forward", 7, 0.0, 10.0), Span("wait_activation", 7, 1.0, 8.0), Span("wait_send", 7, 9.5, 9.8)]
    figure = draw_timeline([spans])
    (number,) = figure.axes[0].texts
    assert (number.get_text(), number.get_position()) == ("7", (pytest.approx(8750), 0))


def test_late_batches_are_numbered_by_their_last_digits() -> None:
    costs = [StageCost(1.0, 2.0)] * 4
    stages = [[s._replace(batch=s.batch + 11_970) for s in spans[60:120]] for spans in simulate(delayed(4, 60), costs)]
    axes = draw_timeline(stages, num_batches=4).axes[0]
    assert len(axes.texts) == sum(bar.get_width() > 1 for bar in axes.patches)  # all that are no slivers
    assert {text.get_text() for text in axes.texts} == {"05", "06", "07", "08", "09", "10", "11"}
    assert axes.get_xlabel() == "milliseconds; last two digits of batches 12005 to 12011"


def test_bad_input_of_the_monitor() -> None:
    with pytest.raises(ValueError, match="`trace_steps` must be two steps, the first before the second, but is"):
        lightning_dgmp.DelayedMPMonitor(trace_steps=(5, 5))
    with pytest.raises(ValueError, match="`trace_steps` must be at most 10000 steps apart, but is"):
        lightning_dgmp.DelayedMPMonitor(trace_steps=(5, 20_000))
