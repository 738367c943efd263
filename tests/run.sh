#!/usr/bin/env bash
# Makes .venv if need be, installs the package with its test extra, and runs linters, types and every test, three at a
# time on two cores, since many tests wait.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --upgrade pip
.venv/bin/python -m pip install --quiet --constraint tests/constraints.txt --editable ".[test,examples]"

export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # many processes start, sooner if modules are compiled
if [ $# -eq 0 ]; then
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/mypy
fi
exec .venv/bin/python -m pytest --numprocesses 3 --dist loadfile "$@"
