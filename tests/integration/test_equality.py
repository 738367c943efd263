"""The chain of proof: plain Lightning = one stage; a FIFO by hand = virtual stages = processes."""

from __future__ import annotations

from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests import models, traps
from tests.pool import WorkerPool
from tests.training import Outcome, assert_equal, fit

SGD = 1e-6
ADAM = 1e-5  # the root of a small second moment blows up rounding
OPTIMIZERS = [("sgd", SGD), ("momentum", SGD), ("adamw", ADAM)]


def example_model(**_: Any) -> Any:
    from char_lm import CharLM

    return CharLM(layers=6, width=16, heads=2, context=16, steps=40)


def example_data() -> Any:
    from char_lm import TextCrops

    text = Path(__file__).read_bytes()
    return DataLoader(TextCrops(text, context=16, num_crops=4 * 33 + 2), batch_size=4)


MODELS: dict[str, tuple[Any, Any]] = {
    "mlp": (models.MLP, models.vectors),
    "language model": (models.LanguageModel, models.ragged_tokens),
    "the example": (example_model, example_data),
    "tuples": (models.TupleModel, models.ragged_tokens),
    "residual net": (models.ResidualNet, models.images),
    "u-net": (models.UNet, models.images),
    "lightning's transformer": (models.DemoTransformer, models.ragged_tokens),
    "two views": (models.Contrastive, models.vectors),
    "custom function": (traps.CustomFunction, models.vectors),
    "a look without a graph": (traps.LooksFirst, models.vectors),
    "reentrant checkpoint": (traps.ReentrantCheckpoint, models.vectors),
    "checkpoint": (partial(traps.Checkpointed, depth=6), models.vectors),
    "penalties": (traps.Penalised, models.vectors),
    "changes in place": (traps.ChangesThings, models.vectors),
    "unfrozen later": (traps.Unfreezes, models.vectors),
    "moving average": (traps.MovingAverage, models.vectors),
    "backward hooks": (traps.BackwardHooks, models.vectors),
    "layouts": (traps.Layouts, models.vectors),
    "skips": (partial(traps.Skips, lr=0.01), models.vectors),
    "features": (traps.Features, models.vectors),
    "state": (partial(traps.KeepsState, lr=0.005), models.vectors),
    "kept gradients": (traps.KeepsGradients, models.vectors),
    "gpt2": (partial(models.HuggingFace, "gpt2"), models.ragged_tokens),
    "llama": (partial(models.HuggingFace, "llama"), models.ragged_tokens),
    "bert": (partial(models.HuggingFace, "bert"), models.ragged_tokens),
}


def virtual(pool: WorkerPool, name: str, num_stages: int, **kwargs: Any) -> Outcome:
    strategy = {"num_stages": num_stages, "virtual": True}
    return pool.run(fit, 1, *MODELS[name], strategy, 1, **kwargs)[0]


def processes(pool: WorkerPool, name: str, num_stages: int, backward: str = "stash", **kwargs: Any) -> Outcome:
    strategy = {"num_stages": num_stages, "backward": backward}
    outcomes = pool.run(fit, num_stages, *MODELS[name], strategy, num_stages, **kwargs)
    for other in outcomes[1:]:  # after training every process has the whole model
        for key, value in outcomes[0].state.items():
            torch.testing.assert_close(other.state[key], value, rtol=0, atol=0)
    return outcomes[0]


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("name", ["mlp", "language model", "residual net"])
def test_one_stage_is_plain_lightning_bit_for_bit(pool: WorkerPool, name: str, optimizer: str) -> None:
    args = {"module_args": {"optimizer": optimizer}}
    plain = pool.run(fit, 1, *MODELS[name], None, 1, **args)[0]
    ours = pool.run(fit, 1, *MODELS[name], {"num_stages": 1}, 1, **args)[0]
    assert len(plain.rows) > 30
    assert_equal(ours, plain, 0.0)


@pytest.mark.parametrize(("optimizer", "tolerance"), OPTIMIZERS)
@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("name", ["mlp", "language model"])
def test_virtual_stages_are_a_fifo_of_gradients(
    pool: WorkerPool, name: str, num_stages: int, optimizer: str, tolerance: float
) -> None:
    ours = virtual(pool, name, num_stages, module_args={"optimizer": optimizer})

    seed_everything(7, verbose=False)
    make_module, make_loader = MODELS[name]
    module = make_module(optimizer=optimizer)
    configured = module.configure_optimizers()
    opt, scheduler = (
        (configured["optimizer"], configured["lr_scheduler"]["scheduler"])
        if isinstance(configured, dict)
        else (configured, None)
    )
    named = list(module.named_parameters())
    delays = {n: num_stages - 1 - ours.stages[n][0] for n, _ in named}
    fifo: dict[str, deque[Tensor | None]] = {n: deque([None] * delays[n]) for n, _ in named}
    losses = []
    for batch in make_loader():
        opt.zero_grad()
        loss = module.loss(batch)
        loss.backward()
        losses.append(loss.item())
        for n, p in named:
            fifo[n].append(p.grad)
            p.grad = fifo[n].popleft()
        opt.step()
        if scheduler is not None:
            scheduler.step()
    while any(fifo.values()):
        for n, p in named:
            p.grad = fifo[n].popleft() if fifo[n] else None
        opt.step()

    assert [row["loss"] for _, row in ours.rows if "loss" in row] == pytest.approx(losses, rel=1e-6)
    for n, p in named:
        torch.testing.assert_close(ours.state[n], p.detach(), rtol=tolerance, atol=tolerance)


ORDINARY = ["mlp", "language model", "the example", "tuples", "residual net", "u-net", "lightning's transformer"]
ORDINARY += ["two views", "gpt2", "llama", "bert"]
TRAPS = [name for name in MODELS if name not in ORDINARY]  # on two stages or on four, to save time
CASES = [(name, k) for name in ORDINARY for k in (2, 4)] + [(name, 4 if i % 2 else 2) for i, name in enumerate(TRAPS)]


@pytest.mark.parametrize(("name", "num_stages"), CASES)
def test_processes_equal_virtual_stages(pool: WorkerPool, name: str, num_stages: int) -> None:
    expected = virtual(pool, name, num_stages)
    assert len(expected.rows) >= 30
    assert_equal(processes(pool, name, num_stages), expected, ADAM if name == "the example" else SGD)


@pytest.mark.parametrize(("optimizer", "tolerance"), OPTIMIZERS[1:])
@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("name", ["mlp", "language model"])
def test_processes_equal_virtual_stages_with_any_optimizer(
    pool: WorkerPool, name: str, num_stages: int, optimizer: str, tolerance: float
) -> None:
    args = {"module_args": {"optimizer": optimizer}}
    assert_equal(processes(pool, name, num_stages, **args), virtual(pool, name, num_stages, **args), tolerance)


@pytest.mark.parametrize(
    "name", ["language model", "residual net", "u-net", "two views", "moving average", "gpt2", "skips"]
)
def test_recompute_equals_stash(pool: WorkerPool, name: str) -> None:
    assert_equal(processes(pool, name, 3, "recompute"), processes(pool, name, 3, "stash"), SGD)


def test_recompute_sees_the_state_of_the_first_time(pool: WorkerPool) -> None:
    args = {"max_epochs": 2}
    assert_equal(processes(pool, "state", 3, "recompute", **args), virtual(pool, "state", 3, **args), SGD)


def test_several_epochs_keep_the_pipeline_full(pool: WorkerPool) -> None:
    args: dict[str, Any] = {"max_epochs": 3, "limit_train_batches": 12, "module_args": {"optimizer": "momentum"}}
    assert_equal(processes(pool, "mlp", 3, **args), virtual(pool, "mlp", 3, **args), SGD)


@pytest.mark.parametrize("limit", [1, 2])
def test_fewer_batches_than_stages(pool: WorkerPool, limit: int) -> None:
    args = {"limit_train_batches": limit}
    assert_equal(processes(pool, "mlp", 4, **args), virtual(pool, "mlp", 4, **args), SGD)


def test_bfloat16_autocast(pool: WorkerPool) -> None:
    args = {"precision": "bf16-mixed"}
    assert_equal(processes(pool, "language model", 3, **args), virtual(pool, "language model", 3, **args), SGD)


def test_validation_sees_the_flushed_model(pool: WorkerPool) -> None:
    args: dict[str, Any] = {"max_epochs": 2, "val_check_interval": 10, "limit_train_batches": 20}
    kwargs = {"make_val_loader": models.vectors, **args}
    expected = pool.run(fit, 1, models.ValidatedMLP, models.vectors, {"num_stages": 3, "virtual": True}, 1, **kwargs)[0]
    assert any("val_loss" in row for _, row in expected.rows)
    ours = pool.run(fit, 3, models.ValidatedMLP, models.vectors, {"num_stages": 3}, 3, **kwargs)[0]
    assert_equal(ours, expected, SGD)


def test_replay_equals_its_serial_reference(pool: WorkerPool) -> None:
    """Features Replay: the gradient of an old batch and an old error, at today's weights and the old input."""
    num_stages = 3
    strategy = {"num_stages": num_stages, "backward": "replay", "split_at": ["hidden.0", "hidden.2"]}
    ours = pool.run(fit, num_stages, *MODELS["mlp"], strategy, num_stages)[0]

    seed_everything(7, verbose=False)
    module = models.MLP()
    layers = [[module.inp], [module.hidden[0], module.hidden[1]], [module.hidden[2], module.hidden[3], module.out]]

    def run(stage: int, x: Tensor) -> Tensor:
        for layer in layers[stage]:
            x = layer(x) if layer is module.out else torch.tanh(layer(x))
        return x

    batches = list(models.vectors())
    parameters = [list(nn.ModuleList(stage).parameters()) for stage in layers]
    inputs: list[dict[int, Tensor]] = [{} for _ in layers]
    errors: list[dict[int, Tensor]] = [{} for _ in layers]  # with respect to a stage's output
    losses = []
    for t in range(len(batches) + num_stages - 1):
        grads: list[list[Tensor]] = [[] for _ in layers]
        if t < len(batches):
            x = batches[t][0]
            with torch.no_grad():
                for k in range(num_stages):
                    inputs[k][t] = x
                    x = run(k, x)
        for k in range(num_stages):
            b = t - (num_stages - 1 - k)
            if not 0 <= b < len(batches):
                continue
            x = inputs[k].pop(b).clone().requires_grad_(k > 0)
            out = run(k, x)
            if k == num_stages - 1:
                loss = F.cross_entropy(out, batches[b][1])
                losses.append(loss.item())
                wrt = torch.autograd.grad(loss, [*parameters[k], x])
            else:
                wrt = torch.autograd.grad(out, [*parameters[k], *([x] if k else [])], errors[k].pop(b))
            if k:
                errors[k - 1][b] = wrt[-1]
            grads[k] = list(wrt[: len(parameters[k])])
        with torch.no_grad():
            for k in range(num_stages):
                for p, g in zip(parameters[k], grads[k]):
                    p -= module.lr * g

    assert [row["loss"] for _, row in ours.rows if "loss" in row] == pytest.approx(losses, rel=1e-6)
    for n, p in module.named_parameters():
        torch.testing.assert_close(ours.state[n], p.detach(), rtol=SGD, atol=SGD)
