"""Runs of scripts in processes of their own, which show their stacks when they do not end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from subprocess import CompletedProcess, Popen
from typing import Any

import psutil

__all__ = ["ROOT", "environment", "finish", "run", "start"]

ROOT = Path(__file__).parents[1]


def environment(**extra: str) -> dict[str, str]:
    """With ``PYTHONFAULTHANDLER`` Python writes the stacks of all threads when it is aborted."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return {**os.environ, **own, **extra}


def start(command: list[str], cwd: Path = ROOT, env: dict[str, str] | None = None, **kwargs: Any) -> Popen[str]:
    """Start ``command`` with its output in pipes."""
    pipe = subprocess.PIPE
    return Popen(command, cwd=cwd, env=env or environment(), stdout=pipe, stderr=pipe, text=True, **kwargs)


def finish(*processes: Popen[str], limit: float) -> list[CompletedProcess[str]]:
    """Wait for all of them.

    Raises:
        AssertionError: If one does not end within ``limit`` seconds, with the stacks and output of all and of the
            processes that they have started.
    """
    deadline = time.monotonic() + limit
    try:
        outputs = [process.communicate(timeout=max(deadline - time.monotonic(), 0)) for process in processes]
    except subprocess.TimeoutExpired as error:
        _abort(processes)
        said = [text for process in processes for text in process.communicate()]
        raise AssertionError("\n".join([f"{error.cmd} did not end within {limit} s.", *filter(None, said)])) from None
    return [CompletedProcess(p.args, p.returncode, *texts) for p, texts in zip(processes, outputs)]


def run(command: list[str], limit: float = 120, **kwargs: Any) -> CompletedProcess[str]:
    """:func:`start` and :func:`finish` one."""
    return finish(start(command, **kwargs), limit=limit)[0]


def _abort(processes: tuple[Popen[str], ...]) -> None:
    tree = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            tree += [*parent.children(recursive=True), parent]
    for signum in (signal.SIGSTOP, signal.SIGABRT, signal.SIGCONT):  # none sees the end of another before its own
        for one in tree:
            with suppress(psutil.NoSuchProcess):
                one.send_signal(signum)
    for one in psutil.wait_procs(tree, timeout=10)[1]:
        with suppress(psutil.NoSuchProcess):
            one.kill()
