"""Hooks, callbacks and data modules around the batches that the first stage loads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from lightning_dgmp import DelayedMPStrategy
from tests import models
from tests.integration.test_data import Notes, items, shuffled
from tests.pool import WorkerPool
from tests.training import assert_equal, fit


class LooksAlone(Callback):
    """Iterates over the Trainer's loaders on rank 0 alone, as for some pictures."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_validation_epoch_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            self.sizes.append(len(next(iter(trainer.val_dataloaders))[0]))  # type: ignore[call-overload]

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            self.sizes += [len(batch[0]) for batch in trainer.train_dataloader]  # type: ignore[union-attr]


def fit_and_look(looks: bool) -> Any:
    callback = LooksAlone()
    outcome = fit(models.ValidatedMLP, shuffled, {"num_stages": 2}, 2, callbacks=[callback] if looks else [],
                  make_val_loader=models.vectors, max_epochs=2)  # fmt: skip
    return outcome, callback.sizes


def test_a_callback_may_iterate_alone(pool: WorkerPool) -> None:
    (outcome, sizes), (_, others) = pool.run(fit_and_look, 2, True, timeout=60)
    assert sizes == [8, *([8] * 6 + [4]) * 2]  # the sanity check, and of each epoch a validation and all of training
    assert others == []
    assert_equal(outcome, pool.run(fit_and_look, 2, False)[0][0], 0.0)


class LooksAtItsOwn(Callback):
    """Iterates over a ``CombinedLoader`` that it keeps, on rank 0 alone, while Lightning uses it too."""

    def __init__(self, loader: CombinedLoader) -> None:
        self.loader, self.count = loader, 0

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            self.count += sum(1 for _ in self.loader)


class TakesTwo(models.MLP):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch["a"]) + self.loss(batch["b"])


def fit_combined() -> int:
    loader = CombinedLoader({"a": shuffled(), "b": models.vectors()}, "min_size")
    looks = LooksAtItsOwn(loader)
    fit(TakesTwo, lambda: loader, {"num_stages": 2}, 2, callbacks=[looks], max_epochs=2)
    return looks.count


def test_a_callback_may_iterate_over_what_lightning_uses(pool: WorkerPool) -> None:
    assert pool.run(fit_combined, 2, timeout=60) == [12, 0]


class Positioned(IterableDataset[Any]):
    """Goes on where it was."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[Any]:
        everything = items()
        while self.position < len(everything):
            self.position += 1
            yield everything[self.position - 1]
        self.position = 0


class StatefulData(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.stream = Positioned()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.stream, batch_size=4)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.stream.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.stream.position = state["position"]


def first_numbers(folder: str, devices: int, sharded: bool, ckpt_path: str | None = None) -> list[float]:
    notes, save = Notes(), ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    strategy = DelayedMPStrategy(num_stages=devices, save_distributed_checkpoint=sharded)
    trainer = Trainer(accelerator="cpu", devices=devices, strategy=strategy, logger=False, max_epochs=1,
                      callbacks=[notes, save], enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(models.MLP(), datamodule=StatefulData(), ckpt_path=ckpt_path)
    return [float(batch[0][0, 0]) for batch in notes.batches]


@pytest.mark.parametrize("sharded", [False, True])
def test_the_state_of_a_data_module_is_that_of_who_loads(pool: WorkerPool, tmp_path: Path, sharded: bool) -> None:
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        whole = pool.run(first_numbers, devices, str(folder), devices, sharded and devices > 1)
        path = str(folder / "step=4.ckpt")
        resumed = pool.run(first_numbers, devices, str(folder / "on"), devices, sharded and devices > 1, path)
        assert len(whole[0]) == 11
        assert resumed == [numbers[5:] for numbers in whole]  # Lightning has fetched a batch ahead


class Mixes(models.MLP):
    """Mixes samples after the transfer, while other hooks draw as they like."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.orders: list[list[int]] = []

    def mixed(self, batch: Any) -> Any:
        order = torch.randperm(len(batch[0]))
        self.orders.append([*order.tolist(), random.randrange(99), int(numpy.random.randint(99))])
        return batch[0] + batch[0][order], batch[1]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.mixed(batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.mixed(batch)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad += 1e-3 * torch.randn_like(parameter.grad)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.is_global_zero:
            torch.rand(3)


def orders_of_batches() -> list[list[int]]:
    module = Mixes()
    fit(lambda: module, shuffled, {"num_stages": 3}, 3, make_val_loader=models.vectors, max_epochs=2)
    return module.orders


def test_all_stages_draw_alike_in_hooks_that_change_batches(pool: WorkerPool) -> None:
    orders = pool.run(orders_of_batches, 3)
    assert orders[0] == orders[1] == orders[2]
    assert len({tuple(order) for order in orders[0] if len(order) == 10}) > 20
