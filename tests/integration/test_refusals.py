"""Bad input: a clear error in every process, within a minute, and never a hang."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import (
    BitsandbytesPrecision,
    DeepSpeedPrecision,
    FSDPPrecision,
    TransformerEnginePrecision,
)
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dgmp import DelayedMPStrategy
from lightning_dgmp.support import check_supported
from tests import models, traps
from tests.pool import Failure, WorkerPool
from tests.training import fit


def failures(
    pool: WorkerPool, num_stages: int, module: Any, loader: Any = models.vectors, **kwargs: Any
) -> list[Failure]:
    """Train in processes; all of them must fail."""
    strategy = {"num_stages": num_stages, **kwargs.pop("strategy", {})}
    results = pool.try_run(fit, num_stages, module, loader, strategy, num_stages, timeout=60, **kwargs)
    assert all(isinstance(result, Failure) for result in results), results
    return results


def assert_all_say(results: list[Failure], *texts: str) -> None:
    for rank, failure in enumerate(results):
        for text in texts:
            assert re.search(text, failure.message), f"rank {rank} says: {failure.traceback}"


# ----- devices


@pytest.mark.parametrize(("num_stages", "devices"), [(4, 1), (3, 4), (4, 2)])
def test_devices_that_stages_do_not_divide(num_stages: int, devices: int) -> None:
    with pytest.raises(MisconfigurationException, match="must divide the number of devices") as error:
        Trainer(accelerator="cpu", devices=devices, strategy=DelayedMPStrategy(num_stages=num_stages))
    assert f"devices={num_stages}" in str(error.value)
    assert "virtual=True" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"num_stages": 0}, MisconfigurationException, "`num_stages` must be at least 1 or 'auto', but is 0"),
        ({"num_stages": "two"}, TypeError, "`num_stages` must be an integer or 'auto', but is 'two'"),
        ({"backward": "later"}, ValueError, "'stash', 'recompute' or 'replay', but is 'later'"),
        ({"split_at": "inp"}, TypeError, "`split_at` must be a list of names of modules, but is 'inp'"),
        ({"split_at": [1]}, TypeError, "`split_at` must be a list of names of modules, but is [1]"),
        ({"split_at": 1}, TypeError, "`split_at` must be a list of names of modules, but is 1"),
        (
            {"predict_weight": True},
            TypeError,
            "no argument `predict_weight`, and neither has Lightning's `DDPStrategy`. Did you mean `predict_weights`?",
        ),
        ({"gradients": 2}, TypeError, "no argument `gradients`"),
        ({"virtual": True}, ValueError, "`virtual=True` needs `num_stages`"),
        ({"data_parallel_size": 0}, MisconfigurationException, "`data_parallel_size` must be at least 1 or 'auto'"),
        ({"data_parallel_size": 1.5}, TypeError, "`data_parallel_size` must be an integer or 'auto', but is 1.5"),
        (
            {"num_stages": 2, "data_parallel_size": 3, "devices": 4},
            MisconfigurationException,
            "must make the number of devices, but 2 times 3 is not 4. Set `Trainer(devices=6)`",
        ),
        (
            {"data_parallel_size": 2, "devices": 3},
            MisconfigurationException,
            "must make the number of devices, but 1 times 2 is not 3. Set `Trainer(devices=2)`",
        ),
        (
            {"num_stages": 2, "virtual": True, "data_parallel_size": 2, "devices": 1},
            MisconfigurationException,
            "`virtual=True` and `data_parallel_size` must make the number of devices, but 2 is not 1",
        ),
    ],
)
def test_arguments_of_the_strategy(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    devices = arguments.pop("devices", 1)
    with pytest.raises(error, match=re.escape(text)):
        Trainer(accelerator="cpu", devices=devices, strategy=DelayedMPStrategy(**arguments))


# ----- cuts


def test_more_stages_than_places_to_cut(pool: WorkerPool) -> None:
    results = failures(pool, 4, models.MLP, module_args={"depth": 1})
    assert_all_say(results, "`num_stages=4` needs 3 cuts", "can be cut in 2 places", "Use at most 3 stages")


@pytest.mark.parametrize(
    ("split_at", "texts"),
    [
        (["hidden.7"], ["`split_at` must name modules of the LightningModule", "`hidden.7`", "See `named_modules"]),
        (["inp"], ["names `inp`", "nothing is before it"]),
        (["hidden.1", "hidden.2"], ["1 for `num_stages=2`", "it has 2"]),
    ],
)
def test_split_at(pool: WorkerPool, split_at: list[str], texts: list[str]) -> None:
    assert_all_say(failures(pool, 2, models.MLP, strategy={"split_at": split_at}), *texts)


def test_split_at_in_the_wrong_order(pool: WorkerPool) -> None:
    results = failures(pool, 3, models.MLP, strategy={"split_at": ["hidden.2", "hidden.1"]})
    assert_all_say(results, "must follow the order", "`hidden.1` is not after `hidden.2`", "Reorder")


class NeverCalled(models.MLP):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spare = nn.Linear(4, 4)


def test_split_at_a_module_that_is_never_called(pool: WorkerPool) -> None:
    results = failures(pool, 2, NeverCalled, strategy={"split_at": ["spare"]})
    assert_all_say(results, "modules that `training_step` calls", "does not call `spare`", "Name a module inside it")


# ----- steps


class Manual(models.MLP):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False


class TwoOptimizers(models.MLP):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.inp.parameters(), 0.1), torch.optim.SGD(self.out.parameters(), 0.1)]


class SecondOrder(models.MLP):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class GoesBack(models.MLP):
    """A layer with statistics of its own runs again on what later layers have made of its first result."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.again = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.last(self.again(torch.tanh(self.middle(self.again(batch[0]))))), batch[1])


class ClosureTwice(models.MLP):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        optimizer.step(closure=optimizer_closure)


class SharpnessAware(torch.optim.SGD):
    """As those that step to the worst point nearby first (Foret et al., ICLR 2021)."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        closure()
        super().step()
        loss = closure()
        super().step()
        return loss


class IsSharpnessAware(models.MLP):
    def configure_optimizers(self) -> Any:
        return SharpnessAware(self.parameters(), lr=0.1)


class ReturnsNone(models.MLP):
    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.loss(batch)


class SometimesNone(models.MLP):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        return None if batch_idx == 5 else loss


class ReadsEarly(models.MLP):
    """Reads a value of the first layer, at once or only later."""

    def __init__(self, from_batch: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.from_batch = from_batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = self.inp(x)
        y = y + 0
        middle = self.hidden[0](x)
        rest = self.out(self.hidden[1](torch.tanh(middle)))
        if batch_idx >= self.from_batch:
            self.seen = x.tolist()
        return F.cross_entropy(rest, y)


class BranchesEarly(models.MLP):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = self.inp(x)
        x = -x if x.mean() > 0 else x
        return F.cross_entropy(self.out(torch.tanh(self.hidden[0](x))), y)


class DifferentiatesItself(models.MLP):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        h = self.inp(x)
        (gradient,) = torch.autograd.grad(h.sum(), h, create_graph=True)
        return F.cross_entropy(self.out(h), y) + gradient.square().mean()


class DependsOnRank(models.MLP):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = self.inp(x)
        layers = reversed(self.hidden) if self.global_rank else self.hidden
        for layer in layers:
            x = torch.tanh(layer(x))
        return F.cross_entropy(self.out(x), y)


class Explodes(models.MLP):
    """Fails in the forward of one layer, so on one stage only."""

    def __init__(self, layer: str = "inp", at: int = 7, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        exploding = self.get_submodule(layer)
        self.calls, self.at, self.original = 0, at, exploding.forward
        exploding.forward = self.explode  # type: ignore[method-assign]

    def explode(self, x: Tensor) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise ZeroDivisionError("the user's own error")
        return self.original(x)


@pytest.mark.parametrize(
    ("module", "texts"),
    [
        (Manual, ["needs automatic optimization", "`Manual.automatic_optimization` is False", "Return the loss"]),
        (TwoOptimizers, ["needs a single optimizer", "returned several", "parameter groups"]),
        (SecondOrder, ["evaluates each batch once", "`LBFGS`", "first-order"]),
        (IsSharpnessAware, ["closure was called again for the same batch", "first-order"]),
        (ClosureTwice, ["closure was called again for the same batch", "first-order"]),
        (
            ReturnsNone,
            ["`training_step` must return a loss on every batch, but it returned None", "multiplied by zero"],
        ),
        (SometimesNone, ["`training_step` must return a loss on every batch, but it returned None", "by zero"]),
        (
            BranchesEarly,
            ["can be cut in 0 places", "What comes after a value is read belongs to the last stage: `__bool__` reads"],
        ),
        (DifferentiatesItself, ["`torch.autograd.grad` was called on", "made by inp", "return a loss"]),
        (DependsOnRank, ["must make the same plan, but they disagree", "independent of the rank"]),
    ],
)
def test_steps(pool: WorkerPool, module: type[LightningModule], texts: list[str]) -> None:
    assert_all_say(failures(pool, 2, module), *texts)


def test_a_value_that_would_have_to_travel_back(pool: WorkerPool) -> None:
    results = failures(pool, 4, GoesBack)
    assert_all_say(
        results, "can be cut in 2 places", "between calls of `again.1`, which changes its buffers", "at most 3 stages"
    )


def test_reading_a_value_that_did_not_travel(pool: WorkerPool) -> None:
    results = failures(pool, 2, ReadsEarly, module_args={"from_batch": 3}, strategy={"split_at": ["hidden.1"]})
    assert_all_say(results, "needs a value that is not here", "`tolist` reads the value of", "made by `inp`", "move it")


def test_what_follows_a_read_belongs_to_the_last_stage(pool: WorkerPool) -> None:
    strategy = {"split_at": ["hidden.1"]}
    args = {"module_args": {"from_batch": 0}}
    expected = pool.run(fit, 1, ReadsEarly, models.vectors, {"num_stages": 2, "virtual": True, **strategy}, 1, **args)
    ours = pool.run(fit, 2, ReadsEarly, models.vectors, {"num_stages": 2, **strategy}, 2, **args)
    for name, value in expected[0].state.items():
        torch.testing.assert_close(ours[0].state[name], value, rtol=1e-6, atol=1e-6)


# ----- data


def test_averages_of_weights(pool: WorkerPool) -> None:
    texts = "does not support averages of weights yet", "`StochasticWeightAveraging`. Remove it"
    assert_all_say(failures(pool, 2, models.MLP, callbacks=[StochasticWeightAveraging(0.1)]), *texts)
    for callback in (WeightAveraging(), EMAWeightAveraging()):
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback])
        with pytest.raises(MisconfigurationException, match=f"but there is a `{type(callback).__name__}`. Remove it"):
            check_supported(trainer, models.MLP(), virtual=False, backward="stash")


class Averaged(torch.optim.SGD):
    """As optimizers that keep averages of weights: wraps another one, and saves more than that."""

    def state_dict(self) -> dict[str, Any]:
        return {"opt": super().state_dict(), "ema": [p.clone() for g in self.param_groups for p in g["params"]]}


class WrapsOptimizer(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.optimizers = [Averaged(pl_module.parameters(), lr=0.1)]


def test_optimizers_that_save_more_than_their_state(pool: WorkerPool) -> None:
    texts = "but that of `Averaged` has ['ema', 'opt']", "Use another optimizer"
    assert_all_say(failures(pool, 2, models.MLP, callbacks=[WrapsOptimizer()]), *map(re.escape, texts))


def no_vectors() -> DataLoader:
    return DataLoader(TensorDataset(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long)))


def test_an_empty_loader(pool: WorkerPool) -> None:
    assert_all_say(
        failures(pool, 2, models.MLP, no_vectors),
        "at least one batch, but the training data loader is empty",
        "Check the data set",
    )


# ----- failures on one stage


@pytest.mark.parametrize(("layer", "stage"), [("inp", 0), ("hidden.1", 1), ("out", 2)])
def test_an_error_on_one_stage_ends_all_with_its_traceback(pool: WorkerPool, layer: str, stage: int) -> None:
    strategy = {"split_at": ["hidden.0", "hidden.2"]}
    results = failures(pool, 3, Explodes, module_args={"layer": layer}, strategy=strategy)
    origin = results.pop(2 - stage)
    assert origin.type == "ZeroDivisionError"
    assert_all_say(
        results, rf"Stage {stage} \(rank {2 - stage}\) failed", "in explode", "ZeroDivisionError: the user's own"
    )


def test_an_error_in_the_trace_ends_all(pool: WorkerPool) -> None:
    results = failures(pool, 2, Explodes, module_args={"layer": "out", "at": 1})
    assert_all_say(results, "the user's own error")


class FailsInAHook(models.ValidatedMLP):
    """One rank has an error where others may be waiting for it, outside of training steps."""

    def __init__(self, hook: str, rank: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        original = getattr(self, hook)

        def failing(*args: Any, **kwargs: Any) -> Any:
            if self.trainer.global_rank == rank:
                raise ZeroDivisionError("the user's own error")
            return original(*args, **kwargs)

        setattr(self, hook, failing)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "hook", ["setup", "configure_optimizers", "on_train_start", "validation_step", "on_train_epoch_end"]
)
def test_an_error_outside_of_training_steps_ends_all(pool: WorkerPool, hook: str, rank: int) -> None:
    begin = time.monotonic()
    results = failures(pool, 3, FailsInAHook, module_args={"hook": hook, "rank": rank}, make_val_loader=models.vectors)
    assert results.pop(rank).type == "ZeroDivisionError"
    assert_all_say(results, rf"\(rank {rank}\) failed", "in failing", "ZeroDivisionError: the user's own error")
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    ("module", "backward", "text"),
    [
        (traps.ChangesWeights, "stash", r"`clamp_` changes the parameter `hidden\.0\.weight` in place"),
        (traps.HidesWeights, "stash", r"`hidden\.\d\.weight` is used through a reference that is kept elsewhere"),
        (traps.ChangesFrozen, "recompute", r"changes frozen parameters in place, such as `teacher\.weight`"),
    ],
)
def test_parameters_outside_of_their_places(pool: WorkerPool, module: Any, backward: str, text: str) -> None:
    assert_all_say(failures(pool, 2, module, strategy={"backward": backward}), text)


class ForeignParameter(models.MLP):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([*self.parameters(), nn.Parameter(torch.zeros(3))], lr=0.1)


def test_an_optimizer_of_what_is_not_in_the_module(pool: WorkerPool) -> None:
    assert_all_say(failures(pool, 2, ForeignParameter), r"one of shape \(3,\) does not belong to it")


class Lazy(models.MLP):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.LazyLinear(16)


def test_lazy_modules(pool: WorkerPool) -> None:
    assert_all_say(failures(pool, 2, Lazy), r"`inp\.weight` is not initialized")


class Renormalises(models.MLP):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = nn.Embedding(5, 3, max_norm=1.0)


def test_weights_that_change_in_the_forward(pool: WorkerPool) -> None:
    results = failures(pool, 2, Renormalises)
    assert_all_say(results, "change their weights in the forward, but `names` has `max_norm=1.0`")


def unsigned() -> DataLoader:
    return DataLoader(TensorDataset(torch.zeros(80, 8), torch.zeros(80, dtype=torch.uint16)), batch_size=8)


def test_a_dtype_that_cannot_be_sent(pool: WorkerPool) -> None:
    assert_all_say(failures(pool, 2, models.MLP, unsigned), "Stages can exchange dense tensors.*uint16.*Convert it")


def test_a_buffer_that_keeps_the_value_of_another_stage(pool: WorkerPool) -> None:
    results = failures(pool, 4, traps.KeepsAnEarlyValue)
    assert_all_say(results, "The buffer `early` was assigned a value that is not on stage")


# ----- precision and devices


@pytest.mark.parametrize("kind", [BitsandbytesPrecision, DeepSpeedPrecision, FSDPPrecision, TransformerEnginePrecision])
def test_precision_plugins_that_exchange_modules(kind: type[Any]) -> None:
    """They need packages or devices that may be missing, so they are not made."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy._precision_plugin = kind.__new__(kind)
    module = models.MLP()
    with pytest.raises(MisconfigurationException, match=f"does not support `{kind.__name__}`"):
        check_supported(trainer, module, virtual=False, backward="stash")


def test_an_algorithm_of_clipping_that_is_unknown() -> None:
    with pytest.raises(MisconfigurationException, match="`gradient_clip_algorithm` other is invalid"):
        Trainer(gradient_clip_algorithm="other", strategy="delayed_mp", devices=2, accelerator="cpu")


@pytest.mark.parametrize(
    ("num_stages", "replicas", "expected"),
    [("auto", "auto", (4, 2)), (2, "auto", (2, 4)), ("auto", 4, (2, 4)), (4, 2, (4, 2)), (8, "auto", (8, 1))],
)
def test_stages_of_a_replica_stay_on_a_node_where_they_fit(num_stages: Any, replicas: Any, expected: Any) -> None:
    """Two nodes of four devices."""
    strategy = DelayedMPStrategy(num_stages, replicas)
    strategy.parallel_devices = [torch.device("cpu")] * 4
    strategy.cluster_environment = LightningEnvironment()
    strategy.num_nodes = 2
    seen = []
    for rank in range(8):
        strategy.cluster_environment.set_global_rank(rank)
        strategy.cluster_environment.set_world_size(8)
        seen.append((strategy.replica, strategy.stage))
        assert strategy.distributed_sampler_kwargs == {"num_replicas": expected[1], "rank": strategy.replica}
    assert (strategy.num_stages, strategy.data_parallel_size) == expected
    assert sorted(seen) == [(r, k) for r in range(expected[1]) for k in range(expected[0])]
    nodes = [{rank // 4 for rank, (r, _) in enumerate(seen) if r == replica} for replica in range(expected[1])]
    assert all(len(of_replica) == max(1, expected[0] // 4) for of_replica in nodes)
    assert seen[0] == (0, expected[0] - 1), "rank 0 has the loss"
