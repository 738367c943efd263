"""Several replicas of several stages: each stage averages its gradients with its replicas."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from tests import models
from tests.habits import ThreeBlocks, UnfreezesWhileInFlight
from tests.integration.test_collectives import Asks
from tests.pool import Failure, WorkerPool
from tests.reference import train_by_hand
from tests.training import Outcome, assert_equal, fit
from tests.traps import MovingAverage

MAX_NORM = 0.4
TOLERANCE = 1e-6


def batches_of(replica: int, num_replicas: int) -> list[Any]:
    """What Lightning gives a replica under DDP, and what a single one sees."""
    loader = models.vectors()
    if num_replicas == 1:
        return list(loader)
    sampler: DistributedSampler[Any] = DistributedSampler(loader.dataset, num_replicas, replica, shuffle=True, seed=7)
    return list(DataLoader(loader.dataset, loader.batch_size, sampler=sampler))


def fit_on(
    pool: WorkerPool,
    num_stages: int,
    num_replicas: int,
    module: Callable[..., LightningModule] = models.MLP,
    loader: Callable[[], Any] = models.vectors,
    virtual: bool = False,
    strategy: dict[str, Any] | None = None,
    **kwargs: Any,
) -> list[Outcome]:
    """The outcomes of all ranks."""
    num_devices = num_replicas * (1 if virtual else num_stages)
    strategy = {"num_stages": num_stages, "virtual": virtual, **(strategy or {})}
    return pool.run(fit, num_devices, module, loader, strategy, num_devices, **kwargs)


def assert_agree(outcomes: list[Outcome]) -> None:
    for other in outcomes[1:]:
        for key, value in outcomes[0].state.items():
            torch.testing.assert_close(other.state[key], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("optimizer", "accumulate", "max_norm"),
    [("momentum", 1, None), *(("adamw", m, norm) for m in (1, 2, 3, 8) for norm in (None, MAX_NORM))],
)
@pytest.mark.parametrize(
    ("num_stages", "num_replicas", "virtual"), [(2, 1, False), (2, 2, False), (4, 2, False), (4, 2, True)]
)
def test_replicas_are_a_fifo_of_averages(
    pool: WorkerPool,
    num_stages: int,
    num_replicas: int,
    optimizer: str,
    accumulate: int,
    max_norm: float | None,
    virtual: bool,
) -> None:
    args: dict[str, Any] = {"module_args": {"optimizer": optimizer}, "accumulate_grad_batches": accumulate}
    outcomes = fit_on(pool, num_stages, num_replicas, virtual=virtual, gradient_clip_val=max_norm, **args)
    assert_agree(outcomes)
    ours = outcomes[0]

    seed_everything(7, verbose=False)
    module = models.MLP(optimizer=optimizer)
    replicas = [batches_of(r, num_replicas) for r in range(num_replicas)]
    losses = train_by_hand(module, replicas, ours.stages, num_stages, accumulate, max_norm)
    if accumulate == 1:
        assert [row["loss"] for _, row in ours.rows if "loss" in row] == pytest.approx(losses, rel=1e-6)
    for name, p in module.named_parameters():
        torch.testing.assert_close(ours.state[name], p.detach(), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("module", "loader", "optimizer", "options"),
    [
        (models.MLP, models.vectors, "adamw", {"accumulate_grad_batches": 2}),
        (models.ResidualNet, models.images, "momentum", {"accumulate_grad_batches": 3}),
        (models.ResidualNet, models.images, "adamw", {}),
        (models.MLP, models.vectors, "momentum", {"gradient_clip_val": MAX_NORM}),
        (models.MLP, models.vectors, "adamw", {"gradient_clip_val": MAX_NORM, "accumulate_grad_batches": 8}),
    ],
)
def test_replicas_of_one_stage_are_plain_ddp_bit_for_bit(
    pool: WorkerPool, module: Any, loader: Any, optimizer: str, options: dict[str, Any]
) -> None:
    args = {"module_args": {"optimizer": optimizer}, **options}
    plain = pool.run(fit, 2, module, loader, "ddp", 2, **args)
    ours = pool.run(fit, 2, module, loader, {"num_stages": 1}, 2, **args)
    for a, b in zip(ours, plain):
        assert_equal(a, b, 0.0)


class Normed(models.MLP):
    """Statistics differ between replicas until they are shared."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)) for _ in range(4))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)


class UsesOneOfTwo(ThreeBlocks):
    """A block is used in some batches of some replicas."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.other = self.kind()

    def features(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.trainer.fit_loop.batch_idx % 3 == 0 or x[0, 0] > 0:
            h = self.other(h)
        return self.third(self.second(h))


class MeanOverReplicas(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return MeanOverReplicas.forward(ctx, grad)


class NormalisesOverReplicas(ThreeBlocks):
    """As SyncBatchNorm, which runs on accelerators alone, does: collectives in both directions."""

    class kind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            mean = MeanOverReplicas.apply(x.mean(0))
            self.mean = 0.9 * self.mean + 0.1 * mean.detach()
            return torch.tanh(x - mean)

    kind_of_others = kind


@pytest.mark.parametrize("virtual", [False, True])
def test_sync_batchnorm_changes_nothing_within_a_replica(pool: WorkerPool, virtual: bool) -> None:
    ours, plain = (
        fit_on(pool, 2, 1, models.ResidualNet, models.images, virtual, sync_batchnorm=sync)[0] for sync in (True, False)
    )
    assert_equal(ours, plain, 0.0)


def test_sync_batchnorm_of_replicas_says_on_all_what_it_says_with_ddp(pool: WorkerPool) -> None:
    strategy = {"num_stages": 2}
    results = pool.try_run(fit, 4, models.ResidualNet, models.images, strategy, 4, sync_batchnorm=True)
    assert all(isinstance(result, Failure) for result in results)
    assert all("SyncBatchNorm expected input tensor to be on GPU" in result.message for result in results), results


@pytest.mark.parametrize(
    ("name", "num_stages", "options", "args"),
    [
        ("ragged", 2, {}, {}),
        ("ragged", 4, {"backward": "recompute"}, {}),
        ("norms", 2, {}, {}),
        ("norms", 3, {"gradient_as_bucket_view": True, "bucket_cap_mb": 1}, {"accumulate_grad_batches": 2}),
        ("collectives", 2, {}, {}),
        ("collectives", 3, {"backward": "recompute"}, {}),
        ("metrics", 2, {}, {"make_val_loader": models.vectors}),
        ("unused", 2, {"find_unused_parameters": True}, {}),
        ("validated norms", 2, {}, {"make_val_loader": models.vectors, "max_epochs": 2}),
        ("validated norms", 2, {"broadcast_buffers": False}, {"make_val_loader": models.vectors}),
        ("moving averages", 2, {}, {}),
        ("ragged", 2, {"static_graph": True}, {}),
        ("clipped", 3, {}, {"accumulate_grad_batches": 8, "gradient_clip_val": MAX_NORM}),
        ("flush within an update", 3, {}, {"accumulate_grad_batches": 4, "val_check_interval": 6}),
    ],
)
def test_replicas_equal_virtual_stages(
    pool: WorkerPool, name: str, num_stages: int, options: dict[str, Any], args: dict[str, Any]
) -> None:
    module, loader = {
        "ragged": (models.LanguageModel, models.ragged_tokens),
        "norms": (models.ResidualNet, models.images),
        "collectives": (NormalisesOverReplicas, models.vectors),
        "metrics": (Asks, models.vectors),
        "unused": (UsesOneOfTwo, models.vectors),
        "validated norms": (Normed, models.vectors),
        "moving averages": (MovingAverage, models.vectors),
        "clipped": (models.MLP, models.vectors),
        "flush within an update": (models.ValidatedMLP, models.vectors),
    }[name]
    if "val_check_interval" in args:
        args |= {"make_val_loader": models.vectors}
    ours = fit_on(pool, num_stages, 2, module, loader, strategy=options, **args)
    virtual = {key: value for key, value in options.items() if key != "backward"}
    expected = fit_on(pool, num_stages, 2, module, loader, virtual=True, strategy=virtual, **args)
    for replica in range(2):
        # Of the others the statistics are not those of the first one.
        if name not in ("norms", "moving averages") or replica == 0:
            assert_equal(ours[replica * num_stages], expected[replica], TOLERANCE)


def test_unused_parameters_are_an_error_with_its_cure(pool: WorkerPool) -> None:
    results = pool.try_run(fit, 4, UsesOneOfTwo, models.vectors, {"num_stages": 2}, 4)
    assert all(isinstance(result, Failure) for result in results)
    cure = "enable the detection of unused parameters in DDP, with `strategy=DelayedMPStrategy(find_unused_parameters="
    assert any(cure in result.message for result in results), results
    assert not any("`strategy=DDPStrategy" in result.message for result in results)


class GrowsMasks(models.LanguageModel):
    """Every layer keeps a mask as long as the longest text of its replica, and a mean that all replicas share."""

    grows = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gpt.blocks = nn.ModuleList(Masked(block, self.grows) for block in self.gpt.blocks)


class HasNoMasks(GrowsMasks):
    grows = False


class Masked(nn.Module):
    def __init__(self, block: nn.Module, grows: bool) -> None:
        super().__init__()
        self.block, self.grows = block, grows
        self.register_buffer("mask", None, persistent=False)
        self.register_buffer("scale", torch.zeros(1), persistent=False)
        self.register_buffer("mean", torch.zeros(()))
        turns = torch.polar(torch.ones(4), torch.arange(4.0))  # views of any kind
        self.register_buffer("cosines", turns.real, persistent=False)
        self.register_buffer("backwards", turns.conj(), persistent=False)
        self.register_buffer("sines", turns.conj().imag, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        mask = 1 / (1 + torch.arange(length))
        scale = 1 + mask
        if self.grows:
            if self.mask is None or len(self.mask) < length:
                self.mask, self.scale = mask, scale
            mask, scale = self.mask[:length], self.scale[:length]
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return self.block(x) * (mask * scale)[:, None] + self.mean


def test_buffers_that_grow_belong_to_their_replica(pool: WorkerPool) -> None:
    """Between replicas only those travel that are as large as before the first step."""
    loaders = {"loader": models.ragged_tokens, "make_val_loader": models.ragged_tokens}
    for accumulate in (1, 2):
        ours = fit_on(pool, 2, 2, GrowsMasks, **loaders, accumulate_grad_batches=accumulate)
        expected = fit_on(pool, 2, 2, HasNoMasks, **loaders, accumulate_grad_batches=accumulate, virtual=True)
        assert_agree(ours)
        assert_equal(ours[0], expected[0], TOLERANCE)


class ThawsTheEnd(models.MLP):
    """Something on every stage is unfrozen, and later frozen again."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for layer in (self.inp, self.hidden[1], self.out):
            layer.bias.requires_grad_(5 <= batch_idx < 12)


def fit_with_schedule(num_stages: int, devices: int, virtual: bool) -> Outcome:
    strategy = {"num_stages": num_stages, "virtual": virtual}
    callbacks = [GradientAccumulationScheduler({0: 1, 1: 4})]
    clip: dict[str, Any] = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}
    return fit(models.MLP, models.vectors, strategy, devices, max_epochs=2, callbacks=callbacks, **clip)


def test_a_schedule_of_accumulation_and_clipping_by_value(pool: WorkerPool) -> None:
    outcomes = pool.run(fit_with_schedule, 6, 3, 6, False)
    assert_agree(outcomes)
    assert_equal(outcomes[0], pool.run(fit_with_schedule, 2, 3, 2, True)[0], TOLERANCE)


def test_parameters_on_the_last_stage_that_are_unfrozen_later(pool: WorkerPool) -> None:
    args: dict[str, Any] = {"use_distributed_sampler": False}
    expected = fit_on(pool, 3, 1, ThawsTheEnd, **args)[0]
    outcomes = fit_on(pool, 3, 2, ThawsTheEnd, **args)
    assert_agree(outcomes)
    assert_equal(outcomes[0], expected, TOLERANCE)


def test_parameters_that_are_unfrozen_later(pool: WorkerPool) -> None:
    """Replicas that see the same data do what one does."""
    args: dict[str, Any] = {"module_args": {"optimizer": "momentum"}, "use_distributed_sampler": False}
    expected = fit_on(pool, 3, 1, UnfreezesWhileInFlight, **args)[0]
    outcomes = fit_on(pool, 3, 2, UnfreezesWhileInFlight, **args)
    assert_agree(outcomes)
    assert_equal(outcomes[0], expected, TOLERANCE)


class FreezesInBetween(models.MLP):
    """On every stage, between two batches of an update: what has added up until then counts."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for layer in (self.inp, self.hidden[1], self.out):
            layer.bias.requires_grad_(not 5 <= batch_idx < 12)


@pytest.mark.parametrize("same_data", [True, False])
def test_parameters_that_are_frozen_within_an_update(pool: WorkerPool, same_data: bool) -> None:
    args: dict[str, Any] = {"accumulate_grad_batches": 2}
    if same_data:
        args |= {"use_distributed_sampler": False}
    outcomes = fit_on(pool, 3, 2, FreezesInBetween, **args)
    assert_agree(outcomes)
    if same_data:
        assert_equal(outcomes[0], fit_on(pool, 3, 1, FreezesInBetween, **args)[0], TOLERANCE)


class GathersInSteps(models.MLP):
    """Logs and learns by what all replicas have, as contrastive losses do."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        all_logits, all_y = self.all_gather(logits, sync_grads=True), self.all_gather(y)
        self.log("accuracy", (all_logits.argmax(-1) == all_y).float().mean())
        total = self.trainer.strategy.reduce(logits.detach().sum(), reduce_op="sum")
        self.log("total", self.trainer.strategy.broadcast(total))
        return F.cross_entropy(all_logits.flatten(0, 1), all_y.flatten())


def test_gathers_over_replicas_in_steps(pool: WorkerPool) -> None:
    real, virtual = (fit_on(pool, 2, 2, GathersInSteps, virtual=is_virtual) for is_virtual in (False, True))
    assert_agree(real)
    assert_equal(real[0], virtual[0], TOLERANCE)


class Sparse(models.LanguageModel):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gpt.tok_emb = nn.Embedding(20, 16, sparse=True)

    def on_before_optimizer_step(self, optimizer: Any) -> None:  # which might clip, so norms are measured
        pass


def test_sparse_gradients_are_for_one_replica(pool: WorkerPool) -> None:
    real, virtual = (fit_on(pool, 2, 1, Sparse, models.ragged_tokens, is_virtual)[0] for is_virtual in (False, True))
    assert_equal(real, virtual, TOLERANCE)
    for result in pool.try_run(fit, 4, Sparse, models.ragged_tokens, {"num_stages": 2}, 4):
        assert "averages dense gradients, but `gpt.tok_emb` has `sparse=True`" in result.message


class Stream(IterableDataset[Any]):
    """Longer on the second replica."""

    def __iter__(self) -> Iterator[Any]:
        replica = int(os.environ["LOCAL_RANK"]) // 2
        yield from list(models.vectors())[: 12 + 5 * replica]


class Sized(Stream):
    def __len__(self) -> int:  # which promises too much
        return 20


def stream() -> DataLoader:
    return DataLoader(Stream(), batch_size=None)


def sized_stream() -> DataLoader:
    return DataLoader(Sized(), batch_size=None)


def longer() -> DataLoader:
    return models.vectors(96 + 40 * (int(os.environ["LOCAL_RANK"]) // 2))


@pytest.mark.parametrize("loader", [stream, sized_stream, longer])
@pytest.mark.parametrize("accumulate", [1, 5])
def test_replicas_end_with_the_shortest_data(pool: WorkerPool, loader: Any, accumulate: int) -> None:
    args: dict[str, Any] = {"max_epochs": 2, "use_distributed_sampler": False, "accumulate_grad_batches": accumulate}
    outcomes = fit_on(pool, 2, 2, loader=loader, **args)
    assert_agree(outcomes)
    updates = 12 // accumulate + (loader is not sized_stream and accumulate > 1)  # nobody has known which is the last
    assert {len([row for _, row in outcomes[r].rows if "loss" in row]) for r in (0, 2)} == {2 * updates}
