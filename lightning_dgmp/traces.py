"""Timelines as files for trace viewers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lightning_dgmp.timing import Span

__all__ = ["write_trace"]


def write_trace(path: Path, stages: Sequence[Sequence[Span]]) -> None:
    """Write the spans of all stages in the format of https://ui.perfetto.dev and chrome://tracing, a row a stage.

    Args:
        path: Of the file; its folder is made.
        stages: The spans of each, input first.
    """
    begin = min((span.start for spans in stages for span in spans), default=0.0)
    events: list[dict[str, object]] = []
    for stage, spans in enumerate(stages):
        where = {"pid": 0, "tid": stage}
        events.append({"ph": "M", "name": "thread_name", **where, "args": {"name": f"stage {stage}"}})
        for span in spans:
            times = {"ts": 1e6 * (span.start - begin), "dur": 1e6 * (span.end - span.start)}
            name = f"{span.kind} {span.batch}"
            events.append({"ph": "X", "name": name, "cat": span.kind, **where, **times, "args": {"batch": span.batch}})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
