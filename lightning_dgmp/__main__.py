"""``python -m lightning_dgmp``: plans, simulations and accounts without training, and scripts as they are."""

from __future__ import annotations

import json
import sys
from argparse import REMAINDER, ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from traceback import format_exc
from typing import Any

__all__ = ["main"]

_PLAN = """\
Where a LightningModule would be cut, how fast that would be, and what each stage would hold. Nothing is trained: the
step is traced on the first batch, with TensorBoard's logger in a folder that is gone afterwards.

    python -m lightning_dgmp plan train.py:LitModel --data train.py:DataModule --stages 2 4 8
    python -m lightning_dgmp plan project.models:GPT --args '{"layers": 24}' --data project.data:make_loader
"""
_SIMULATE = """\
What a pipeline takes, from what its stages take, in milliseconds: the delayed schedule beside the synchronous ones.

    python -m lightning_dgmp simulate --forward 10 10 14 10 --backward 20 20 28 20
    python -m lightning_dgmp simulate --forward 10 10 --backward 20 20 --latency 20 --slack 1 --png timeline.png
"""
_REPORT = """\
The account of a finished run that has logged for TensorBoard; beside another one, how many times sooner it has reached
the same loss, as the product of its two factors: time per step, and steps.

    python -m lightning_dgmp report lightning_logs/version_3
    python -m lightning_dgmp report lightning_logs/version_3 lightning_logs/version_2 --loss val_loss --png both.png
"""
_RUN = """\
Run a script with `strategy="delayed_mp"` registered, so that it need not import this package.

    python -m lightning_dgmp run train.py --epochs 3
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says, and return its exit code: 0, or 1 for what cannot be done."""
    args = _parser().parse_args(argv)
    try:
        args.function(args)
    except _Refused as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 1
    return 0


class _Refused(Exception):
    """What was asked for cannot be done."""


@contextmanager
def _refusing(*kinds: type[Exception]) -> Iterator[None]:
    """Let errors of these kinds, whose text says all there is to know, be refusals."""
    try:
        yield
    except kinds as error:
        raise _Refused(str(error)) from error


def _parser() -> ArgumentParser:
    parser = ArgumentParser("python -m lightning_dgmp", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, description: str, function: Any) -> ArgumentParser:
        summary = description.partition("\n\n")[0].replace("\n", " ")
        style = RawDescriptionHelpFormatter
        added = commands.add_parser(name, help=summary, description=description, formatter_class=style)
        added.set_defaults(function=function)
        return added

    add = command("plan", _PLAN, _plan).add_argument
    add("module", help="the LightningModule, as package.module:Name or script.py:Name; a class or a function is called")
    add("--args", type=_arguments, default={}, metavar="JSON", help="its arguments")
    add("--data", help="a LightningDataModule or a loader, in the same way; by default the module's own")
    add("--data-args", type=_arguments, default={}, metavar="JSON", help="its arguments")
    add("--stages", type=int, nargs="+", default=[2, 4, 8], help="how many (default 2 4 8)")
    add("--memory-limit", type=_bytes, metavar="BYTES", help="the most that a process may hold, as 20e9 (default: any)")
    add("--json", action="store_true", help="print JSON")

    add = command("simulate", _SIMULATE, _simulate).add_argument
    add("--forward", type=float, nargs="+", required=True, help="ms of each stage for the forward of a batch")
    add("--backward", type=float, nargs="+", required=True, help="ms of each stage for the backward of a batch")
    add("--update", type=float, nargs="+", default=[0.0], help="ms of each stage, or of all, for the optimizer")
    add("--bytes", type=float, nargs="+", default=[0.0], help="that each stage, or all, send to the next for a batch")
    add("--latency", type=float, default=0.0, help="ms of a link between neighbours")
    add("--bandwidth", type=float, default=float("inf"), help="bytes a second of a link")
    add("--slack", type=int, default=0, help="more batches in flight between neighbours (default 0)")
    add("--microbatches", type=int, default=8, help="of a batch, in the synchronous schedules (default 8)")
    add("--png", type=Path, help="draw the timeline of the delayed schedule into this file")
    add("--json", action="store_true", help="print JSON")

    add = command("report", _REPORT, _report).add_argument
    add("logdir", type=Path, help="the folder of the run")
    add("other", type=Path, nargs="?", help="that of a run to compare it with")
    add("--loss", help="the scalar by which to compare (default: a loss that both have)")
    add("--png", type=Path, help="draw into this file")
    add("--json", action="store_true", help="print JSON")

    add = command("run", _RUN, _run).add_argument
    add("script", type=Path)
    add("arguments", nargs=REMAINDER, help="of the script, `--json` too: this command has none").required = False
    return parser


def _arguments(text: str) -> dict[str, Any]:
    """Those of a call, from JSON."""
    with suppress(ValueError):
        if isinstance(found := json.loads(text), dict):
            return found
    raise ArgumentTypeError(f"""must be a JSON object, such as '{{"layers": 24}}', but is {text!r}""")


def _bytes(text: str) -> int:
    """A number of bytes."""
    with suppress(ValueError, OverflowError):
        if (found := int(float(text))) > 0:
            return found
    raise ArgumentTypeError(f"must be a number of bytes above 0, such as 20e9, but is {text!r}")


def _save(path: Path, draw: str, *args: Any) -> None:
    """Draw into the file ``path``."""
    try:
        from lightning_dgmp import pictures

        getattr(pictures, draw)(*args).savefig(path)
    except ImportError:
        raise _Refused("`--png` draws with matplotlib, which is missing: `pip install matplotlib`.") from None
    except (OSError, ValueError) as error:
        raise _Refused(f"`--png` must be a file that can be written, but {str(path)!r} is not: {error}") from error


def _plan(args: Namespace) -> None:
    from lightning_dgmp import project

    with redirect_stdout(sys.stderr):  # what the project prints is no part of the plan
        with _refusing(ValueError):
            module = project.make_module(args.module, args.args)
            data = None if args.data is None else project.make_data(args.data, args.data_args)
        from lightning_dgmp import planning  # late, because it takes the Lightning that the project has imported

        try:
            with _refusing(*planning.REFUSALS):
                trace, budget = planning.trace_of(module, data)
        except _Refused:
            raise
        except Exception as error:
            raise _Refused(f"{project.place_of(error)} raised {project.text_of(error)}\n\n{format_exc()}") from error
    plans = planning.plans_of(trace, module, args.stages, replace(budget, limit=args.memory_limit))
    found = [planning.as_json(number, plan) for number, plan in plans.items()]
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        for (number, plan), one in zip(plans.items(), found):
            print(f"\n{number} stages")
            print(plan if isinstance(plan, str) else planning.describe(plan, one))
    if all("refused" in one for one in found):
        raise _Refused("the module can be cut into none of these numbers of stages.")


def _simulate(args: Namespace) -> None:
    from lightning_dgmp import simulator

    if not 0 <= args.latency < float("inf"):
        raise _Refused(f"`latency` must be at least 0 ms and finite, but is {args.latency:g} ms.")
    with _refusing(ValueError):
        costs = simulator.costs_of(args.forward, args.backward, args.update, args.bytes)
        link = simulator.Link(args.latency / 1000, args.bandwidth)
        rows = simulator.beside_each_other(costs, link, args.slack, args.microbatches)
    if args.png is not None:
        timeline = [stage[:40] for stage in rows[0][1].timeline]
        _save(args.png, "draw_timeline", timeline, "The delayed schedule, simulated")
    if args.json:
        keys = ("period", "efficiency", "speedup")
        print(json.dumps([{"schedule": name, **{k: getattr(p, k) for k in keys}} for name, p in rows], indent=2))
        return
    print(f"{'':30}  ms per batch  busy  times as fast as one device")
    for name, prediction in rows:
        period, busy, speedup = 1000 * prediction.period, 100 * prediction.efficiency, prediction.speedup
        print(f"{name:30}  {period:12.2f}  {busy:3.0f} %  {speedup:.2f}")


def _report(args: Namespace) -> None:
    from lightning_dgmp import logs

    with _refusing(ValueError):
        runs = [logs.read_run(folder) for folder in (args.logdir, args.other) if folder is not None]
        comparison = logs.compare(runs[0], runs[1], logs.loss_tag(runs, args.loss)) if runs[1:] else None
        accounts = [logs.as_json(run) for run in runs]
    if args.png is not None:
        _save(args.png, "draw_runs", runs, comparison)
    if args.json:
        told = None if comparison is None else comparison._asdict()
        print(json.dumps({"runs": accounts, "comparison": told}, indent=2))
    else:
        texts = [logs.describe(run) for run in runs]
        if comparison is not None:
            texts.append(comparison.table(logs.names_of(runs), [run.seconds_per_step for run in runs]))
        print("\n\n".join(texts))


def _run(args: Namespace) -> None:
    from lightning_dgmp.running import run_script

    if not args.script.is_file():
        raise _Refused(f"there must be a script, but {str(args.script)!r} is no file.")
    run_script(args.script, args.arguments)


if __name__ == "__main__":
    raise SystemExit(main())
