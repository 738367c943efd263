"""What all processes decide together."""

from __future__ import annotations

import gc
import os
import time
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from lightning_dgmp.ghost import GhostError
from lightning_dgmp.operations import GhostMode
from lightning_dgmp.world import PeerError, World
from tests import models
from tests.pool import WorkerPool
from tests.training import fit


def give_and_fail(item: Any) -> Any:
    """Rank 0 sleeps while rank 1 gives what it has and fails."""
    rank, sleep = int(os.environ["LOCAL_RANK"]), time.sleep
    dist.init_process_group("gloo", rank=rank, world_size=2)
    world = World("127.0.0.1", timedelta(seconds=20))
    world.all_gather(None, "the start")
    if rank == 1:
        sleep(0.2)
        world.gather(item, "a test", [0, 1], 0)
        world.fail("the reason")
        return None
    with patch("time.sleep", lambda seconds: sleep(max(seconds, 0.5))):  # as on a busy machine
        gathered = world.gather(item, "a test", [0, 1], 0)
    with pytest.raises(PeerError, match="the reason"):
        world.all_gather(None, "another test")
    return gathered


@pytest.mark.parametrize("item", [1, torch.ones(3)])
def test_what_was_done_before_a_failure_counts(pool: WorkerPool, item: Any) -> None:
    gathered = pool.run(give_and_fail, 2, item)[0]
    assert [str(i) for i in gathered] == [str(item)] * 2


def meet_elsewhere() -> str:
    """Rank 0 is alone at a broadcast."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    world = World("127.0.0.1", timedelta(seconds=20))
    world.all_gather(None, f"a barrier (of rank {rank})")
    with pytest.raises(PeerError) as error:
        world.all_gather(None, ["a broadcast", "a barrier (b)"][rank])
    return str(error.value)


def test_who_is_elsewhere_is_told(pool: WorkerPool) -> None:
    sentence = "All processes must come to the same places, but rank 0 is at a broadcast and rank 1 at a barrier (b)."
    for message in pool.run(meet_elsewhere, 2):
        assert message.startswith(sentence)


def share_a_ghost() -> None:
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    world = World("127.0.0.1", timedelta(seconds=20))
    ghost = GhostMode().like(torch.empty(3), "the test", False, torch.device("cpu"))
    try:
        world.share({"a": ghost}, "a test", [0, 1], 0, torch.device("cpu"))
    except GhostError as error:
        world.fail(str(error))
        raise


def test_what_has_no_value_cannot_be_sent(pool: WorkerPool) -> None:
    for failure in pool.try_run(share_a_ghost, 2):
        assert "at a test a value is needed that is not here, of a (3,) torch.float32 tensor" in failure.message


def average_and_fail() -> float:
    """Rank 1 fails as soon as it has taken part, while rank 0 is late to look."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    world = World("127.0.0.1", timedelta(seconds=20))
    world.all_gather(None, "the start")
    future: Any = torch.futures.Future()
    guarded = world.guarded(future, "a test")
    if rank == 1:
        world.fail("the reason")
    else:
        time.sleep(1.5)  # the failure is known for long
    future.set_result(3.0)
    never = world.guarded(torch.futures.Future(), "another test")
    with pytest.raises(RuntimeError, match="the reason"):
        never.wait()
    return guarded.wait()  # type: ignore[no-any-return]


def test_a_guarded_collective_may_end_after_a_failure(pool: WorkerPool) -> None:
    assert pool.run(average_and_fail, 2) == [3.0, 3.0]


class _Lost:
    """Stands for the store of a rank 0 that is gone."""

    def check(self, keys: list[str]) -> bool:
        raise dist.DistNetworkError("Connection reset by peer")


def wait_without_a_store() -> str:
    dist.init_process_group("gloo", rank=0, world_size=1)
    world = World("127.0.0.1", timedelta(seconds=20))
    world._store = _Lost()
    with patch("lightning_dgmp.world._LAST_WORDS", 0.1):
        never = world.guarded(torch.futures.Future(), "a test")
        deadline = time.monotonic() + 3
        while not never.done() and time.monotonic() < deadline:
            time.sleep(0.01)
    with pytest.raises(RuntimeError) as raised:
        never.value()
    return str(raised.value)


def test_the_loss_of_rank_0_ends_a_guarded_collective(pool: WorkerPool) -> None:
    assert "Rank 0 lost rank 0: Connection reset by peer" in pool.run(wait_without_a_store, 1)[0]


def worlds_after_each_fit() -> list[int]:
    counts = []
    for _ in range(3):
        fit(models.MLP, models.vectors, {"num_stages": 2}, 2, limit_train_batches=2)
        gc.collect()
        counts.append(sum(isinstance(item, World) for item in gc.get_objects()))
    return counts


def test_what_is_over_can_be_collected(pool: WorkerPool) -> None:
    """Process groups have threads of their own, which wake up again and again."""
    for counts in pool.run(worlds_after_each_fit, 2):  # something before may have left one behind
        assert counts == [counts[0]] * 3
