"""Throughput of delayed model parallelism beside that of its peers, on two cores.

One command measures everything in one run, on the same model, batch and optimizer::

    python examples/benchmarks/throughput.py [--rounds 5] [--batches 6] [--only SECTION] [--json FILE]

It takes about 15 minutes on two cores that do nothing else; ``--quick`` takes about a minute and only shows that all of
it works: two cores that others use too give numbers without meaning. What is measured:

real       A Transformer language model computes on two cores, one thread a process: one process (plain Lightning), DDP
           with two processes (each takes *half* of the batch, so that the batch of a step is the same everywhere),
           ``torch.distributed.pipelining`` with GPipe and 1F1B on two stages, and this project on two stages, or with
           two replicas of one stage.
emulated   The blocks of the model *sleep* (15 ms forward and 30 ms backward, say) in the place of computing, so that 4,
           8 or 11 stages can be timed on two cores, also with links between them on which messages take longer. It
           measures the schedule and the runtime, not arithmetic, and says nothing about the speed of a machine. Every
           such row is labelled.
options    What an option of this project costs: the same model on two stages, with and without it, in percent. With
           accumulation also per update of as many rows: K batches of a K-th of them against one of all.
monitor    The same of the monitor, with TensorBoard and all defaults, on steps of 50 ms (emulated).
overhead   What this project adds to a step in Python, per process: see :func:`measure_overhead`.

A time is that of one batch in the steady state: the mean over a block of batches after a warm-up (``2K + 3`` batches on
``K`` stages here, when all stages are busy), and of the process that took longest for its block. All rows of a section
take turns, round after round and every second round backwards, so that a machine that gets slower slows all of them
down. The table shows for each row the median over the rounds and ``[least .. greatest]``; ratios are taken inside a
round. A ratio is the throughput relative to one process of the same model. What to expect from this project: 1.8 times
or more with two real stages, and with emulated compute nearly as many times as there are stages: 3.7 on 4, 6.8 on 8. Of
12 equal blocks on 11 stages one stage holds two, so there 6 is the most that is possible.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import socket
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import peers
import torch
from peers import ModelSpec, Spent

from lightning_dgmp.simulator import Link, StageCost, delayed, predict

TRANSFORMER = ModelSpec(num_blocks=12, width=128, context=128, batch_size=16)
SLEEPERS = {  # a batch takes one process some hundred milliseconds of sleep
    num_blocks: ModelSpec(num_blocks, width=64, context=1, batch_size=16, sleep=seconds)
    for num_blocks, seconds in ((16, 0.015), (12, 0.025), (64, 0.004))
}
SLOW_STEPS = ModelSpec(num_blocks=2, width=64, context=1, batch_size=16, sleep=0.05 / 3)  # a stage takes 50 ms
OPTIONS: dict[str, dict[str, Any]] = {
    'backward="recompute"': {"strategy_args": {"backward": "recompute"}},
    'backward="replay"': {"strategy_args": {"backward": "replay"}},
    "message_dtype=torch.bfloat16": {"strategy_args": {"message_dtype": torch.bfloat16}},
    "predict_weights=True": {"strategy_args": {"predict_weights": True}},
    "lr_discount_steps=10**6": {"strategy_args": {"lr_discount_steps": 10**6}},
    "correct_updates=True": {"strategy_args": {"correct_updates": True}},
    'precision="bf16-mixed"': {"precision": "bf16-mixed"},
    "gradient_clip_val=1.0": {"gradient_clip_val": 1.0},
    'gradient_clip_val=1.0, gradient_clip_algorithm="value"': {
        "gradient_clip_val": 1.0,
        "gradient_clip_algorithm": "value",
    },
    "accumulate_grad_batches=2": {"accumulate_grad_batches": 2},
}
LATENCY = 0.06  # seconds
COSTS = ("options", "monitor")  # sections of which each row is the first one with an option
PAUSE = 0.02  # seconds after each batch where processor time is measured
TINY = ModelSpec(num_blocks=12, width=16, context=8, batch_size=2)


@dataclass
class Row:
    """One line of the table and what was measured for it.

    Attributes:
        section: Rows of one section train the same model; the first is one process.
        name: For the table.
        num_processes: How many processes train.
        spec: The model.
        function: From :mod:`peers`; runs on every process.
        options: Its further arguments.
        warmup: How many batches are not measured.
        scale: How many times ``--batches`` are measured.
        parts: How many batches of as many times fewer rows stand for a batch, as with accumulation.
        seconds: A batch, or its parts, one entry a round.
        cuts: The first module of each stage, for rows of this project.
        predicted: What the simulator says of a batch, from what the stages were busy with, one entry a round.
    """

    section: str
    name: str
    num_processes: int
    spec: ModelSpec
    function: Callable[..., Spent]
    options: dict[str, Any] = field(default_factory=dict)
    warmup: int = 3
    scale: int = 1
    parts: int = 1
    seconds: list[float] = field(default_factory=list)
    cuts: tuple[str, ...] = ()
    predicted: list[float] = field(default_factory=list)

    @property
    def compute(self) -> str:
        return "real" if self.spec.sleep is None else "emulated"


def real_rows(quick: bool) -> list[Row]:
    """Real compute, two cores."""
    section = f"{TRANSFORMER.num_blocks} Transformer blocks"
    rows = [
        Row(section, "one process", 1, TRANSFORMER, peers.run_one),
        Row(section, "DDP, half a batch each", 2, TRANSFORMER, peers.run_ddp),
    ]
    for schedule in ("GPipe", "1F1B"):
        rows += [
            _pipelining(section, TRANSFORMER, 2, schedule, microbatches)
            for microbatches in ((8,) if quick else (2, 4, 8))
        ]
    return [*rows, _delayed(section, TRANSFORMER, 1, 2), _delayed(section, TRANSFORMER, 2)]


def option_rows(quick: bool) -> list[Row]:
    """Real compute, two stages, with one option a row; the first has none."""
    rows = [_delayed("options", TRANSFORMER, 2)]
    for name, options in OPTIONS.items():
        row = _delayed("options", TRANSFORMER, 2)
        row.name, row.options = name, options
        rows.append(row)
    halves = _delayed("options", replace(TRANSFORMER, batch_size=TRANSFORMER.batch_size // 2), 2)
    halves.name, halves.options = "accumulate_grad_batches=2 of half the rows", {"accumulate_grad_batches": 2}
    halves.parts = 2
    rows.append(halves)
    return rows[:3] if quick else rows


def monitor_rows(quick: bool) -> list[Row]:
    """Emulated compute, two stages, without and with the monitor."""
    rows = [_delayed("monitor", SLOW_STEPS, 2) for _ in range(2)]
    rows[1].name, rows[1].options = "TensorBoard and the monitor", {"is_watched": True}
    for row in rows:
        row.scale = 1 if quick else 50  # so that some reports and pictures are among what is measured
    return rows


def emulated_rows(quick: bool) -> list[Row]:
    """Emulated compute: the blocks sleep."""
    rows: list[Row] = []
    for num_blocks, stages in ((16, (2, 4, 8)), (12, (11,)), (64, (4,))):
        stages = tuple(k for k in stages if k <= 4) if quick else stages
        spec, section = SLEEPERS[num_blocks], f"{num_blocks} sleeping blocks"
        if stages:
            rows.append(Row(section, "one process", 1, spec, peers.run_one, warmup=2))
        for num_stages in stages:
            microbatches = 8 if num_stages <= 8 else 16  # 1F1B refuses fewer than there are stages
            rows.append(_pipelining(section, spec, num_stages, "1F1B", microbatches))
            rows.append(_delayed(section, spec, num_stages))
            if num_blocks == 16 and num_stages == 4 and not quick:
                rows += [_delayed(section, spec, num_stages, 2), *(_far(section, spec, 4, slack) for slack in (0, 1))]
    return rows


def _pipelining(section: str, spec: ModelSpec, num_stages: int, schedule: str, microbatches: int) -> Row:
    options = {"schedule": schedule, "microbatches": microbatches}
    name = f"{schedule}, K={num_stages}, {microbatches} microbatches"
    return Row(section, name, num_stages, spec, peers.run_pipelining, options)


def _delayed(section: str, spec: ModelSpec, num_stages: int, num_replicas: int = 1) -> Row:
    warmup, scale = 2 * num_stages + 3, max(num_stages // 2, 1)
    name = f"delayed_mp, K={num_stages}" + (f", R={num_replicas}" if num_replicas > 1 else "")
    options = {"num_replicas": num_replicas} if num_replicas > 1 else {}
    return Row(section, name, num_stages * num_replicas, spec, peers.run_delayed, options, warmup, scale)


def _far(section: str, spec: ModelSpec, num_stages: int, slack: int) -> Row:
    """Links that take a third of a batch's time."""
    row = _delayed(section, spec, num_stages)
    row.name += f", latency of {1000 * LATENCY:.0f} ms" + (f", slack={slack}" if slack else "")
    row.options, row.warmup = {"latency": LATENCY, "strategy_args": {"slack": slack}}, row.warmup + 4 * num_stages
    return row


# ----- measuring


def measure(pool: Pool, rows: Sequence[Row], rounds: int, batches: int) -> None:
    """Fill in ``seconds`` of all rows, in turns."""
    for number in range(rounds):
        start = time.perf_counter()
        for row in rows if number % 2 == 0 else rows[::-1]:
            count = batches * row.scale * row.parts
            spent = pool.run(row.function, row.num_processes, row.spec, row.warmup, count, **row.options)
            row.seconds.append(row.parts * max(one.wall for one in spent))
            row.cuts = spent[0].cuts
            if row.function is peers.run_delayed and not row.options.get("num_replicas") and spent[0].busy:
                costs = [StageCost(*one.busy) for one in spent[::-1] if one.busy]
                slack = row.options.get("strategy_args", {}).get("slack", 0)
                schedule, link = delayed(len(costs), 10 * len(costs), slack), Link(row.options.get("latency", 0))
                row.predicted.append(predict(schedule, costs, link).period)
        print(f"round {number + 1} of {rounds}: {time.perf_counter() - start:.0f} s", flush=True)


def measure_overhead(pool: Pool, rounds: int, batches: int) -> list[dict[str, Any]]:
    """What this project adds to a step, in milliseconds of processor time per process; making the plan is not counted.

    The 12 blocks are so small that arithmetic does not matter. Counted is the processor time of a stage's process in
    the steady state (waiting costs none) less that of a process in which plain Lightning trains the layers of that
    stage alone: the same number of the same blocks, with the embedding on the first stage and the head and the loss on
    the last. As many such processes run side by side as there are stages. Both sides pause after every batch, as a
    process does that waits for another: a processor that comes back to a process is slower for some milliseconds
    (caches, clock), which would else be counted on one side alone. What is left is the work of this project: standing
    in for the modules of other stages, copying weights, random states, queues and messages. ``thread`` is the part of
    the training thread, which delays the step; ``all`` is with the threads that send and receive, and with what gloo
    does in them. The cuts are put between blocks, so that both sides run the same layers; for two stages also where the
    strategy puts them by itself, which may be inside a block: there the other stages must follow the operations of that
    block one by one, and the two sides run the same layers only up to a part of a block.
    """
    results: list[dict[str, Any]] = []
    for num_stages, even in ((2, True), (4, True), (2, False)):
        ours: list[list[Spent]] = []
        plain: list[list[Spent]] = []
        for _ in range(rounds):
            ours.append(
                pool.run(peers.run_delayed, num_stages, TINY, 2 * num_stages + 3, batches, even=even, pause=PAUSE)[::-1]
            )
            plain.append(pool.run(peers.run_share, num_stages, TINY, 2 * num_stages + 3, batches, pause=PAUSE)[::-1])
        for stage in range(num_stages):
            result: dict[str, Any] = {"num_stages": num_stages, "stage": stage, "even": even, "cuts": ours[0][-1].cuts}
            for kind, attribute in (("thread", "thread"), ("all", "cpu")):
                with_us = [1000 * getattr(spent[stage], attribute) for spent in ours]
                without = [1000 * getattr(spent[stage], attribute) for spent in plain]
                result[kind] = {
                    "ours": statistics.median(with_us),
                    "plain": statistics.median(without),
                    "added": [a - b for a, b in zip(with_us, without)],
                }
            results.append(result)
    return results


# ----- showing


def table(rows: Sequence[Row]) -> str:
    """All rows as text, and under them what the sections say."""
    cells = [("", "processes", "compute", "ms per batch", "ratio to one process, or cost of an option")]
    for row in rows:
        if row.name == "one process" or (row.section in COSTS and not row.options):
            cells.append((f"-- {row.section}", "", "", "", ""))
        cells.append(
            (
                row.name,
                str(row.num_processes),
                row.compute,
                spread([1000 * s for s in row.seconds], 1),
                _cost(row, rows) if row.section in COSTS else spread(_ratios(row, rows), 2),
            )
        )
    lines = _align(cells)
    for row in rows:
        if row.function is not peers.run_delayed or row.section in COSTS or not row.cuts:
            continue
        rivals = [r.seconds for r in rows if r.section == row.section and r.num_processes == row.num_processes
                  and r.options.get("schedule") == "1F1B"]  # fmt: skip
        best = [min(times) for times in zip(*rivals)]
        if not best:
            continue
        ratio = spread([b / own for b, own in zip(best, row.seconds)], 2)
        lines.append(f"{row.name}, {row.section} ({row.compute}): {ratio} times the best 1F1B in each round")
        lines.append(f"    stages begin with {', '.join(row.cuts)}")
        if row.predicted:
            ratio = spread([p / s for p, s in zip(row.predicted, row.seconds)], 3)
            lines.append(f"    the simulator predicts {ratio} times what was measured, from the work of each stage")
    return "\n".join(lines)


def overhead_table(results: Sequence[dict[str, Any]]) -> str:
    """The measurements of :func:`measure_overhead` as text."""
    cells = [("ms of processor time a step", "thread", "plain", "added", "all threads", "plain", "added")]
    for result in results:
        cut = "cut between blocks" if result["even"] else "automatic cut"
        line = [f"K={result['num_stages']}, stage {result['stage']}, {cut}"]
        for kind in ("thread", "all"):
            part = result[kind]
            line += [f"{part['ours']:.2f}", f"{part['plain']:.2f}", spread(part["added"], 2)]
        cells.append(tuple(line))
    return "\n".join(_align(cells))


def spread(values: Sequence[float], digits: int) -> str:
    """The median and, in brackets, the least and the greatest."""
    median, least, greatest = (f"{v:.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return f"{median} [{least} .. {greatest}]"


def _cost(row: Row, rows: Sequence[Row]) -> str:
    """How much longer a batch takes than without an option, in percent."""
    return spread([100 * (1 / ratio - 1) for ratio in _ratios(row, rows)], 1) + " %" if row.options else ""


def _ratios(row: Row, rows: Sequence[Row]) -> list[float]:
    base = next(other for other in rows if other.section == row.section)
    return [one / own for one, own in zip(base.seconds, row.seconds)]


def _align(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]


# ----- processes


class Pool:
    """Processes that stay and run functions as the ranks of one world after another: starting one takes seconds."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[Any, Any]] = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        for _, pipe in self._workers:
            pipe.recv()  # it has imported everything

    def run(self, function: Callable[..., Spent], world_size: int, *args: Any, **kwargs: Any) -> list[Spent]:
        """Call ``function(*args, **kwargs)`` on each rank.

        Raises:
            RuntimeError: If a rank fails, with its traceback, or if one does not answer for five minutes.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        workers = self._workers[:world_size]
        for rank, (_, pipe) in enumerate(workers):
            environment = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(world_size),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "NODE_RANK": "0",
            }
            pipe.send((function, args, kwargs, environment))
        answers: dict[int, Spent] = {}
        while len(answers) < world_size:
            waiting = [pipe for rank, (_, pipe) in enumerate(workers) if rank not in answers]
            ready = wait(waiting, timeout=300)
            if not ready:
                raise RuntimeError(f"`{function.__name__}` on {world_size} processes gave no answer for five minutes.")
            for rank, (_, pipe) in enumerate(workers):
                if pipe in ready:
                    answer = pipe.recv()
                    if isinstance(answer, str):
                        raise RuntimeError(f"`{function.__name__}` failed on rank {rank} of {world_size}:\n{answer}")
                    answers[rank] = answer
        return [answers[rank] for rank in range(world_size)]

    def close(self) -> None:
        """End the processes."""
        for process, _ in self._workers:
            process.kill()
            process.join()


def _work(pipe: Any) -> None:
    torch.set_num_threads(1)
    pipe.send(None)
    while True:
        try:
            function, args, kwargs, environment = pipe.recv()
        except EOFError:
            return
        os.environ.update(environment)
        answer: Any
        try:
            answer = function(*args, **kwargs)
        except Exception:
            answer = traceback.format_exc()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        pipe.send(answer)


# ----- the command


def main() -> None:
    """Measure, print and perhaps write what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="how many times each row is measured")
    parser.add_argument("--batches", type=int, default=6, help="how many batches are measured each time")
    parser.add_argument(
        "--only", choices=("real", "emulated", "options", "monitor", "overhead"), help="measure only this"
    )
    parser.add_argument("--quick", action="store_true", help="one round of few batches, at most 4 processes")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    rounds, batches = (1, 3) if args.quick else (args.rounds, args.batches)
    os.environ["OMP_NUM_THREADS"] = "1"

    sections = {
        "real": real_rows(args.quick) if args.only in (None, "real") else [],
        "emulated": emulated_rows(args.quick) if args.only in (None, "emulated") else [],
        "options": option_rows(args.quick) if args.only in (None, "options") else [],
        "monitor": monitor_rows(args.quick) if args.only in (None, "monitor") else [],
    }
    rows = [row for part in sections.values() for row in part]
    overhead: list[dict[str, Any]] = []
    start = time.perf_counter()
    pool = Pool(max((row.num_processes for row in rows), default=4))
    try:
        for name, part in sections.items():
            if part:
                print(f"{name} compute, {len(part)} rows a round", flush=True)
                measure(pool, part, rounds, batches)
        if args.only in (None, "overhead"):
            print("overhead", flush=True)
            overhead = measure_overhead(pool, rounds, 10 * batches)
    finally:
        pool.close()

    took = time.perf_counter() - start
    print(f"\n{rounds} rounds, {took:.0f} s, torch {torch.__version__}, {os.cpu_count()} cores\n")
    if rows:
        print(f"{table(rows)}\n")
    if overhead:
        print(overhead_table(overhead))
    if args.json is not None:
        result = {
            "torch": torch.__version__,
            "machine": platform.machine(),
            "num_cores": os.cpu_count(),
            "rounds": rounds,
            "batches": batches,
            "rows": [_as_json(row, rows) for row in rows],
            "overhead_ms": overhead,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def _as_json(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "section": row.section,
        "name": row.name,
        "processes": row.num_processes,
        "compute": row.compute,
        "ms_per_batch": [1000 * s for s in row.seconds],
        "ratio_to_one_process": _ratios(row, rows),
        "stages_begin_with": row.cuts,
        "simulated_ms_per_batch": [1000 * p for p in row.predicted],
    }


if __name__ == "__main__":
    main()
