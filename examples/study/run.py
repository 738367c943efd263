"""Run the study: short trainings by virtual stages, one after another, each a line of JSON.

    python examples/study/run.py --data enwik8.gz                # the first two hours of it
    python examples/study/run.py --data enwik8.gz --only bare    # the runs of one group
    python examples/study/run.py --list                          # what is there and what is missing
    python examples/study/report.py                              # RESULTS.md, from what is there

All runs take four to eight hours on two cores. The most informative come first, ``--hours`` ends the study anywhere,
and it goes on where it was: every run is appended to ``results.jsonl`` when it ends, and what is there is not run
again. The text may be plain, .gz or .zip; runs on different texts do not belong into one file.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from study.plan import GROUPS, missing_rows, progress
from study.results import RESULTS, read_results, write_results
from study.setting import Setting
from study.training import train


def parse_arguments(argv: Sequence[str] | None = None) -> Namespace:
    """The flags that ``--help`` lists."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="the text, such as enwik8 or a beginning of it")
    add("--hours", type=float, default=2.0, help="no run begins later than that (default 2)")
    add("--workers", type=int, default=2, help="runs at a time, of one thread each (default 2)")
    names = [group.name for group in GROUPS]
    add("--only", nargs="+", choices=names, metavar="GROUP", default=names, help=f"of {', '.join(names)} (default all)")
    add("--results", type=Path, default=RESULTS, help="the file of results (default beside this one)")
    add("--list", action="store_true", help="only say what is there")
    args = parser.parse_args(argv)
    if args.data is None and not args.list:
        parser.error("--data is needed: name a text, such as enwik8")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, until nothing is or the time is over."""
    args = parse_arguments(argv)
    if args.list:
        for group in GROUPS:
            print("{:16} {:4} of {:4} runs".format(group.name, *progress(group.cells, read_results(args.results))))
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    cells = [cell for group in GROUPS if group.name in args.only for cell in group.cells]
    end = time.monotonic() + args.hours * 3600
    running: dict[Future[dict[str, Any]], Setting] = {}
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as workers:
        while True:
            results = read_results(args.results)
            todo = (row for row in missing_rows(cells, results) if row not in running.values())
            while len(running) < args.workers and time.monotonic() < end and (row := next(todo, None)) is not None:
                running[workers.submit(train, row, args.data)] = row
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                setting, row = running.pop(future), future.result()
                results = {**read_results(args.results), setting: row}
                write_results(args.results, results.values())
                print(f"{row['final']} bits, {row['seconds']:.0f} s: {setting}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nStopped. The runs that have ended are kept; the same command goes on from there.") from None
