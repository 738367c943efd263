"""The file of results: one JSON object a line, one line a run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from study.setting import Setting

__all__ = ["RESULTS", "Results", "read_results", "write_results"]

#: What a run has given, by its setting.
Results = dict[Setting, Mapping[str, Any]]

RESULTS = Path(__file__).with_name("results.jsonl")

_NAMES = [field.name for field in fields(Setting)]


def read_results(path: Path) -> Results:
    """All finished runs; none if there is no file. What a row does not say has its default."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {Setting(**{name: row[name] for name in _NAMES if name in row}): row for row in rows}


def write_results(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the file by ``rows`` in one step, so that it is whole whenever a study is stopped."""
    beside = path.with_name(path.name + ".new")
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(beside, path)
