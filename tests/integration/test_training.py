"""What happens around the steps: stopping, metrics, hooks, a second fit."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_dgmp import DelayedMPStrategy
from lightning_dgmp.schedule import delayed_schedule, delays_of
from lightning_dgmp.stage.runner import StageRunner
from tests import models
from tests.pool import Failure, WorkerPool
from tests.training import assert_equal, fit


class StopsItself(models.MLP):
    """The wish to stop arises in code that runs on the last stage alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 9:
            self.trainer.should_stop = True
        return loss


@pytest.mark.parametrize("num_stages", [2, 4])
def test_all_stages_stop_after_the_same_batch(pool: WorkerPool, num_stages: int) -> None:
    outcomes = pool.run(fit, num_stages, StopsItself, models.vectors, {"num_stages": num_stages}, num_stages)
    steps = {outcome.global_step for outcome in outcomes}
    assert len(steps) == 1
    assert 10 <= steps.pop() <= 10 + 2 * num_stages


class StopsOnOneRank(Callback):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.current_epoch == 1 and trainer.global_rank == self.rank:
            trainer.should_stop = True


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_stops_all_at_the_end_of_an_epoch(pool: WorkerPool, rank: int) -> None:
    args: dict[str, Any] = {"max_epochs": 5, "limit_train_batches": 6, "callbacks": [StopsOnOneRank(rank)]}
    outcomes = pool.run(fit, 2, models.MLP, models.vectors, {"num_stages": 2}, 2, timeout=30, **args)
    assert [outcome.global_step for outcome in outcomes] == [12, 12]


def fit_with_early_stopping(strategy: Any, devices: int) -> Any:
    callback = EarlyStopping("val_loss", patience=0, min_delta=10.0)  # nothing is ever better by so much
    args: dict[str, Any] = {"callbacks": [callback], "val_check_interval": 8, "make_val_loader": models.vectors}
    return fit(models.ValidatedMLP, models.vectors, strategy, devices, **args)


def test_early_stopping_stops_at_once(pool: WorkerPool) -> None:
    expected = pool.run(fit_with_early_stopping, 1, {"num_stages": 3, "virtual": True}, 1)[0]
    ours = pool.run(fit_with_early_stopping, 3, {"num_stages": 3}, 3)
    assert expected.global_step == 16
    assert [outcome.global_step for outcome in ours] == [16] * 3
    assert_equal(ours[0], expected, 1e-6)


class Measured(models.MLP):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.accuracy = MulticlassAccuracy(4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = torch.nn.functional.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("loss", loss.detach().item(), sync_dist=True, on_epoch=True)
        return loss


def test_metrics_in_a_training_step(pool: WorkerPool) -> None:
    expected = pool.run(fit, 1, Measured, models.vectors, {"num_stages": 2, "virtual": True}, 1)[0]
    assert any("accuracy_epoch" in row for _, row in expected.rows)
    assert_equal(pool.run(fit, 2, Measured, models.vectors, {"num_stages": 2}, 2)[0], expected, 1e-6)


class CallsOutside(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == 3:
            pl_module(torch.zeros(2, 8))


def call_outside() -> Any:
    return fit(models.MLP, models.vectors, {"num_stages": 2}, 2, callbacks=[CallsOutside()])


def test_a_forward_outside_of_a_step_is_an_error(pool: WorkerPool) -> None:
    results = pool.try_run(call_outside, 2)
    assert all(isinstance(result, Failure) for result in results)
    assert any("was called outside of a step on stage" in result.message for result in results)
    assert any("with trainer.strategy.whole_model():" in result.message for result in results)


class Samples(models.ValidatedMLP):
    def on_validation_epoch_end(self) -> None:
        with self.trainer.strategy.whole_model():  # type: ignore[attr-defined]
            self.log("sample", self(torch.ones(1, 8)).exp().sum())

    def on_train_epoch_end(self) -> None:
        with self.trainer.strategy.whole_model():  # type: ignore[attr-defined]
            self.log("other", self(torch.ones(1, 8)).exp().sum())


def test_calls_outside_of_a_step_with_the_whole_model(pool: WorkerPool) -> None:
    args: dict[str, Any] = {"make_val_loader": models.vectors, "val_check_interval": 9}
    expected = pool.run(fit, 1, Samples, models.vectors, {"num_stages": 3, "virtual": True}, 1, **args)[0]
    assert sum("sample" in row for _, row in expected.rows) == 3
    assert_equal(pool.run(fit, 3, Samples, models.vectors, {"num_stages": 3}, 3, **args)[0], expected, 1e-6)


class ConfiguredLater(models.MLP):
    """Makes a part of itself when Lightning asks for it, and its optimizer from what the trainer holds."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.hidden is None:
            self.hidden = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def configure_optimizers(self) -> Any:
        assert self.trainer.model is not None
        return torch.optim.AdamW(self.trainer.model.parameters(), lr=1e-3)


def test_a_module_that_is_made_late(pool: WorkerPool) -> None:
    expected = pool.run(fit, 1, ConfiguredLater, models.vectors, {"num_stages": 3, "virtual": True}, 1)[0]
    assert len(expected.state) == 12
    ours = pool.run(fit, 3, ConfiguredLater, models.vectors, {"num_stages": 3}, 3)[0]
    assert {stage for stages in ours.stages.values() for stage in stages} == {0, 1, 2}
    assert_equal(ours, expected, 1e-5)


class Hooked(models.MLP):
    """Hooks that change gradients and steps."""

    def on_after_backward(self) -> None:
        for p in self.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.trainer.global_step + 1) / 10)
        optimizer.step(closure=optimizer_closure)


def test_hooks_act_on_delayed_gradients(pool: WorkerPool) -> None:
    args: dict[str, Any] = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    expected = pool.run(fit, 1, Hooked, models.vectors, {"num_stages": 3, "virtual": True}, 1, **args)[0]
    assert_equal(pool.run(fit, 3, Hooked, models.vectors, {"num_stages": 3}, 3, **args)[0], expected, 1e-6)


def fit_twice() -> tuple[float, float]:
    """Again with the same Trainer and module, then test it."""
    module = models.ValidatedMLP()
    strategy = DelayedMPStrategy(num_stages=2)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, models.vectors())
    first = trainer.validate(module, models.vectors(), verbose=False)[0]["val_loss"]
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, models.vectors())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in module.parameters())
    return first, trainer.validate(module, models.vectors(), verbose=False)[0]["val_loss"]


def test_a_second_fit_goes_on_and_the_module_is_whole(pool: WorkerPool) -> None:
    one, two = pool.run(fit_twice, 2)
    assert one == two
    assert one[1] < one[0]


class Shuffled(models.MLP):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        noise = torch.randn_like(x) * 0.1  # drawn alike on all stages
        return super().training_step((x + noise, y), batch_idx)


def shuffled_vectors() -> Any:
    return torch.utils.data.DataLoader(models.vectors().dataset, batch_size=8, shuffle=True)


def test_shuffling_without_a_seed_agrees_on_all_stages(pool: WorkerPool) -> None:
    # Stages that saw different batches would differ in their losses, which are compared batch by batch.
    args = {"max_epochs": 2}
    expected = pool.run(fit, 1, models.MLP, shuffled_vectors, {"num_stages": 2, "virtual": True}, 1, **args)[0]
    assert_equal(pool.run(fit, 2, models.MLP, shuffled_vectors, {"num_stages": 2}, 2, **args)[0], expected, 1e-6)


def test_a_sanity_check_does_not_change_the_shuffling(pool: WorkerPool) -> None:
    args: dict[str, Any] = {"max_epochs": 2, "make_val_loader": shuffled_vectors, "limit_val_batches": 2}
    what = models.ValidatedMLP, shuffled_vectors
    expected = pool.run(fit, 1, *what, {"num_stages": 2, "virtual": True}, 1, **args)[0]
    assert_equal(pool.run(fit, 2, *what, {"num_stages": 2}, 2, **args)[0], expected, 1e-6)


def test_noise_drawn_in_the_step_agrees_on_all_stages(pool: WorkerPool) -> None:
    losses = []
    for num_stages in (2, 3):
        outcome = pool.run(fit, num_stages, Shuffled, models.vectors, {"num_stages": num_stages}, num_stages)[0]
        losses.append(next(row["loss"] for _, row in outcome.rows if "loss" in row))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def fit_noting_the_schedule(num_stages: int, num_batches: int) -> Any:
    """What this stage did: the number of each batch that went forward or back, in order."""
    notes: list[str] = []
    forward, backward = StageRunner.forward, StageRunner.backward

    def noting_forward(self: StageRunner, *args: Any) -> Any:
        notes.append(f"F{self.num_forwards}")
        return forward(self, *args)

    def noting_backward(self: StageRunner, *args: Any) -> Any:
        notes.append(f"B{self.in_flight[0].batch}")
        return backward(self, *args)

    with patch.object(StageRunner, "forward", noting_forward), patch.object(StageRunner, "backward", noting_backward):
        fit(models.MLP, models.vectors, {"num_stages": num_stages}, num_stages, limit_train_batches=num_batches)
    return notes


def test_stages_follow_the_schedule(pool: WorkerPool) -> None:
    notes = pool.run(fit_noting_the_schedule, 3, 3, 7)
    for done, planned in zip(reversed(notes), delayed_schedule(delays_of(3), 7)):
        assert " ".join(done) == " ".join(map(str, planned))


class Noisy(models.MLP):
    """Draws for the batch, and for a value of the first stage after a random operation on it; every stage keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.early: list[Any] = [lambda: 0]  # cannot be pickled, so it is not shared, and each stage has its own
        self.drawn: list[Any] = [lambda: 0]

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        mask, steps, noise = (
            torch.bernoulli(torch.full(x.shape, 0.15)),
            torch.randint(100, y.shape),
            torch.randn_like(x),
        )
        self.early.append(torch.cat([mask, steps[:, None], noise], dim=1))
        h = self.inp(x * (1 - mask) + noise * steps[:, None] / 100)
        h = nn.functional.dropout(h + 0.1 * torch.randn_like(h), 0.5)
        h = self.hidden[0](h)
        noise = torch.rand(4)
        self.drawn.append(noise)
        for layer in self.hidden[1:]:
            h = layer(torch.tanh(h))
        return nn.functional.cross_entropy(self.out(h) + noise, y)


def fit_keeping_what_was_drawn(num_stages: int) -> tuple[list[Tensor], list[Tensor]]:
    kept: list[Noisy] = []

    def make() -> Noisy:
        kept.append(Noisy())
        return kept[0]

    fit(make, models.vectors, {"num_stages": num_stages}, num_stages)
    return kept[0].early[1:], kept[0].drawn[1:]


def test_random_numbers_drawn_in_a_step_agree(pool: WorkerPool) -> None:
    early, (last, middle, first) = zip(*pool.run(fit_keeping_what_was_drawn, 3, 3))
    assert len(torch.cat(early[0]).unique(dim=0)) == 33 * 8 + 4
    for drawn in early[1:]:
        torch.testing.assert_close(drawn, early[0], rtol=0, atol=0)
    assert first == []  # it had nothing to do any more
    assert len(torch.stack(last).unique()) == 34 * 4
    torch.testing.assert_close(middle, last, rtol=0, atol=0)


class GrowsAndReturns(models.MLP):
    """A buffer of a stage that grows, and an early value in what the step returns."""

    class Layer(nn.Linear):
        def __init__(self) -> None:
            super().__init__(16, 16)
            self.register_buffer("seen", torch.zeros(0))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = torch.cat([self.seen, x.detach().mean()[None]])
            return super().forward(x)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden[0] = self.Layer()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        early = h = self.inp(x)
        for layer in self.hidden:
            h = layer(torch.tanh(h))
        loss = nn.functional.cross_entropy(self.out(h), y)
        self.log("loss", loss)
        self.log("early", early.mean())
        return {"loss": loss, "early": early.detach()}


def test_growing_buffers_and_early_values(pool: WorkerPool) -> None:
    expected = pool.run(fit, 1, GrowsAndReturns, models.vectors, {"num_stages": 3, "virtual": True}, 1)[0]
    for outcome in (ours := pool.run(fit, 3, GrowsAndReturns, models.vectors, {"num_stages": 3}, 3)):
        assert outcome.state["hidden.0.seen"].shape == (34,)
    assert_equal(ours[0], expected, 1e-6)


def fit_and_save_afterwards(folder: str) -> None:
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=DelayedMPStrategy(2), max_steps=5, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(models.MLP(optimizer="adamw"), models.vectors())
    trainer.save_checkpoint(f"{folder}/after.ckpt")


def test_saving_after_fit(pool: WorkerPool, tmp_path: Any) -> None:
    pool.run(fit_and_save_afterwards, 2, str(tmp_path))
    checkpoint = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 5
    assert len(checkpoint["optimizer_states"][0]["state"]) == 12
