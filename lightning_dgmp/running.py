"""Runs a script with the strategy registered, also in the processes that Lightning starts."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import Any

__all__ = ["run_script", "start_children_alike"]

_command: list[str] = []  # before the arguments of the script, if it runs so


def run_script(script: Path, arguments: Sequence[str]) -> None:
    """Run ``script`` as ``python script.py arguments`` would."""
    path = str(script.resolve())
    _command[:] = [sys.executable, "-m", "lightning_dgmp", "run", path]
    sys.argv = [path, *arguments]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(path, run_name="__main__")


def start_children_alike(launchers: Any) -> None:
    """Let the children of a script that runs so do it too.

    Args:
        launchers: Lightning's module with the launcher of scripts, whose private functions for commands are exchanged
            here and nowhere else.
    """
    if not _command:
        return
    launchers._basic_subprocess_cmd = lambda: _command + sys.argv[1:]
    of_hydra = getattr(launchers._hydra_subprocess_cmd, "__wrapped__", launchers._hydra_subprocess_cmd)

    @wraps(of_hydra)
    def command_and_folder(local_rank: int) -> tuple[list[str], str]:
        (_, _, *arguments), folder = of_hydra(local_rank)  # without the interpreter and the script
        return [*_command, *arguments], folder

    launchers._hydra_subprocess_cmd = command_and_folder
