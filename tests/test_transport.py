"""Messages between two processes: they arrive, or the error says who waited for what from whom."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lightning_dgmp import transport
from lightning_dgmp.transport import ACTIVATIONS, ERRORS, Transport, group_of_channels
from lightning_dgmp.wire import Message
from lightning_dgmp.world import PeerError
from tests.pool import WorkerPool


def connect(timeout: float = 20) -> tuple[Transport, int]:
    """Stage 0 is rank 1, stage 1 is rank 0."""
    rank = int(os.environ["LOCAL_RANK"])
    limit = timedelta(seconds=timeout)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=30))
    transport = Transport(1 - rank, [[1, 0]], 0, group_of_channels([[1, 0]]), torch.device("cpu"), limit)
    transport.open([(0, 1)])
    return transport, 1 - rank


def exchange() -> Any:
    transport, stage = connect()
    values = [
        torch.arange(6.0).reshape(2, 3).T,
        None,
        torch.tensor(True),
        torch.zeros(0, 4, dtype=torch.bfloat16),
        torch.full((2,), 1 + 2j).conj(),
        torch.arange(48.0).reshape(2, 3, 2, 4).contiguous(memory_format=torch.channels_last),
        torch.arange(24.0).reshape(2, 3, 4)[:, ::2].transpose(0, 2),
        *(torch.zeros((1,) * 20) for _ in range(4)),  # too many dimensions for the header
    ]
    if stage == 0:
        for batch in range(10):
            transport.send(ACTIVATIONS, 1, Message(batch, batch == 9, values))
            back = transport.receive(ERRORS, 1, batch)
            assert back.tensors[0].item() == batch  # type: ignore[union-attr]
    else:
        for batch in range(10):
            message = transport.receive(ACTIVATIONS, 0, batch)
            assert message.wishes == (batch == 9)
            for got, sent in zip(message.tensors, values, strict=True):
                assert (got is None) == (sent is None)
                if got is not None and sent is not None:
                    torch.testing.assert_close(got, sent, rtol=0, atol=0)
                    kept = sent.clone()  # without gaps in memory
                    assert got.stride() == kept.stride() or kept.is_contiguous()
            transport.send(ERRORS, 0, Message(batch, False, [torch.tensor(batch)]))
    transport.close()


def test_messages_arrive(pool: WorkerPool) -> None:
    pool.run(exchange, 2)


def send_ahead() -> int:
    """Nobody waits for a message that is there already, and a fast sender waits for a slow receiver."""
    transport, stage = connect()
    if stage == 0:
        for batch in range(8):
            transport.send(ACTIVATIONS, 1, Message(batch, False, [torch.tensor(batch)]))
        transport.receive(ERRORS, 1, 0)
    else:
        got = [transport.receive(ACTIVATIONS, 0, batch).tensors[0].item() for batch in range(8)]  # type: ignore[union-attr]
        assert got == list(range(8))
        transport.send(ERRORS, 0, Message(0, False, []))
    transport.close()
    return stage


def test_sending_ahead(pool: WorkerPool) -> None:
    assert pool.run(send_ahead, 2) == [1, 0]


def idle() -> int:
    transport, stage = connect(timeout=1)
    time.sleep(2.5)
    if stage == 0:
        transport.send(ACTIVATIONS, 1, Message(0, 0, []))
    else:
        transport.receive(ACTIVATIONS, 0, 0)
    transport.close()
    return stage


def test_a_channel_may_be_idle_for_longer_than_the_timeout(pool: WorkerPool) -> None:
    assert pool.run(idle, 2) == [1, 0]


def go_over_to_faster_channels() -> tuple[int, int]:
    """Replicas may open different channels for an evaluation; training has the same on all. gloo stands for NCCL."""
    made, real = [0], transport._group_of_own

    def group_of_own(candidates: Any, **kwargs: Any) -> Any:
        made[0] += kwargs["backend"] == "nccl"
        return real(candidates, **{**kwargs, "backend": "gloo"})

    rank = int(os.environ["LOCAL_RANK"])
    replicas, replica, stage = [[1, 0], [3, 2]], rank // 2, 1 - rank % 2
    limit = timedelta(seconds=20)
    dist.init_process_group("gloo", rank=rank, world_size=4, timeout=timedelta(seconds=30))
    with mock.patch.object(transport, "_group_of_own", group_of_own):
        group = group_of_channels(replicas)
        channels = Transport(stage, replicas, replica, group, torch.device("cpu"), limit, over_nccl=True)

        def exchange(batch: int) -> None:
            if stage == 0:
                channels.send(ACTIVATIONS, 1, Message(batch, 0, [torch.tensor(batch)]))
                assert channels.receive(ERRORS, 1, batch).tensors[0].item() == 2 * batch  # type: ignore[union-attr]
            else:
                value = channels.receive(ACTIVATIONS, 0, batch).tensors[0]
                assert value is not None
                channels.send(ERRORS, 0, Message(batch, 0, [2 * value]))

        if replica == 0:
            channels.open([(0, 1)], by_all=False)
            exchange(1)
        before = made[0]
        for batch in (2, 3):
            channels.open([(0, 1)])
            exchange(batch)
        channels.open([(0, 1)], by_all=False)
        exchange(4)
        channels.close()
    assert not any(box.thread.is_alive() for box in channels._retired)
    return before, made[0]


def test_training_goes_over_the_device_also_after_an_evaluation(pool: WorkerPool) -> None:
    assert pool.run(go_over_to_faster_channels, 4) == [(0, 2)] * 4


def fail(how: str) -> str:
    transport, stage = connect(timeout=1)
    text = ""
    if stage == 0:
        if how == "abort":
            transport.abort("Stage 0 (rank 1) failed: out of luck")
        elif how == "other batch":
            transport.send(ACTIVATIONS, 1, Message(4, False, []))
        elif how == "flush":
            transport.send(ACTIVATIONS, 1, Message(5, False, [], flush=True))
        elif how == "late":
            time.sleep(3)
    else:
        try:
            transport.receive(ACTIVATIONS, 0, 5)
        except PeerError as error:
            text = str(error)
    if how != "abort" or stage == 1:
        transport.close()
    return text


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("abort", "Stage 0 (rank 1) failed: out of luck"),
        ("close", "stage 1 (rank 0) waited for the activations of batch 5 from stage 0 (rank 1), but that stage"),
        ("other batch", "stage 1 (rank 0) is in batch 5 and stage 0 (rank 1) is in batch 4"),
        (
            "flush",
            "stage 1 (rank 0) is in batch 5 and stage 0 (rank 1) is at the end after batch 5. Make the data loaders of"
            " all processes equally long, and let all of them save checkpoints",
        ),
        ("late", "stage 1 (rank 0) waited 0:00:01 for the activations of batch 5 from stage 0 (rank 1), but none came"),
    ],
)
def test_failures_have_names(pool: WorkerPool, how: str, text: str) -> None:
    assert text in pool.run(fail, 2, how)[0]
