"""Precision plugins of Lightning; above all `16-mixed`, whose loss scale belongs to the last stage."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F

from tests import models
from tests.pool import Failure, WorkerPool
from tests.training import Outcome, assert_equal, fit

GROWTH = 5


class _Overflows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, does: bool) -> Tensor:
        ctx.does = does
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (torch.full_like(grad, math.inf) if ctx.does else grad), None


class Layer(nn.Linear):
    def forward(self, x: Tensor, overflows: bool) -> Tensor:  # type: ignore[override]
        return torch.tanh(F.linear(x, _Overflows.apply(self.weight, overflows), self.bias))


class Overflowing(models.Base):
    """The gradients of some batches overflow, in a layer of choice."""

    def __init__(self, where: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.where = where
        self.layers = nn.ModuleList(Layer(8, 8) for _ in range(4))
        self.out = nn.Linear(8, 4)

    def loss(self, batch: Any) -> Tensor:
        h, y = batch
        overflows = bool(h[0, 0] > 0.8)
        for i, layer in enumerate(self.layers):
            h = layer(h, overflows and i == self.where)
        return F.cross_entropy(self.out(h).float(), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class SharesAWeight(Overflowing):
    """The first layer and the last, on two stages, have one weight."""

    def __init__(self, where: int = 0, **kwargs: Any) -> None:
        super().__init__(where, **kwargs)
        self.layers[3].weight = self.layers[0].weight


SPLITS = {2: ["layers.2"], 3: ["layers.1", "layers.3"], 4: ["layers.1", "layers.2", "layers.3"]}


class WithScale(Outcome):
    scale: float
    growth_tracker: int


def fit_scaled(
    num_stages: int,
    virtual: bool = False,
    where: int = 0,
    scale: float = 2.0**10,
    replicas: int = 1,
    module: type[Overflowing] = Overflowing,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    plugin = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=scale, growth_interval=GROWTH))
    strategy = {"num_stages": num_stages, "virtual": virtual, "split_at": SPLITS[num_stages], **(options or {})}
    args: dict[str, Any] = {"module_args": {"where": where, "optimizer": "momentum"}, **kwargs}
    devices = replicas * (1 if virtual else num_stages)
    outcome = fit(module, models.vectors, strategy, devices, plugins=[plugin], **args)
    assert type(plugin.scaler) is GradScaler
    state = plugin.scaler.state_dict()
    outcome.scale, outcome.growth_tracker = state["scale"], state["_growth_tracker"]
    return outcome


def by_hand(num_stages: int, stages: dict[str, tuple[int, ...]], where: int, scale: float) -> Any:
    """A FIFO of scaled gradients, and a scale that hears of overflows an iteration late."""
    seed_everything(7, verbose=False)
    module, tracker, last, num_skipped = Overflowing(where, optimizer="momentum"), 0, num_stages - 1, 0
    optimizer = module.configure_optimizers()
    parameters = [{n: p for n, p in module.named_parameters() if stages[n] == (k,)} for k in range(num_stages)]
    queues: list[deque[Any]] = [deque() for _ in parameters]
    told: list[float] = []

    def update(k: int, delay: int) -> float | None:
        """Take the due gradients; returns their scale if they have overflowed."""
        nonlocal num_skipped
        if len(queues[k]) <= delay:
            return None
        old_scale, grads = queues[k].popleft()
        grads = {n: grad / old_scale for n, grad in grads.items()}
        if not all(grad.isfinite().all() for grad in grads.values()):
            num_skipped += 1
            return float(old_scale)
        for n, grad in grads.items():
            parameters[k][n].grad = grad
        return None

    for batch in models.vectors():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = module.loss(batch)
        named = dict(module.named_parameters())
        grads = dict(zip(named, torch.autograd.grad(loss * scale, list(named.values()))))
        for k, own in enumerate(parameters):
            queues[k].append((scale, {n: grads[n] for n in own}))
        found = [update(k, last - k) for k in range(num_stages)]
        optimizer.step()
        if found[last] is not None or any(s <= scale for s in told):
            scale, tracker = scale / 2, 0
        else:
            scale, tracker = (scale * 2, 0) if tracker + 1 == GROWTH else (scale, tracker + 1)
        told = [s for s in found[:last] if s is not None]
    for _ in range(last):
        optimizer.zero_grad()
        told += [s for k in range(last) if (s := update(k, 0)) is not None]
        optimizer.step()
    if any(s <= scale for s in told):
        scale, tracker = scale / 2, 0
    return module, scale, tracker, num_skipped


def assert_same(ours: Any, expected: Any) -> None:
    assert_equal(ours, expected, 1e-6)
    assert (ours.scale, ours.growth_tracker) == (expected.scale, expected.growth_tracker)


@pytest.mark.parametrize("where", [0, 1, 3])
@pytest.mark.parametrize("virtual", [False, True])
def test_overflows_are_skipped_and_the_scale_recovers(pool: WorkerPool, where: int, virtual: bool) -> None:
    outcomes = pool.run(fit_scaled, 1 if virtual else 3, 3, virtual, where)
    module, scale, tracker, num_skipped = by_hand(3, outcomes[0].stages, where, 2.0**10)
    assert 5 < num_skipped < 40
    ours = outcomes[0]
    assert (ours.scale, ours.growth_tracker) == (scale, tracker)
    assert scale > 1
    for name, p in module.named_parameters():
        assert p.isfinite().all()
        torch.testing.assert_close(ours.state[name], p.detach(), rtol=1e-6, atol=1e-6)
    assert len({outcome.global_step for outcome in outcomes}) == 1


@pytest.mark.parametrize(
    ("num_stages", "replicas", "kwargs"),
    [
        (2, 1, {"where": 1, "scale": 2.0**30}),
        (4, 1, {"where": 2, "gradient_clip_val": 0.05}),
        (3, 1, {"where": 1, "accumulate_grad_batches": 3, "gradient_clip_val": 0.05}),
        (3, 1, {"where": 0, "val_check_interval": 7, "limit_train_batches": 28, "make_val_loader": models.vectors}),
        (2, 2, {"where": 0, "accumulate_grad_batches": 2}),
    ],
    ids=["a scale that is too large", "clipping", "accumulation", "flushes", "replicas"],
)
def test_processes_scale_as_virtual_stages(
    pool: WorkerPool, num_stages: int, replicas: int, kwargs: dict[str, Any]
) -> None:
    ours = pool.run(fit_scaled, num_stages * replicas, num_stages, replicas=replicas, **kwargs)
    expected = pool.run(fit_scaled, replicas, num_stages, True, replicas=replicas, **kwargs)
    assert_same(ours[0], expected[0])
    assert all(value.isfinite().all() for value in ours[0].state.values())
    assert ours[0].scale < 2.0**20


class Larger(Overflowing):
    """Multiplies gradients that still have their scale."""

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad *= 4


def test_scaled_gradients_that_a_hook_changes_are_clipped_as_they_are(pool: WorkerPool) -> None:
    args: dict[str, Any] = {"where": 1, "gradient_clip_val": 0.005}
    expected = pool.run(fit_scaled, 1, 3, True, **args)[0]
    assert_same(pool.run(fit_scaled, 1, 3, True, module=Larger, **args)[0], expected)
    assert_same(pool.run(fit_scaled, 3, 3, module=Larger, **args)[0], expected)


class Fused(Overflowing):
    """An optimizer that sees overflows by itself, and then makes a step without effect."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)


@pytest.mark.parametrize("module", [Overflowing, Fused])
@pytest.mark.parametrize("options", [{"correct_updates": True}, {"predict_weights": True, "synchronous_steps": 5}])
def test_remedies_rest_where_an_update_is_skipped(pool: WorkerPool, module: Any, options: dict[str, Any]) -> None:
    args: dict[str, Any] = {"where": 0, "module": module, "options": options}
    ours = pool.run(fit_scaled, 2, 2, **args)[0]
    expected = pool.run(fit_scaled, 1, 2, True, **args)[0]
    assert_equal(ours, expected, 1e-5 if module is Fused else 1e-6)
    assert (ours.scale, ours.growth_tracker) == (expected.scale, expected.growth_tracker)


class FrozenEnd(Overflowing):
    """The last stage, which owns the scale, trains nothing."""

    def __init__(self, where: int = 0, **kwargs: Any) -> None:
        super().__init__(where, **kwargs)
        nn.ModuleList([*self.layers[2:], self.out]).requires_grad_(False)


def test_the_scale_of_a_stage_that_trains_nothing(pool: WorkerPool) -> None:
    args: dict[str, Any] = {"where": 0, "module": FrozenEnd, "scale": 2.0**20}
    ours = pool.run(fit_scaled, 2, 2, **args)[0]
    assert_same(ours, pool.run(fit_scaled, 1, 2, True, **args)[0])
    assert ours.scale < 2.0**19
    args = {"where": 9, "module": FrozenEnd, "scale": 2.0**10}
    ours = pool.run(fit_scaled, 2, 2, **args)[0]
    assert_same(ours, pool.run(fit_scaled, 1, 2, True, **args)[0])
    assert ours.scale >= 2.0**14  # without an overflow


@pytest.mark.parametrize("where", [0, 1, 2, 3])
@pytest.mark.parametrize(("num_stages", "replicas"), [(2, 1), (4, 1), (2, 2)])
def test_a_shared_parameter_is_skipped_with_its_home(
    pool: WorkerPool, num_stages: int, replicas: int, where: int
) -> None:
    args: dict[str, Any] = {"replicas": replicas, "where": where, "module": SharesAWeight, "gradient_clip_val": 0.5}
    ours = pool.run(fit_scaled, num_stages * replicas, num_stages, **args)
    expected = pool.run(fit_scaled, replicas, num_stages, True, **args)
    assert ours[0].stages["layers.0.weight"] == (0, num_stages - 1)
    assert_same(ours[0], expected[0])
    assert all(value.isfinite().all() for value in ours[0].state.values())


def fit_and_resume(folder: str, num_stages: int, virtual: bool, resumes: bool) -> Any:
    def fit_and_save(**kwargs: Any) -> Any:
        callbacks = [ModelCheckpoint(folder, save_last=True)]
        args: dict[str, Any] = {"where": 0, "gradient_clip_val": 0.05, "enable_checkpointing": True}
        return fit_scaled(num_stages, virtual, callbacks=callbacks, **args, **kwargs)

    first = fit_and_save(max_epochs=1 if resumes else 2)
    return fit_and_save(ckpt_path=f"{folder}/last.ckpt", max_epochs=2) if resumes else first


@pytest.mark.parametrize("virtual", [False, True])
def test_the_scale_and_the_norms_are_in_the_checkpoint(pool: WorkerPool, tmp_path: Path, virtual: bool) -> None:
    expected = pool.run(fit_and_resume, 1 if virtual else 3, str(tmp_path / "a"), 3, virtual, False)[0]
    ours = pool.run(fit_and_resume, 1 if virtual else 3, str(tmp_path / "b"), 3, virtual, True)[0]
    assert (ours.scale, ours.growth_tracker) == (expected.scale, expected.growth_tracker)
    for name, value in expected.state.items():
        torch.testing.assert_close(ours.state[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("precision", "num_stages", "num_replicas"),
    [
        ("bf16-mixed", 3, 1), ("bf16-true", 3, 1), ("16-true", 3, 1), ("64-true", 3, 1),
        ("bf16-mixed", 2, 2), ("bf16-true", 2, 2), ("16-true", 2, 2),
    ],
)  # fmt: skip
def test_other_precisions(pool: WorkerPool, precision: str, num_stages: int, num_replicas: int) -> None:
    args: dict[str, Any] = {"precision": precision, "module_args": {"optimizer": "momentum"}, "limit_train_batches": 16}
    strategy, devices = {"num_stages": num_stages}, num_stages * num_replicas
    virtual = {**strategy, "virtual": True}
    expected = pool.run(fit, num_replicas, models.MLP, models.vectors, virtual, num_replicas, **args)[0]
    ours = pool.run(fit, devices, models.MLP, models.vectors, strategy, devices, **args)[0]
    dtypes = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
    assert {value.dtype for value in ours.state.values()} == {dtypes.get(precision, torch.float32)}
    assert_equal(ours, expected, 1e-6)


def fit_with_disabled_scaler(num_stages: int, virtual: bool) -> Any:
    plugin = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", enabled=False))
    strategy = {"num_stages": num_stages, "virtual": virtual}
    return fit(models.MLP, models.vectors, strategy, 1 if virtual else num_stages, plugins=[plugin])


def test_a_scaler_that_is_disabled(pool: WorkerPool) -> None:
    expected = pool.run(fit_with_disabled_scaler, 1, 2, True)[0]
    assert_equal(pool.run(fit_with_disabled_scaler, 2, 2, False)[0], expected, 1e-6)


class OwnScaler(GradScaler):
    pass


def fit_with_own_scaler() -> Any:
    plugin = MixedPrecision("16-mixed", "cpu", OwnScaler("cpu"))
    return fit(models.MLP, models.vectors, {"num_stages": 2}, 2, plugins=[plugin])


def test_scalers_of_other_kinds_are_refused(pool: WorkerPool) -> None:
    for result in pool.try_run(fit_with_own_scaler, 2):
        assert isinstance(result, Failure)
        assert "the precision plugin has a `OwnScaler`. Use torch's" in result.message
