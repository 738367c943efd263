"""Remedies for the delay: processes do what virtual stages do, and these what is done by hand."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint

from lightning_dgmp import DelayedMPStrategy
from lightning_dgmp.optim import RotatedAdamW
from tests import models, sharing
from tests.pool import Failure, WorkerPool
from tests.training import Outcome, assert_equal, fit

SGD, ADAM = 1e-6, 1e-5

REMEDIES: dict[str, dict[str, Any]] = {
    "prediction": {"predict_weights": True},
    "discount": {"lr_discount_steps": 20},
    "correction": {"correct_updates": True},
    "synchronous": {"synchronous_steps": 7},
    "together": {"predict_weights": True, "lr_discount_steps": 20, "synchronous_steps": 5},
}


def both(
    pool: WorkerPool, num_stages: int, remedies: dict[str, Any], tied: bool = False, replicas: int = 1, **kwargs: Any
) -> tuple[Outcome, Outcome]:
    model = (sharing.Tied, models.ragged_tokens) if tied else (models.ValidatedMLP, models.vectors)
    args = {"module_args": {"optimizer": "momentum", "lr": 0.02}, **kwargs}
    devices = num_stages * replicas
    ours = pool.run(fit, devices, *model, {"num_stages": num_stages, **remedies}, devices, **args)
    virtual = {"num_stages": num_stages, "virtual": True, **remedies}
    virtual.pop("backward", None)
    return ours[0], pool.run(fit, replicas, *model, virtual, replicas, **args)[0]


@pytest.mark.parametrize("remedy", list(REMEDIES))
def test_virtual_stages_do_what_is_done_by_hand(pool: WorkerPool, remedy: str) -> None:
    num_stages, lr, momentum, last = 4, 0.02, 0.9, 3
    remedies = REMEDIES[remedy]
    strategy = {"num_stages": num_stages, "virtual": True, **remedies}
    args = {"module_args": {"optimizer": "momentum", "lr": lr}}
    ours = pool.run(fit, 1, models.MLP, models.vectors, strategy, 1, **args)[0]

    seed_everything(7, verbose=False)
    module = models.MLP()
    named = dict(module.named_parameters())
    velocity: dict[str, torch.Tensor] = {}
    previous = {name: torch.zeros_like(p) for name, p in named.items()}
    queues: dict[str, deque[torch.Tensor]] = {name: deque() for name in named}
    losses, batches = [], list(models.vectors())
    for t in range(len(batches) + last):
        is_synchronous = t < remedies.get("synchronous_steps", 0)
        delays = {name: 0 if is_synchronous else last - ours.stages[name][0] for name in named}
        if t < len(batches):
            kept = {name: p.detach().clone() for name, p in named.items()}
            with torch.no_grad():
                for name, p in named.items() if remedies.get("predict_weights") else ():
                    p += previous[name] * sum(momentum**j for j in range(1, delays[name] + 1))
            loss = module.loss(batches[t])
            losses.append(loss.item())
            for name, grad in zip(named, torch.autograd.grad(loss, list(named.values()))):
                queues[name].append(grad)
            with torch.no_grad():
                for name, p in named.items():
                    p.copy_(kept[name])
        total = remedies.get("lr_discount_steps", 0)
        with torch.no_grad():
            for name, p in named.items():
                if len(queues[name]) <= (delays[name] if t < len(batches) else 0):
                    continue
                grad = queues[name].popleft()
                velocity[name] = momentum * velocity[name] + grad if name in velocity else grad.clone()
                discount = max(1, delays[name]) ** -(1 - min(t / total, 1)) if total else 1.0
                update = -lr * discount * velocity[name]
                if remedies.get("correct_updates") and delays[name]:
                    p += 2 * update - previous[name]
                else:
                    p += update
                if delays[name]:
                    previous[name] = update

    assert [row["loss"] for _, row in ours.rows if "loss" in row] == pytest.approx(losses, rel=1e-5)
    for name, p in named.items():
        torch.testing.assert_close(ours.state[name], p.detach(), rtol=SGD, atol=SGD)


@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("remedy", list(REMEDIES))
def test_processes_equal_virtual_stages(pool: WorkerPool, remedy: str, num_stages: int) -> None:
    assert_equal(*both(pool, num_stages, REMEDIES[remedy]), SGD)


@pytest.mark.parametrize("remedy", ["together", "correction"])
def test_shared_parameters(pool: WorkerPool, remedy: str) -> None:
    ours, expected = both(pool, 3, REMEDIES[remedy], tied=True, module_args={"optimizer": "adamw"})
    assert_equal(ours, expected, ADAM)
    assert ours.stages["gpt.tok_emb.weight"] == (0, 2)


def test_the_rule_of_ouroboros_with_a_remedy(pool: WorkerPool) -> None:
    strategy: dict[str, Any] = {"num_stages": 3, "virtual": True, "tied": "ouroboros"}
    expected = pool.run(fit, 1, sharing.Tied, models.ragged_tokens, strategy, 1)[0]
    smaller = pool.run(fit, 1, sharing.Tied, models.ragged_tokens, {**strategy, "lr_discount_steps": 10**6}, 1)[0]
    seed_everything(7, verbose=False)
    begin = sharing.Tied().gpt.tok_emb.weight.detach()
    far, near = ((o.state["gpt.tok_emb.weight"] - begin).norm() for o in (expected, smaller))
    assert 0.2 * far < near < 0.8 * far


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulation and clipping": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.3},
    "flushes": {"gradient_clip_val": 0.3, "val_check_interval": 5, "limit_train_batches": 20, "max_epochs": 2},
    "replicas": {"replicas": 2},
}


@pytest.mark.parametrize("options", list(OPTIONS))
def test_trainer_arguments(pool: WorkerPool, options: str) -> None:
    args = dict(OPTIONS[options])
    if "val_check_interval" in args:
        args["make_val_loader"] = models.vectors
    assert_equal(*both(pool, 2 if options == "replicas" else 3, REMEDIES["together"], **args), SGD)


def test_recompute(pool: WorkerPool) -> None:
    assert_equal(*both(pool, 3, {**REMEDIES["together"], "backward": "recompute"}), SGD)


class Unfreezes(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze([pl_module.inp])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group([pl_module.inp], optimizer, lr=0.01)


def fit_finetuning(num_stages: int, devices: int, virtual: bool) -> Outcome:
    strategy = {"num_stages": num_stages, "virtual": virtual, **REMEDIES["together"]}
    args: dict[str, Any] = {"module_args": {"optimizer": "momentum"}, "callbacks": [Unfreezes()], "max_epochs": 2}
    return fit(models.MLP, models.vectors, strategy, devices, **args)


def test_parameter_groups_that_are_added(pool: WorkerPool) -> None:
    assert_equal(pool.run(fit_finetuning, 3, 3, 3, False)[0], pool.run(fit_finetuning, 1, 3, 1, True)[0], SGD)


class Checkpoints(models.MLP):
    """Runs layers again in the backward, with the weights of the forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.inp(x))
        for layer in self.hidden:
            x = torch.tanh(torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False))
        return self.out(x)


def test_activation_checkpointing(pool: WorkerPool) -> None:
    strategy, args = {"num_stages": 3, "predict_weights": True}, {"module_args": {"optimizer": "momentum"}}
    ours = pool.run(fit, 3, Checkpoints, models.vectors, strategy, 3, **args)[0]
    expected = pool.run(fit, 1, Checkpoints, models.vectors, {**strategy, "virtual": True}, 1, **args)[0]
    assert_equal(ours, expected, SGD)
    plain = pool.run(fit, 1, models.MLP, models.vectors, {**strategy, "virtual": True}, 1, **args)[0]
    if plain.plan == expected.plan:
        assert_equal(expected, plain, SGD)


class Rotated(models.MLP):
    def configure_optimizers(self) -> Any:
        return RotatedAdamW(self.parameters(), lr=1e-3)


class Muon(models.MLP):
    def configure_optimizers(self) -> Any:
        return torch.optim.Muon([p for p in self.parameters() if p.dim() == 2], lr=1e-2)


@pytest.mark.parametrize("module", [Rotated, Muon])
def test_other_optimizers(pool: WorkerPool, module: Any) -> None:
    strategy = {"num_stages": 3, "predict_weights": True}
    ours = pool.run(fit, 3, module, models.vectors, strategy, 3)[0]
    expected = pool.run(fit, 1, module, models.vectors, {**strategy, "virtual": True}, 1)[0]
    assert_equal(ours, expected, ADAM)


def fit_and_resume(folder: str, resumes: bool) -> Outcome:
    def train(**kwargs: Any) -> Outcome:
        callbacks = [ModelCheckpoint(folder, save_last=True)]
        args: dict[str, Any] = {"enable_checkpointing": True, "limit_train_batches": 12, "callbacks": callbacks}
        strategy = {"num_stages": 3, "predict_weights": True, "lr_discount_steps": 50}
        return fit(Rotated, models.vectors, strategy, 3, **args, **kwargs)

    if not resumes:
        return train(max_epochs=2)
    train(max_epochs=1)
    return train(max_epochs=2, ckpt_path=f"{folder}/last.ckpt")


def test_resume_is_bit_for_bit(pool: WorkerPool, tmp_path: Path) -> None:
    expected = pool.run(fit_and_resume, 3, str(tmp_path / "a"), False)[0]
    ours = pool.run(fit_and_resume, 3, str(tmp_path / "b"), True)[0]
    for name, value in expected.state.items():
        torch.testing.assert_close(ours.state[name], value, rtol=0, atol=0)


def test_prediction_needs_momentum(pool: WorkerPool) -> None:
    for result in pool.try_run(fit, 2, models.MLP, models.vectors, {"num_stages": 2, "predict_weights": True}, 2):
        assert isinstance(result, Failure)
        assert "from the momentum, but `SGD` has none" in result.message


@pytest.mark.parametrize("other", [{"backward": "replay"}, {"tied": "ouroboros", "virtual": True, "num_stages": 2}])
def test_prediction_needs_one_version_of_the_weights(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="gives a batch one version of the weights"):
        DelayedMPStrategy(predict_weights=True, **other)
