"""Scripts that do not end fail with the stacks of all their processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.scripts import finish, run, start

SCRIPT = """
import subprocess, sys, time

def wait_for_ever():
    print("waiting", flush=True)
    time.sleep(1000)

def wait_for_the_child():
    subprocess.run([sys.executable, __file__, "child"])

wait_for_ever() if sys.argv[1:] else wait_for_the_child()
"""


def test_stacks_of_scripts_that_hang(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    processes = start([sys.executable, str(path)]), start([sys.executable, str(path), "alone"])
    with pytest.raises(AssertionError) as failure:
        finish(*processes, limit=3)
    text = str(failure.value)
    assert "did not end within 3 s" in text
    assert (text.count("in wait_for_ever"), text.count("in wait_for_the_child"), text.count("waiting")) == (2, 1, 2)


def test_what_a_script_says() -> None:
    done = run([sys.executable, "-c", "import sys; print('out'); sys.exit('err')"])
    assert (done.returncode, done.stdout, done.stderr) == (1, "out\n", "err\n")
