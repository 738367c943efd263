"""All stages see the batches that stage 0 loads, whatever kind of loader makes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
)

from lightning_dgmp.data import check_division
from lightning_dgmp.nests import leaves
from lightning_dgmp.withheld import StandIns
from tests import models
from tests.pool import WorkerPool
from tests.test_nests import Batch
from tests.training import assert_equal, fit


class Notes(Callback):
    """Keeps what each batch holds."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves(batch)])


def items(size: int = 44) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(size, 8, generator=generator), torch.randint(4, (size,), generator=generator))


def shuffled() -> DataLoader:
    return DataLoader(items(), batch_size=8, shuffle=True)


def seeded_by_rank() -> DataLoader:
    torch.manual_seed(int(os.environ["LOCAL_RANK"]))
    return DataLoader(items(), batch_size=8, shuffle=True)


def longer_by_rank() -> DataLoader:
    return DataLoader(items(44 + 16 * int(os.environ["LOCAL_RANK"])), batch_size=8)


def shorter_by_rank() -> DataLoader:
    return DataLoader(items(60 - 16 * int(os.environ["LOCAL_RANK"])), batch_size=8)


class Stream(IterableDataset[Any]):
    """Of unknown length, with an augmentation."""

    def __iter__(self) -> Iterator[Any]:
        for x, y in items():
            yield x + 0.1 * torch.randn(8), y


def stream() -> DataLoader:
    return DataLoader(Stream(), batch_size=8)


def with_workers() -> DataLoader:
    return DataLoader(items(), batch_size=8, shuffle=True, num_workers=2, persistent_workers=True)


class FirstTwice:
    """A batch sampler of one's own."""

    def __iter__(self) -> Iterator[list[int]]:
        for i in range(5):
            yield [0, *torch.randint(44, (7,)).tolist(), i]

    def __len__(self) -> int:
        return 5


def own_batch_sampler() -> DataLoader:
    return DataLoader(items(), batch_sampler=FirstTwice())


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Sample:
    pair: Pair
    names: list[str]
    more: dict[str, Any]


def rich(samples: list[Any]) -> Sample:
    x, y = torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])
    return Sample(
        Pair(x, y), [f"sample {i}" for i in range(len(samples))], {"none": None, "weight": 0.5, "set": {1, 2}}
    )


def rich_batches() -> DataLoader:
    return DataLoader(items(), batch_size=8, shuffle=True, collate_fn=rich)


def own_mappings() -> DataLoader:
    return DataLoader(items(), batch_size=8, collate_fn=in_own_mapping)


def in_own_mapping(samples: list[Any]) -> Batch:
    return Batch({"x": torch.stack([x for x, _ in samples]), "y": torch.stack([y for _, y in samples])})


def packed_batches() -> DataLoader:
    return DataLoader(items(), batch_size=8, collate_fn=with_packed)


def with_packed(samples: list[Any]) -> dict[str, Any]:
    x, y = torch.utils.data.default_collate(samples)
    return {"x": x, "y": y, "packed": pack_sequence([x[:1], x, x[:3]], enforce_sorted=False)}


def combined() -> CombinedLoader:
    loaders = {"a": shuffled(), "b": [DataLoader(items(20), batch_size=4, shuffle=True)]}
    return CombinedLoader(loaders, "max_size_cycle")


def distributed_by_hand() -> DataLoader:
    """What projects do under DDP; all stages of a replica must see all of the data."""
    sampler: DistributedSampler[Any] = DistributedSampler(items(), num_replicas=3, rank=int(os.environ["LOCAL_RANK"]))
    return DataLoader(items(), batch_size=8, sampler=sampler)


class AnyBatch(models.MLP):
    def loss(self, batch: Any) -> Tensor:
        x, y = [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)][:2]
        return super().loss((x, y))


def fit_and_note(loader: Any, strategy: Any, devices: int, **kwargs: Any) -> Any:
    notes = Notes()
    outcome = fit(AnyBatch, loader, strategy, devices, max_epochs=3, callbacks=[notes], **kwargs)
    return outcome, notes.batches


def same(ours: list[list[Any]], theirs: list[list[Any]]) -> bool:
    def one(a: Any, b: Any) -> bool:
        return a.equal(b) if isinstance(a, Tensor) else bool(a == b)

    return all(one(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))


LOADERS = [shuffled, stream, with_workers, own_batch_sampler, rich_batches, own_mappings, packed_batches, combined]


@pytest.mark.parametrize("loader", LOADERS)
def test_all_stages_see_the_batches_of_one_process(pool: WorkerPool, loader: Any) -> None:
    expected, batches = pool.run(fit_and_note, 1, loader, {"num_stages": 3, "virtual": True}, 1)[0]
    results = pool.run(fit_and_note, 3, loader, {"num_stages": 3}, 3)
    for _, others in results:
        assert same(others, batches)
    assert_equal(results[0][0], expected, 1e-6)


@pytest.mark.parametrize("loader", [seeded_by_rank, longer_by_rank, shorter_by_rank, distributed_by_hand])
def test_the_loader_of_stage_0_decides(pool: WorkerPool, loader: Any) -> None:
    results = pool.run(fit_and_note, 3, loader, {"num_stages": 3}, 3)
    for _, batches in results:
        assert same(batches, results[2][1])
    size = {longer_by_rank: 76, shorter_by_rank: 28}.get(loader, 44)
    assert sum(len(batch[0]) for batch in results[0][1]) == 3 * size


@pytest.mark.parametrize(
    "arguments",
    [{"limit_train_batches": 2}, {"overfit_batches": 2}, {"reload_dataloaders_every_n_epochs": 2}, {"max_steps": 7}],
)
@pytest.mark.parametrize("loader", [shuffled, stream])
def test_limits(pool: WorkerPool, loader: Any, arguments: dict[str, Any]) -> None:
    expected, batches = pool.run(fit_and_note, 1, loader, {"num_stages": 2, "virtual": True}, 1, **arguments)[0]
    results = pool.run(fit_and_note, 2, loader, {"num_stages": 2}, 2, **arguments)
    for outcome, others in results:
        assert same(others, batches)
        assert outcome.global_step == expected.global_step


class Module(LightningDataModule):
    """Asks the trainer, as real ones do."""

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        self.batch_size = 8 // self.trainer.num_nodes

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        return DataLoader(items(40 + 4 * self.trainer.current_epoch), batch_size=self.batch_size, shuffle=True)


def test_a_datamodule(pool: WorkerPool) -> None:
    arguments = {"reload_dataloaders_every_n_epochs": 1}
    expected, batches = pool.run(fit_and_note, 1, Module, {"num_stages": 2, "virtual": True}, 1, **arguments)[0]
    for outcome, others in pool.run(fit_and_note, 2, Module, {"num_stages": 2}, 2, **arguments):
        assert same(others, batches)
        assert_equal(outcome, expected, 1e-6) if outcome.rows else None


class Fails(Dataset[Any]):
    def __len__(self) -> int:
        return 80

    def __getitem__(self, index: int) -> Any:
        if index == 30:
            raise ZeroDivisionError("the user's own error")
        return torch.zeros(8), 0


def failing() -> DataLoader:
    return DataLoader(Fails(), batch_size=8)


def test_an_error_of_the_loader_ends_all(pool: WorkerPool) -> None:
    last, first = pool.try_run(fit, 2, models.MLP, failing, {"num_stages": 2}, 2)
    assert first.type == "ZeroDivisionError"
    assert "Stage 0 (rank 1) failed" in last.message
    assert "the user's own error" in last.message


class Unnamed(Dataset[Any]):
    """Its batches hold what cannot be sent to another process."""

    def __len__(self) -> int:
        return 80

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(8), 0

    def collate(self, samples: list[Any]) -> Any:
        class Local: ...

        return [*torch.utils.data.default_collate(samples), {"name": "a", "more": [Local()]}]


def unnamed() -> DataLoader:
    return DataLoader(Unnamed(), batch_size=8, collate_fn=Unnamed().collate)


def test_a_batch_that_cannot_be_sent(pool: WorkerPool) -> None:
    for result in pool.try_run(fit, 2, models.MLP, unnamed, {"num_stages": 2}, 2):
        assert "holds a `Local`" in result.message
        assert "stage 0 sends its batches to the others" in result.message


class Looks(models.MLP):
    """Reads large images on the first stage, and now and then where the loss is."""

    def __init__(self, every: int = 0, keeps: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.every, self.keeps = every, keeps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.loss((x.view(x.size(0), -1)[:, :8].float(), y))
        if self.every and batch_idx % self.every == 1:
            self.log("mean", x.mean(), on_step=True)
        if self.keeps and batch_idx == 3:
            self.example = x
        return loss

    def on_train_epoch_end(self) -> None:
        if self.keeps:
            self.log("example", self.example.sum())


def large_images() -> DataLoader:
    x = torch.randn(80, 3, 20, 20, generator=torch.Generator().manual_seed(5))
    return DataLoader(TensorDataset(x, torch.arange(80) % 4), batch_size=4, shuffle=True)


def fit_and_count_requests(strategy: Any, devices: int, **kwargs: Any) -> Any:
    """The outcome, and which batches this stage has asked for."""
    requests: list[int] = []
    fetch = StandIns._fetch

    def counted(self: StandIns, number: int, leaf: int) -> Tensor:
        requests.append(number)
        return fetch(self, number, leaf)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StandIns, "_fetch", counted)
        return fit(Looks, large_images, strategy, devices, max_epochs=2, module_args=kwargs), requests


@pytest.mark.parametrize("backward", ["stash", "recompute"])
@pytest.mark.parametrize(
    ("kwargs", "asked"), [({}, [0]), ({"every": 5}, [0, 1]), ({"keeps": True}, [0, 3])], ids=["never", "often", "kept"]
)
def test_what_a_stage_does_not_read_does_not_travel(
    pool: WorkerPool, kwargs: dict[str, Any], asked: list[int], backward: str
) -> None:
    expected = pool.run(fit_and_count_requests, 1, {"num_stages": 3, "virtual": True}, 1, **kwargs)[0][0]
    last, middle, first = pool.run(fit_and_count_requests, 3, {"num_stages": 3, "backward": backward}, 3, **kwargs)
    assert_equal(last[0], expected, 1e-6)
    assert last[1][: len(asked)] == asked  # the first batch is read by all: the plan is made on it
    assert len(last[1]) < 20  # what has been read once comes by itself
    assert middle[1] == [0]
    assert first[1] == []


def use_twice(strategy: Any, devices: int) -> Any:
    """One `CombinedLoader` for two fits by two trainers, for validations, and for plain Lightning in the end."""
    x = torch.randn(40, 1200, generator=torch.Generator().manual_seed(5))
    loaders = {"a": DataLoader(TensorDataset(x, torch.arange(40) % 4), 4), "b": DataLoader(TensorDataset(x[:30]), 3)}
    loader = CombinedLoader(loaders, "max_size_cycle")

    class Module(models.MLP):
        def loss(self, batch: Any) -> Tensor:
            (x, y), (z,) = batch["a"], batch["b"]
            return super().loss((x[:, :8] + z[:1, :8], y))

    outcomes = [fit(Module, lambda: loader, strategy, devices, max_epochs=2, reload_dataloaders_every_n_epochs=1)]
    outcomes.append(fit(Module, lambda: loader, strategy, devices))
    batches = list(loader)
    assert len(batches) == 10
    assert all(type(leaf) is Tensor for leaf in leaves(batches[0][0]))
    return outcomes


def test_a_combined_loader_can_be_used_again(pool: WorkerPool) -> None:
    expected = pool.run(use_twice, 1, {"num_stages": 2, "virtual": True}, 1)[0]
    for ours, theirs in zip(pool.run(use_twice, 2, {"num_stages": 2}, 2)[0], expected):
        assert_equal(ours, theirs, 1e-6)


class DividesItself(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        vectors = list(models.vectors())[:24]
        yield from vectors[dist.get_rank() :: dist.get_world_size()]


def divided() -> DataLoader[Any]:
    return DataLoader(DividesItself(), batch_size=None)


class DividedModule(LightningDataModule):
    """Its sampler asks when it is made."""

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        assert self.trainer.strategy.broadcast(self.trainer.global_rank) == 0  # all processes are here
        batches = torch.arange(96).view(24, 4).tolist()
        return DataLoader(items(96), batch_sampler=batches[dist.get_rank() :: dist.get_world_size()])


@pytest.mark.parametrize("loader", [divided, DividedModule])
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_what_divides_itself_does_so_among_replicas(pool: WorkerPool, loader: Any, num_replicas: int) -> None:
    devices, kwargs = 2 * num_replicas, {"use_distributed_sampler": False}
    outcome = pool.run(fit, devices, models.MLP, loader, {"num_stages": 2}, devices, **kwargs)[0]
    assert outcome.global_step == 24 // num_replicas


class OwnDistributed(DistributedSampler[Any]):
    """May also be a batch sampler."""


class Divided(Sampler[int]):
    def __init__(self, num_shards: int, rank: int) -> None:
        self._num_shards, self._rank = num_shards, rank


class OwnShard(TensorDataset):
    """As data sets that ask torch.distributed in `setup`."""

    def __init__(self, world_size: int, rank: int) -> None:
        super().__init__(torch.zeros(8))
        self.world_size, self.rank = world_size, rank


SAMPLERS = {
    "data set": lambda *where: {"dataset": OwnShard(*where)},
    "data set inside": lambda *where: {"dataset": Subset(OwnShard(*where), range(4))},
    "subclass": lambda *where: {"sampler": OwnDistributed(items(), *where)},
    "own": lambda *where: {"sampler": Divided(*where)},
    "of batches": lambda *where: {"batch_sampler": OwnDistributed(items(), *where)},
    "inside": lambda *where: {"batch_sampler": BatchSampler(Divided(*where), 4, drop_last=True)},
}


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_samplers_that_divide_among_processes_are_refused(make: Any) -> None:
    check_division(DataLoader(**{"dataset": items(), **make(2, 1)}), 2, 1)
    for where in [(2, 0), (4, 1)]:
        with pytest.raises(MisconfigurationException, match=f"divides them among {where[0]} processes"):
            check_division(DataLoader(**{"dataset": items(), **make(*where)}), 2, 1)


class Columns(Dataset[int]):
    """Gives its columns as attributes, as data frames do."""

    def __getattr__(self, name: str) -> Any:
        return {"x": [1, 2]}[name]

    def __len__(self) -> int:
        return 2


def test_a_data_set_may_make_items_of_names() -> None:
    check_division(DataLoader(Columns()), 2, 1)


def test_a_sampler_of_one_process_divides_nothing() -> None:
    check_division(DataLoader(items(), sampler=Divided(1, 0)), 2, 1)
