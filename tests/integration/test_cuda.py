"""Several stages on one GPU."""

from __future__ import annotations

import pytest
import torch

from tests.cuda_check import TOLERANCES, check
from tests.pool import WorkerPool


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("precision", list(TOLERANCES))
def test_stages_share_a_device(pool: WorkerPool, precision: str, num_replicas: int) -> None:
    is_same, line = check(pool, 2, precision, num_replicas)
    assert is_same, line
