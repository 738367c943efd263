#!/usr/bin/env bash
# Makes .venv if need be, installs the package, and trains examples/char_lm.py over two processes: a few minutes on two
# cores. Shows the plan, the falling loss and where to look in TensorBoard. Arguments go to the example.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --upgrade pip
.venv/bin/python -m pip install --quiet --constraint tests/constraints.txt --editable ".[examples]"

export OMP_NUM_THREADS=1
exec .venv/bin/python examples/char_lm.py --stages 2 --accelerator cpu "$@"
