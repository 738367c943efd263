"""Modules that are made in `configure_model`: no process ever holds them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import nn

from lightning_dgmp import DelayedMPStrategy
from lightning_dgmp.stage.shadow import Shadow
from tests import models
from tests.deferred_models import LateGPT, LateMLP, LateNorm
from tests.pool import Failure, WorkerPool
from tests.training import Outcome, assert_equal, fit


class Peeks(Callback):
    """Counts what this process has of the parameters."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def peek(self, when: str, module: LightningModule) -> None:
        own = [p for p in module.parameters() if not isinstance(p, Shadow)]
        self.seen.append((when, sum(p.numel() for p in own)))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.peek("start", pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.peek("validation", pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.peek("batch", pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.peek("end", pl_module)


LOADERS = {"mlp": models.vectors, "norm": models.vectors, "gpt": models.ragged_tokens}
MODULES = {"mlp": LateMLP, "norm": LateNorm, "gpt": LateGPT}


def fit_late(kind: str, num_stages: int, virtual: bool, devices: int, **kwargs: Any) -> tuple[Outcome, list[Any]]:
    peeks = Peeks()
    strategy = {"num_stages": num_stages, "virtual": virtual, **kwargs.pop("strategy", {})}
    loader = LOADERS[kind]
    callbacks = [peeks, *kwargs.pop("callbacks", [])]
    return fit(
        MODULES[kind], loader, strategy, devices, make_val_loader=loader, callbacks=callbacks, limit_train_batches=12,
        limit_val_batches=2, enable_model_summary=True, **kwargs,
    ), peeks.seen  # fmt: skip


@pytest.mark.parametrize(("kind", "num_stages"), [("mlp", 3), ("norm", 2), ("gpt", 2)])
def test_processes_do_what_virtual_stages_do(pool: WorkerPool, kind: str, num_stages: int) -> None:
    expected, _ = pool.run(fit_late, 1, kind, num_stages, True, 1)[0]
    results = pool.run(fit_late, num_stages, kind, num_stages, False, num_stages)
    assert_equal(results[0][0], expected, 1e-6)
    total = sum(value.numel() for value in dict(MODULES[kind]().make().named_parameters()).values())
    for _, seen in results:
        assert dict(seen)["start"] == (20 if kind == "norm" else 0)
        assert all(number < total for when, number in seen)


def go_through_all(folder: str, num_stages: int, devices: int, early: bool, **options: Any) -> dict[str, Any]:
    """Every entry point, one after the other, with one module."""
    warnings.simplefilter("ignore")
    seed_everything(7, verbose=False)
    strategy = DelayedMPStrategy(num_stages, **options)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_epochs=1, limit_train_batches=6, limit_val_batches=2,
        limit_test_batches=2, limit_predict_batches=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False,
    )  # fmt: skip
    found: dict[str, Any] = {}
    if early:
        with trainer.init_module(empty_init=True):
            module: Any = LateNorm()
            module.configure_model()
    else:
        module = LateNorm()
    loader = models.vectors()
    found["before"] = trainer.validate(module, loader, verbose=False)
    trainer.fit(module, loader, loader)
    found["fit"] = dict(trainer.callback_metrics)
    trainer.save_checkpoint(f"{folder}/one.ckpt")
    found["after"] = trainer.validate(module, loader, verbose=False)
    found["predictions"] = trainer.predict(module, loader)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader, loader)
    found["again"] = dict(trainer.callback_metrics)
    found["loaded"] = trainer.validate(module, loader, ckpt_path=f"{folder}/one.ckpt", verbose=False, weights_only=True)
    trainer.save_checkpoint(f"{folder}/two.ckpt")
    with strategy.whole_model():
        found["weights"] = {name: value.clone() for name, value in module.state_dict().items()}
    return found


@pytest.mark.parametrize(("early", "sharded", "replicas"), [(False, False, 1), (True, True, 1), (False, False, 2)])
def test_every_entry_point(pool: WorkerPool, tmp_path: Path, early: bool, sharded: bool, replicas: int) -> None:
    options = {"save_distributed_checkpoint": sharded}
    folders = [str(tmp_path / name) for name in ("real", "virtual")]
    ours = pool.run(go_through_all, 2 * replicas, folders[0], 2, 2 * replicas, early, **options)[0]
    theirs = pool.run(go_through_all, replicas, folders[1], 2, replicas, early, virtual=True, **options)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert ours["loaded"] == ours["after"]
    if not sharded:
        ours, theirs = (torch.load(f"{folder}/one.ckpt", weights_only=True) for folder in folders)
        for part in ("state_dict", "optimizer_states"):
            torch.testing.assert_close(ours[part], theirs[part], rtol=1e-5, atol=1e-6)


def save_and_go_on(
    kind: str, folder: str, num_stages: int, devices: int, path: str | None = None, **options: Any
) -> Any:
    saves = ModelCheckpoint(folder, every_n_train_steps=12, save_top_k=-1, filename="{step}")
    more = {"seed": 8, "ckpt_path": path, "max_epochs": 2} if path else {}
    strategy = {"save_distributed_checkpoint": options.pop("sharded", False)}
    virtual = options.pop("virtual", False)
    if num_stages == 1:
        return fit(MODULES[kind], LOADERS[kind], None, 1, limit_train_batches=12, **more)
    return fit_late(
        kind, num_stages, virtual, devices, strategy=strategy, callbacks=[saves], enable_checkpointing=True, **more
    )[0]


@pytest.mark.parametrize("sharded", [False, True])
def test_going_on_with_other_stages_and_another_seed(pool: WorkerPool, tmp_path: Path, sharded: bool) -> None:
    pool.run(save_and_go_on, 3, "gpt", str(tmp_path), 3, 3, sharded=sharded)
    path = str(tmp_path / "step=12.ckpt")
    resumed = pool.run(save_and_go_on, 2, "gpt", str(tmp_path / "on"), 2, 2, path, sharded=sharded)[0]
    assert resumed.global_step == 24
    virtual = {"sharded": sharded, "virtual": True}
    expected = pool.run(save_and_go_on, 1, "gpt", str(tmp_path / "virtual"), 2, 1, path, **virtual)[0]
    assert_equal(resumed, expected, 1e-5)
    if not sharded:  # a file is for anyone
        assert pool.run(save_and_go_on, 1, "gpt", "", 1, 1, path)[0].global_step == 24


class Forgets(LateMLP):
    """Has parameters that nothing initialises."""

    def make(self) -> nn.Module:
        net = super().make()
        net.scale = nn.Parameter(torch.empty(3))
        return net

    def configure_model(self) -> None:
        super().configure_model()
        self.offset = nn.Parameter(torch.empty(2, 2, device="meta"))


class Generates(LateMLP):
    """A step that calls the network again on what it has made of its output."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0]
        for _ in range(2):
            x = torch.full_like(x, float(self.net(x).argmax()))  # type: ignore[misc]
        self.log("val_loss", x.sum())


class SharesMemory(LateMLP):
    def make(self) -> nn.Module:
        net: Any = super().make()
        net[-1].weight = nn.Parameter(net[0].weight.data.view(16, 8)[:8].view(4, 16))
        return net


class MakesNothing(models.MLP):
    def configure_model(self) -> None:
        pass


def fit_module(make: Any, num_stages: int, virtual: bool = False) -> Outcome:
    loader = models.vectors
    devices = 1 if virtual else num_stages
    strategy = {"num_stages": num_stages, "virtual": virtual}
    return fit(make, loader, strategy, devices, make_val_loader=loader, limit_train_batches=3, limit_val_batches=1)


def weights_in(folder: Path, kind: str) -> tuple[str, dict[str, torch.Tensor]]:
    """Files with the weights of the network in a `LateGPT`."""
    torch.manual_seed(3)
    state = dict(LateGPT().make().state_dict())
    path = folder / kind
    without_tied = {name: value.clone() for name, value in state.items() if name != "head.weight"}
    if kind == "shards":
        dcp.save(dict(state), checkpoint_id=path, no_dist=True)
    elif kind == "file.ckpt":
        torch.save({"state_dict": {f"net.{name}": value for name, value in state.items()}}, path)
    elif kind == "one.safetensors":
        save_file(without_tied, path)
    else:
        path.mkdir()
        names = {name: f"{i % 2}.safetensors" for i, name in enumerate(without_tied)}
        for file in set(names.values()):
            save_file({name: value for name, value in without_tied.items() if names[name] == file}, path / file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return str(path), state


def fit_from(path: str, virtual: bool, devices: int) -> Outcome:
    """Trains without changing anything."""
    strategy = {"virtual": virtual, "load_weights": path}
    still = {"optimizer": "sgd", "lr": 0.0}
    return fit_late("gpt", 2, virtual, devices, strategy=strategy, module_args=still)[0]


@pytest.mark.parametrize("kind", ["one.safetensors", "folder", "shards", "file.ckpt"])
def test_weights_from_files(pool: WorkerPool, tmp_path: Path, kind: str) -> None:
    path, state = weights_in(tmp_path, kind)
    for virtual, devices in [(False, 2), (True, 1)]:
        loaded = pool.run(fit_from, devices, path, virtual, devices)[0].state
        assert all(torch.equal(loaded[f"net.{name}"], value) for name, value in state.items())


def test_weights_of_another_module(pool: WorkerPool, tmp_path: Path) -> None:
    path, state = weights_in(tmp_path, "one.safetensors")
    changed = {name: value.clone() for name, value in state.items() if name not in ("head.weight", "ln_f.bias")}
    save_file({**changed, "pos_emb": torch.zeros(3, 4), "more": torch.zeros(2)}, path)
    for result in pool.try_run(fit_from, 2, path, False, 2):
        assert isinstance(result, Failure)
        assert (
            "`net.ln_f.bias` is missing, `net.more` is not in the module, `net.pos_emb` is (3, 4) there and (1, 32, 16)"
            in result.message
        )
    for result in pool.try_run(fit_from, 2, f"{path}.not", False, 2):
        assert isinstance(result, Failure)
        assert "there is none at" in result.message


@pytest.mark.parametrize(
    ("make", "virtual", "message"),
    [
        (Forgets, False, "into `offset`, `net.scale`. Initialise"),
        (Forgets, True, "into `offset`, `net.scale`"),
        (Generates, False, "`validation_step` needs the whole model on every process"),
        (SharesMemory, False, "`net.0.weight` and `net.10.weight` are two that lie in one storage"),
    ],
)
def test_refusals(pool: WorkerPool, make: Any, virtual: bool, message: str) -> None:
    for result in pool.try_run(fit_module, 1 if virtual else 2, make, 2, virtual):
        assert isinstance(result, Failure)
        assert message in result.message


def test_a_hook_that_makes_nothing_changes_nothing(pool: WorkerPool) -> None:
    with_hook, without = (pool.run(fit_module, 2, make, 2)[0] for make in (MakesNothing, models.MLP))
    assert_equal(with_hook, without, 0)
