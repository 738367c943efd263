"""Clipping by the norm of all stages' gradients, and by value."""

from __future__ import annotations

import os
import weakref
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

from lightning_dgmp.clipping import clip_by_total_norm
from tests import models
from tests.pool import Failure, WorkerPool
from tests.reference import train_by_hand
from tests.training import assert_equal, fit

MAX_NORM = 0.3


@pytest.mark.parametrize(("accumulate", "optimizer"), [(1, "momentum"), (1, "adamw"), (2, "momentum"), (3, "momentum")])
def test_virtual_stages_clip_as_by_hand(pool: WorkerPool, accumulate: int, optimizer: str) -> None:
    args: dict[str, Any] = {"module_args": {"optimizer": optimizer}, "accumulate_grad_batches": accumulate}
    strategy = {"num_stages": 4, "virtual": True}
    ours = pool.run(fit, 1, models.MLP, models.vectors, strategy, 1, gradient_clip_val=MAX_NORM, **args)[0]
    seed_everything(7, verbose=False)
    module = models.MLP(optimizer=optimizer)
    train_by_hand(module, [list(models.vectors())], ours.stages, 4, accumulate, MAX_NORM)
    for name, p in module.named_parameters():
        torch.testing.assert_close(ours.state[name], p.detach(), rtol=1e-6, atol=1e-6)
    unclipped = pool.run(fit, 1, models.MLP, models.vectors, strategy, 1, **args)[0]
    assert any(not torch.allclose(ours.state[name], value, atol=1e-4) for name, value in unclipped.state.items())


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize(("num_stages", "accumulate"), [(2, 1), (4, 1), (4, 3)])
def test_processes_clip_as_virtual_stages(pool: WorkerPool, num_stages: int, accumulate: int, algorithm: str) -> None:
    args: dict[str, Any] = {"module_args": {"optimizer": "adamw"}, "accumulate_grad_batches": accumulate}
    args |= {"gradient_clip_val": 0.05 if algorithm == "value" else MAX_NORM, "gradient_clip_algorithm": algorithm}
    args |= {"val_check_interval": 7, "limit_train_batches": 25, "make_val_loader": models.vectors}
    virtual = {"num_stages": num_stages, "virtual": True}
    expected = pool.run(fit, 1, models.ValidatedMLP, models.vectors, virtual, 1, **args)[0]
    strategy = {"num_stages": num_stages}
    ours = pool.run(fit, num_stages, models.ValidatedMLP, models.vectors, strategy, num_stages, **args)[0]
    assert_equal(ours, expected, 1e-6)


class ClipsByHook(models.MLP):
    """Clips more from epoch to epoch, by Lightning's method or by torch's function."""

    def __init__(self, by_torch: bool = False, what: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.by_torch, self.what = by_torch, what

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        max_norm = MAX_NORM / (1 + self.current_epoch)
        if self.by_torch:
            clipped = self.get_submodule(self.what)
            torch.nn.utils.clip_grad_norm_(clipped.parameters(), max_norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val=max_norm, gradient_clip_algorithm="norm")


@pytest.mark.parametrize("by_torch", [False, True])
def test_clipping_by_the_user(pool: WorkerPool, by_torch: bool) -> None:
    args: dict[str, Any] = {"module_args": {"by_torch": by_torch}, "max_epochs": 2}
    expected = pool.run(fit, 1, ClipsByHook, models.vectors, {"num_stages": 3, "virtual": True}, 1, **args)[0]
    assert_equal(pool.run(fit, 3, ClipsByHook, models.vectors, {"num_stages": 3}, 3, **args)[0], expected, 1e-6)


class ClipsInHook(models.MLP):
    """Clips by a name of its own, in a hook of choice."""

    def __init__(self, hook: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hook = hook

    def clip(self, hook: str) -> None:
        if hook == self.hook:
            clip_grad_norm_(self.parameters(), MAX_NORM)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        self.clip("configure_gradient_clipping")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.clip("on_before_optimizer_step")

    def on_after_backward(self) -> None:
        self.clip("on_after_backward")

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.hook != "optimizer_step":
            optimizer.step(optimizer_closure)
        else:
            optimizer_closure()
            self.clip("optimizer_step")
            optimizer.step()


@pytest.mark.parametrize(
    "hook", ["configure_gradient_clipping", "on_before_optimizer_step", "on_after_backward", "optimizer_step"]
)
def test_clipping_by_another_name_in_hooks(pool: WorkerPool, hook: str) -> None:
    args: dict[str, Any] = {"module_args": {"hook": hook}}
    expected = pool.run(fit, 1, ClipsInHook, models.vectors, {"num_stages": 3, "virtual": True}, 1, **args)[0]
    assert_equal(pool.run(fit, 3, ClipsInHook, models.vectors, {"num_stages": 3}, 3, **args)[0], expected, 1e-6)


class ClipsInTwoSteps(models.MLP):
    """By the pair of functions that torch has for it."""

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        norm = get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        clip_grads_with_norm_(self.parameters(), MAX_NORM, norm)


@pytest.mark.parametrize("virtual", [False, True])
def test_clipping_in_two_steps(pool: WorkerPool, virtual: bool) -> None:
    strategy, devices = {"num_stages": 3, "virtual": virtual}, 1 if virtual else 3
    args: dict[str, Any] = {"gradient_clip_val": MAX_NORM}
    expected = pool.run(fit, devices, models.MLP, models.vectors, strategy, devices, **args)[0]
    assert_equal(pool.run(fit, devices, ClipsInTwoSteps, models.vectors, strategy, devices)[0], expected, 0.0)


class LogsNorms(models.MLP):
    """Norms that are only looked at may be those of some parameters, and of any kind."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        whole = [p.grad for p in self.parameters() if p.grad is not None]
        part = [p.grad for p in self.hidden.parameters() if p.grad is not None]
        self.seen = [get_total_norm(whole), get_total_norm(part), get_total_norm(whole, norm_type=1.0)]


def test_norms_may_be_looked_at(pool: WorkerPool) -> None:
    pool.run(fit, 2, LogsNorms, models.vectors, {"num_stages": 2}, 2)


class ClipsByValueIn(ClipsInHook):
    def clip(self, hook: str) -> None:
        if hook == self.hook:
            clip_grad_value_(self.parameters(), 0.05)


@pytest.mark.parametrize("hook", ["on_before_optimizer_step", "on_after_backward", "optimizer_step"])
def test_clipping_by_value_in_hooks(pool: WorkerPool, hook: str) -> None:
    """Also before a stage has any gradients."""
    args: dict[str, Any] = {"module_args": {"hook": hook}}
    expected = pool.run(fit, 1, ClipsByValueIn, models.vectors, {"num_stages": 3, "virtual": True}, 1, **args)[0]
    assert_equal(pool.run(fit, 3, ClipsByValueIn, models.vectors, {"num_stages": 3}, 3, **args)[0], expected, 1e-6)


class FrozenHalf(models.MLP):
    def __init__(self, first: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for module in (self.inp, *self.hidden[:2]) if first else (*self.hidden[2:], self.out):
            module.requires_grad_(False)


@pytest.mark.parametrize("first", [True, False])
def test_clipping_by_value_where_a_half_is_frozen(pool: WorkerPool, first: bool) -> None:
    args: dict[str, Any] = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}
    args |= {"module_args": {"first": first}}
    split: dict[str, Any] = {"num_stages": 2, "split_at": ["hidden.2"]}
    expected = pool.run(fit, 1, FrozenHalf, models.vectors, {**split, "virtual": True}, 1, **args)[0]
    assert_equal(pool.run(fit, 2, FrozenHalf, models.vectors, split, 2, **args)[0], expected, 1e-6)


class Clips(Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        clip_grad_norm_(pl_module.parameters(), MAX_NORM)


def fit_with_callback(devices: int, strategy: dict[str, Any]) -> None:
    fit(models.MLP, models.vectors, strategy, devices, callbacks=[Clips()])


@pytest.mark.parametrize("virtual", [False, True])
def test_clipping_where_norms_are_not_known_is_refused(pool: WorkerPool, virtual: bool) -> None:
    strategy, devices = {"num_stages": 2, "virtual": virtual}, 1 if virtual else 2
    results = pool.try_run(fit_with_callback, devices, devices, strategy)
    assert all("in the LightningModule's hook `configure_gradient_clipping`" in result.message for result in results)


class ScalesGradients(Callback):
    """Makes the gradients larger in a hook of choice, in a way that leaves no trace in them."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.scale)

    def scale(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.data *= 10


class Scaled(ClipsInHook):
    """Does so itself, before clipping."""

    def clip(self, hook: str) -> None:
        if hook == self.hook:
            ScalesGradients(hook).scale(None, self)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping()
        self.clip_gradients(optimizer, *args, **kwargs)


def fit_scaled(devices: int, strategy: Any, hook: str, by_callback: bool, args: dict[str, Any]) -> Any:
    if by_callback:
        return fit(models.MLP, models.vectors, strategy, devices, callbacks=[ScalesGradients(hook)], **args)
    return fit(Scaled, models.vectors, strategy, devices, module_args={"hook": hook}, **args)


@pytest.mark.parametrize(
    ("hook", "by_callback", "args"),
    [
        ("on_after_backward", False, {}),
        ("on_after_backward", True, {}),
        ("on_before_optimizer_step", False, {"accumulate_grad_batches": 3}),
        ("on_before_optimizer_step", True, {}),
        ("configure_gradient_clipping", False, {}),
    ],
)
def test_gradients_that_hooks_change_are_clipped_as_they_are(
    pool: WorkerPool, hook: str, by_callback: bool, args: dict[str, Any]
) -> None:
    """So larger ones become the same, where all are clipped."""
    args = {"gradient_clip_val": 0.01, "max_epochs": 2, "limit_train_batches": 7, **args}
    scaled = hook, by_callback, args
    for num_stages in (1, 2, 4):
        strategy = {"num_stages": num_stages, "virtual": num_stages > 1}
        expected = pool.run(fit, 1, models.MLP, models.vectors, strategy, 1, **args)[0]
        assert_equal(pool.run(fit_scaled, 1, 1, strategy, *scaled)[0], expected, 1e-6)
        if num_stages > 1:
            ours = pool.run(fit_scaled, num_stages, num_stages, {"num_stages": num_stages}, *scaled)[0]
            assert_equal(ours, expected, 1e-6)


class Reads(Callback):
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        assert all(p.grad.isfinite().all() for p in pl_module.parameters() if p.grad is not None)


def fit_with_reader_on_one(devices: int, strategy: dict[str, Any]) -> Any:
    callbacks = [Reads()] if int(os.environ["LOCAL_RANK"]) == 0 else []
    return fit(models.MLP, models.vectors, strategy, devices, callbacks=callbacks, gradient_clip_val=MAX_NORM)


def test_one_process_alone_may_read_gradients(pool: WorkerPool) -> None:
    args: dict[str, Any] = {"gradient_clip_val": MAX_NORM}
    expected = pool.run(fit, 1, models.MLP, models.vectors, {"num_stages": 3, "virtual": True}, 1, **args)[0]
    assert_equal(pool.run(fit_with_reader_on_one, 3, 3, {"num_stages": 3})[0], expected, 1e-6)


class StepsNowAndThen(Scaled):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(optimizer_closure) if batch_idx % 3 else optimizer_closure()


def test_norms_are_told_where_no_step_follows(pool: WorkerPool) -> None:
    args: dict[str, Any] = {"module_args": {"hook": "on_after_backward"}, "gradient_clip_val": MAX_NORM}
    expected = pool.run(fit, 1, StepsNowAndThen, models.vectors, {"num_stages": 3, "virtual": True}, 1, **args)[0]
    assert_equal(pool.run(fit, 3, StepsNowAndThen, models.vectors, {"num_stages": 3}, 3, **args)[0], expected, 1e-6)


class ClipsTwice(models.MLP):
    """Measures what is left the second time."""

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        clip_grad_norm_(self.parameters(), MAX_NORM)
        self.log("norm", clip_grad_norm_(self.parameters(), MAX_NORM, foreach=True))


def test_clipping_twice_is_clipping_once(pool: WorkerPool) -> None:
    for strategy, devices in (({"num_stages": 3}, 3), ({"num_stages": 3, "virtual": True}, 1)):
        twice = pool.run(fit, devices, ClipsTwice, models.vectors, strategy, devices)[0]
        args: dict[str, Any] = {"gradient_clip_val": MAX_NORM}
        once = pool.run(fit, devices, models.MLP, models.vectors, strategy, devices, **args)[0]
        for name, value in once.state.items():
            torch.testing.assert_close(twice.state[name], value, rtol=1e-5, atol=1e-6)
        norms = [row["norm"] for _, row in twice.rows if "norm" in row]
        assert max(norms) < MAX_NORM * 1.0001


class TrainsAPart(models.MLP):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.hidden[0].parameters(), *self.out.parameters()], lr=0.05)


def test_parameters_that_nothing_updates_do_not_count(pool: WorkerPool) -> None:
    args: dict[str, Any] = {"gradient_clip_val": MAX_NORM}
    expected = pool.run(fit, 1, TrainsAPart, models.vectors, {"num_stages": 3, "virtual": True}, 1, **args)[0]
    assert_equal(pool.run(fit, 3, TrainsAPart, models.vectors, {"num_stages": 3}, 3, **args)[0], expected, 1e-6)


def test_clipping_a_part_is_refused(pool: WorkerPool) -> None:
    args: dict[str, Any] = {"module_args": {"by_torch": True, "what": "hidden"}}
    results = pool.try_run(fit, 2, ClipsByHook, models.vectors, {"num_stages": 2}, 2, **args)
    assert all(isinstance(result, Failure) for result in results)
    assert all("clips by the norm of all gradients" in result.message for result in results)


class ClipsParts(models.MLP):
    """Each part is what one of two stages has."""

    def __init__(self, how: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.how = how

    def halves(self) -> list[list[nn.Parameter]]:
        first, second = nn.ModuleList([self.inp, *self.hidden[:2]]), nn.ModuleList([*self.hidden[2:], self.out])
        return [list(first.parameters()), list(second.parameters())]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([{"params": half} for half in self.halves()], lr=0.05)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        halves = [group["params"] for group in optimizer.param_groups] if self.how == "groups" else self.halves()
        for half in halves[:1] if self.how == "first" else halves[1:] if self.how == "second" else halves:
            clip_grad_norm_(half, MAX_NORM)


@pytest.mark.parametrize("how", ["modules", "groups", "first", "second"])
def test_clipping_what_is_a_stage_by_chance_is_refused(pool: WorkerPool, how: str) -> None:
    strategy = {"num_stages": 2, "split_at": ["hidden.2"]}
    results = pool.try_run(fit, 2, ClipsParts, models.vectors, strategy, 2, module_args={"how": how})
    assert all(isinstance(result, Failure) for result in results)
    assert all("clips by the norm of all gradients" in result.message for result in results)


def test_norms_that_nobody_keeps_are_forgotten() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    undo = clip_by_total_norm(list, lambda: [parameter.grad], [parameter])
    try:
        kept = get_total_norm([parameter.grad])
        with pytest.raises(MisconfigurationException, match="clips by the norm of all gradients"):
            clip_grads_with_norm_([parameter], 1.0, kept)
        gone = weakref.ref(get_total_norm([parameter.grad]))
        assert gone() is None
    finally:
        undo()


@pytest.mark.parametrize("limit", [1, 2, 5])
@pytest.mark.parametrize("num_stages", [3, 4])
def test_flushes_of_fewer_batches_than_stages(pool: WorkerPool, num_stages: int, limit: int) -> None:
    args: dict[str, Any] = {"gradient_clip_val": MAX_NORM, "max_epochs": 21 // limit, "limit_train_batches": limit}
    args |= {"make_val_loader": models.vectors, "limit_val_batches": 1, "module_args": {"optimizer": "momentum"}}
    virtual = {"num_stages": num_stages, "virtual": True}
    expected = pool.run(fit, 1, models.ValidatedMLP, models.vectors, virtual, 1, **args)[0]
    strategy = {"num_stages": num_stages}
    ours = pool.run(fit, num_stages, models.ValidatedMLP, models.vectors, strategy, num_stages, **args)[0]
    assert_equal(ours, expected, 1e-6)
