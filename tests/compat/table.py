"""``python -m tests.compat.table``: which modules work, and why others do not, as a Markdown table."""

from __future__ import annotations

import argparse
import contextlib
import re
import tempfile
from pathlib import Path
from typing import Any

from tests.compat.harness import compare, whole_story
from tests.compat.modules import CASES
from tests.pool import Failure, WorkerPool


def verdict(pool: WorkerPool, name: str, num_stages: int, mode: str = "processes") -> str:
    """Whether a module works, or why not in a sentence."""
    with tempfile.TemporaryDirectory() as folder:
        tell = _Teller(pool, name, Path(folder))
        if mode == "plain":
            return _reason(tell(None, 1)) or "works"
        expected = tell({"num_stages": num_stages, "virtual": True}, 1)
        if mode == "virtual":
            return _reason(expected) or "works"
        results = tell({"num_stages": num_stages}, num_stages)
        if (reason := _reason(results)) is not None:
            return reason
        if (reason := _reason(expected)) is not None:
            return f"works, but not with virtual stages: {reason}"
        try:
            compare(results[0], expected[0], CASES[name].tolerance)
        except AssertionError as error:
            return f"differs: {_first_sentence(str(error))}"
    return "works"


class _Teller:
    def __init__(self, pool: WorkerPool, name: str, folder: Path) -> None:
        self.pool, self.name, self.folder = pool, name, folder

    def __call__(self, strategy: dict[str, Any] | None, devices: int) -> list[Any]:
        folder = str(self.folder / f"{devices}-{strategy is not None and 'virtual' in strategy}")
        try:
            return self.pool.try_run(whole_story, devices, self.name, strategy, devices, folder, timeout=90)
        except AssertionError as error:
            return [Failure(error)]


def _reason(results: list[Any]) -> str | None:
    failures = [result for result in results if isinstance(result, Failure)]
    if not failures:
        return None
    first = next((failure for failure in failures if failure.type != "PeerError"), failures[0])
    return f"{first.type}: {_first_sentence(first.message)}"


def _first_sentence(text: str) -> str:
    text = re.split(r"(?<=[.])\s+(?=[A-Z`])", " ".join(text.split()))[0]
    return text.replace("|", "\\|")[:400]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="module", help="by default all")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4], metavar="K")
    parser.add_argument("--mode", choices=["processes", "virtual", "plain"], default="processes")
    arguments = parser.parse_args()
    print("| module | pattern |" + "".join(f" K = {k} |" for k in arguments.stages))
    print("|---|---|" + "---|" * len(arguments.stages))
    with contextlib.closing(WorkerPool()) as pool:
        for name in arguments.names or CASES:
            cells = [verdict(pool, name, k, arguments.mode) for k in arguments.stages]
            cells = ["the same" if i and cell == cells[0] != "works" else cell for i, cell in enumerate(cells)]
            print(f"| {name} | {CASES[name].pattern} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
