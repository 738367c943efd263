"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.pool import WorkerPool

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Worker processes for the whole session."""
    workers = WorkerPool()
    yield workers
    workers.close()


@pytest.fixture(autouse=True)
def _nothing_stays_behind() -> Iterator[None]:
    """Fail a test that leaves environment variables behind, and end its process group."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    # Lightning sets these by itself, and PL_GLOBAL_SEED is `seed_everything`'s
    allowed = {"PL_GLOBAL_SEED", "PL_SEED_WORKERS", "PYTEST_CURRENT_TEST", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"}
    allowed |= {"NODE_RANK", "LOCAL_RANK"}
    leaked = {name for name in os.environ if name not in before} - allowed
    for name in allowed - {"PYTEST_CURRENT_TEST"}:
        os.environ.pop(name, None) if name not in before else None
    assert not leaked, f"the test left {leaked} in the environment"
