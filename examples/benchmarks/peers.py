"""What ``throughput.py`` measures: the models, and one function for each way of training them.

Every function here runs in all processes of a row at once and returns what this process spent on a batch in the steady
state. The model, its batch and its optimizer are the same in all of them.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import pairwise
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dgmp import DelayedMPStrategy, transport

__all__ = ["ModelSpec", "Spent", "run_ddp", "run_delayed", "run_one", "run_pipelining", "run_share"]

Batch = tuple[Tensor, Tensor]

_FEW = 4  # symbols that models with sleeping blocks tell apart, so that their ends weigh nothing beside a block


@dataclass(frozen=True)
class ModelSpec:
    """A byte-level Transformer language model, or a model of the same outline whose blocks sleep.

    Attributes:
        num_blocks: How many blocks stand between the embedding and the head.
        width: Of the residual stream.
        context: Bytes a sequence.
        batch_size: Sequences a batch.
        sleep: How long the forward of a block sleeps for one whole batch, in seconds; its backward sleeps twice as
            long. ``None``: the blocks compute.
    """

    num_blocks: int
    width: int
    context: int
    batch_size: int
    sleep: float | None = None

    def layers(self) -> list[nn.Module]:
        """The embedding, the blocks and the head."""
        torch.manual_seed(0)
        if self.sleep is None:
            blocks = [_Block(self.width) for _ in range(self.num_blocks)]
            return [_Embedding(self.width, self.context), *blocks, _Head(self.width)]
        seconds = self.sleep / self.batch_size
        sleepers = [_SleepingBlock(self.width, seconds) for _ in range(self.num_blocks)]
        return [nn.Linear(_FEW, self.width), *sleepers, nn.Linear(self.width, _FEW)]

    def share(self, stage: int, num_stages: int) -> list[nn.Module]:
        """The layers of one stage if the blocks are dealt out evenly."""
        layers = self.layers()
        start, end = ((stage + i) * self.num_blocks // num_stages for i in (0, 1))
        return layers[0 if stage == 0 else start + 1 : len(layers) if stage == num_stages - 1 else end + 1]

    def batches(self, number: int, rank: int = 0, num_ranks: int = 1) -> list[Batch]:
        """Bytes and the bytes that follow them; of each batch the part of one among ``num_ranks`` ranks."""
        generator = torch.Generator().manual_seed(1)
        text = torch.randint(256, (4, self.batch_size, self.context + 1), generator=generator)
        parts = text.chunk(num_ranks, dim=1)[rank]
        different = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts]
        if self.sleep is not None:
            different = [(F.one_hot(x % _FEW, _FEW).float(), y % _FEW) for x, y in different]
        return [different[i % 4] for i in range(number)]


class Spent(NamedTuple):
    """What a process spent on one batch.

    Attributes:
        wall: Seconds, the mean over the measured block of batches.
        cpu: Seconds of processor time, all threads of the process together; the median over the batches.
        thread: Seconds of processor time of the training thread; the median over the batches.
        cuts: The first module of each stage, if a plan was made.
        busy: Seconds of forward, of backward, and of update, hooks and logging a batch, if this is a stage.
    """

    wall: float
    cpu: float
    thread: float
    cuts: tuple[str, ...] = ()
    busy: tuple[float, float, float] | None = None


# ----- ways to train


def run_one(spec: ModelSpec, warmup: int, batches: int) -> Spent:
    """One process, plain Lightning."""
    return _fit(_LanguageModel(spec.layers()), spec.batches(warmup + batches), warmup, batches)


def run_ddp(spec: ModelSpec, warmup: int, batches: int) -> Spent:
    """Lightning's DDP; each process takes an equal part of the batch."""
    data = spec.batches(warmup + batches, _rank(), _world_size())
    return _fit(_LanguageModel(spec.layers()), data, warmup, batches, strategy="ddp", devices=_world_size())


def run_delayed(
    spec: ModelSpec,
    warmup: int,
    batches: int,
    *,
    num_replicas: int = 1,
    even: bool = False,
    pause: float = 0,
    is_watched: bool = False,
    latency: float = 0,
    strategy_args: dict[str, Any] | None = None,
    **trainer_args: Any,
) -> Spent:
    """This project, with the cuts that it finds by itself or, if ``even``, with those of :meth:`ModelSpec.share`.

    Each replica takes an equal part of the batch. If ``is_watched``, the monitor logs to TensorBoard. Between
    any two stages a message takes ``latency`` seconds longer.
    """
    num_stages = _world_size() // num_replicas
    starts = [f"layers.{stage * spec.num_blocks // num_stages + 1}" for stage in range(1, num_stages)]
    args: dict[str, Any] = {"num_stages": num_stages, "split_at": starts if even else None, **(strategy_args or {})}
    strategy = DelayedMPStrategy(**args)
    data = spec.batches(warmup + batches, _rank() // num_stages, num_replicas)
    trainer_args |= {"strategy": strategy, "devices": _world_size()}
    inboxes = mock.patch.object(transport, "_Inbox", partial(_FarInbox, latency)) if latency else nullcontext()
    with TemporaryDirectory() as folder, inboxes:
        if is_watched:
            trainer_args["logger"] = TensorBoardLogger(folder)
        spent = _fit(_LanguageModel(spec.layers()), data, warmup, batches, pause=pause, **trainer_args)
    if num_stages == 1:
        return spent
    return spent._replace(cuts=tuple(stage.first_module for stage in strategy.plan.stages))


class _FarInbox(transport._Inbox):
    """Gives what has arrived to the training thread only after a while, as if the sender were far away."""

    def __init__(self, latency: float, wire: Any, bound: int, take: Callable[[Any], None] | None = None) -> None:
        super().__init__(wire, bound, take or (lambda arrived: self.queue.put((time.monotonic() + latency, arrived))))

    def get(self, timeout: timedelta) -> Any:
        item: Any = self.queue.get(timeout=timeout.total_seconds())
        if not isinstance(item, tuple):
            raise item
        due, arrived = item
        time.sleep(max(due - time.monotonic(), 0))
        return self.wire.arrive(arrived)


def run_pipelining(spec: ModelSpec, warmup: int, batches: int, *, schedule: str, microbatches: int) -> Spent:
    """``torch.distributed.pipelining``: a plain loop, without Lightning around it."""
    dist.init_process_group("gloo")
    stage, num_stages = _rank(), _world_size()
    part = nn.Sequential(*spec.share(stage, num_stages))
    pipeline_stage = PipelineStage(part, stage, num_stages, torch.device("cpu"))
    make = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}[schedule]
    pipeline = make(pipeline_stage, microbatches, loss_fn=_loss)
    optimizer = _optimizer(part)
    stopwatch = _Stopwatch()
    for x, y in spec.batches(warmup + batches):
        optimizer.zero_grad()
        inputs = (x,) if stage == 0 else ()
        if stage == num_stages - 1:
            pipeline.step(*inputs, target=y, losses=[], return_outputs=False)
        else:
            pipeline.step(*inputs, return_outputs=False)
        optimizer.step()
        stopwatch.tick()
    return stopwatch.spent(warmup, batches)


def run_share(spec: ModelSpec, warmup: int, batches: int, *, pause: float = 0) -> Spent:
    """Plain Lightning with the layers of one stage alone: what a stage costs without this project.

    The processes know nothing of each other, but run side by side as stages do; the first one has the last stage.
    """
    num_stages = _world_size()
    stage = num_stages - 1 - _rank()
    data = spec.batches(warmup + batches)
    if stage > 0:
        x = torch.randn(spec.batch_size, spec.context, spec.width, requires_grad=True)
        data = [(x, y) for _, y in data]
    model = _LanguageModel(spec.share(stage, num_stages), has_loss=stage == num_stages - 1)
    return _fit(model, data, warmup, batches, pause=pause)


def _fit(
    model: LightningModule,
    data: list[Batch],
    warmup: int,
    batches: int,
    strategy: Any = "auto",
    devices: int = 1,
    pause: float = 0,
    **trainer_args: Any,
) -> Spent:
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    stopwatch = _Stopwatch(pause, warmup)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        callbacks=[stopwatch],
        use_distributed_sampler=False,  # `data` are this process's
        **{**off, **trainer_args},
    )
    trainer.fit(model, DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    return stopwatch.spent(warmup, batches)


class _Stopwatch(Callback):
    """Takes the time at the end of every batch, and pauses there if asked."""

    def __init__(self, pause: float = 0, warmup: int = 0) -> None:
        self.pause, self.warmup = pause, warmup
        self.busy: dict[str, float] | None = None  # since the warm-up
        self.times: list[tuple[float, float, float]] = []

    def tick(self) -> None:
        self.times.append((time.perf_counter(), time.process_time(), time.thread_time()))

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.tick()
        clock = getattr(trainer.strategy, "clock", None)
        if clock is not None and len(self.times) >= self.warmup:
            seconds, total = clock.take()
            seconds["other"] = total - sum(seconds.values())
            so_far = self.busy or dict.fromkeys(seconds, 0.0)
            is_warm = len(self.times) > self.warmup
            self.busy = {kind: so_far[kind] + is_warm * value for kind, value in seconds.items()}
        time.sleep(self.pause)

    def spent(self, warmup: int, batches: int) -> Spent:
        times = self.times[warmup - 1 : warmup + batches]
        steps = [[end - start for start, end in zip(*pair)] for pair in pairwise(times)]
        _, cpu, thread = (median(column) for column in zip(*steps))
        busy = None
        if self.busy is not None:
            forward, backward, *rest = (self.busy[k] / batches for k in ("forward", "backward", "update", "other"))
            busy = forward, backward, sum(rest)
        return Spent((times[-1][0] - times[0][0]) / batches, cpu, thread, busy=busy)


def _rank() -> int:
    return int(os.environ["LOCAL_RANK"])


def _world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


# ----- the model


class _LanguageModel(LightningModule):
    def __init__(self, layers: list[nn.Module], has_loss: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.compute_loss: Callable[[Tensor, Tensor], Tensor] = _loss if has_loss else _no_loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        for layer in self.layers:
            x = layer(x)
        return self.compute_loss(x, y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return _optimizer(self)


def _optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=3e-4)


def _loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def _no_loss(x: Tensor, y: Tensor) -> Tensor:
    return x.mean()


class _Embedding(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.bytes(x) + self.positions.weight


class _Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


class _Block(nn.Module):
    """A pre-norm Transformer block with causal attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = max(width // 32, 1)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        parts = self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        q, k, v = (part.view(b, t, self.num_heads, -1).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(b, t, w))
        return x + self.mlp(self.norm_2(x))


class _SleepingBlock(nn.Module):
    """Stands for a block on a device of its own: sleeps for as long as the examples of the batch would take."""

    def __init__(self, width: int, seconds_per_example: float) -> None:
        super().__init__()
        self.seconds_per_example = seconds_per_example
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        seconds = self.seconds_per_example * x.shape[0]
        y = self.linear(x)
        time.sleep(seconds)
        if y.requires_grad:
            y.register_hook(lambda _: time.sleep(2 * seconds))
        return y
