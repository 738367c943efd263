"""Checkpoints hold the whole model, in the user's order, and any strategy can go on from them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_dgmp import DelayedMPStrategy
from tests import models
from tests.pool import Failure, WorkerPool, exit_codes
from tests.training import assert_equal, fit


def fit_and_save(folder: str, strategy: Any, devices: int, **kwargs: Any) -> Any:
    callback = ModelCheckpoint(folder, every_n_train_steps=10, save_top_k=-1, filename="{step}")
    return fit(
        models.MLP,
        models.vectors,
        strategy,
        devices,
        module_args={"optimizer": "adamw"},
        enable_checkpointing=True,
        callbacks=[callback],
        **kwargs,
    )


def test_a_checkpoint_is_an_ordinary_one(pool: WorkerPool, tmp_path: Path) -> None:
    expected = pool.run(fit_and_save, 1, str(tmp_path / "virtual"), {"num_stages": 3, "virtual": True}, 1)[0]
    ours = pool.run(fit_and_save, 3, str(tmp_path / "processes"), {"num_stages": 3}, 3)[0]
    assert_equal(ours, expected, 1e-5)
    names = sorted(path.name for path in (tmp_path / "virtual").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "processes").iterdir())
    assert len(names) == 3
    for name in names:
        a = torch.load(tmp_path / "processes" / name, weights_only=True)
        b = torch.load(tmp_path / "virtual" / name, weights_only=True)
        assert a.keys() == b.keys()
        torch.testing.assert_close(a["state_dict"], b["state_dict"], rtol=1e-5, atol=1e-5)
        mine, theirs = a["optimizer_states"][0], b["optimizer_states"][0]
        assert mine["param_groups"] == theirs["param_groups"]
        assert mine["state"].keys() == theirs["state"].keys()
        for index, state in theirs["state"].items():
            torch.testing.assert_close(mine["state"][index], state, rtol=1e-4, atol=1e-6)
        assert a["lr_schedulers"] == b["lr_schedulers"]


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2)])
def test_going_on_with_another_number_of_stages(pool: WorkerPool, tmp_path: Path, before: int, after: int) -> None:
    def strategy(num_stages: int) -> Any:
        return {"num_stages": num_stages} if num_stages > 1 else None

    pool.run(fit_and_save, before, str(tmp_path), strategy(before), before, limit_train_batches=10)
    path = next(tmp_path.iterdir())
    arguments = {"max_epochs": 2, "limit_train_batches": 10, "ckpt_path": str(path)}
    resumed = pool.run(fit_and_save, after, str(tmp_path / "on"), strategy(after), after, **arguments)[0]
    assert resumed.global_step == 20
    virtual = {"num_stages": after, "virtual": True} if after > 1 else None
    expected = pool.run(fit_and_save, 1, str(tmp_path / "virtual"), virtual, 1, **arguments)[0]
    assert_equal(resumed, expected, 1e-5)


class WithDropout(models.MLP):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inp = nn.Sequential(self.inp, nn.Dropout(0.2))  # type: ignore[assignment]


class Resumable:
    """A loader that can begin in the middle, as that of torchdata."""

    def __init__(self) -> None:
        self.data = list(models.vectors())
        self.position = 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        begin, self.position = self.position, 0
        for i in range(begin, len(self.data)):
            self.position = i + 1
            yield self.data[i]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def shuffled() -> DataLoader:
    return DataLoader(models.vectors().dataset, batch_size=8, shuffle=True)


def fit_and_keep(folder: str, loader: Any, virtual: bool, **kwargs: Any) -> Any:
    callback = ModelCheckpoint(folder, every_n_train_steps=17, save_top_k=-1, filename="{step}")
    args = {"module_args": {"optimizer": "adamw"}, "enable_checkpointing": True, "max_epochs": 3, **kwargs}
    strategy = {"num_stages": 2, "virtual": virtual}
    return fit(WithDropout, loader, strategy, 1 if virtual else 2, callbacks=[callback], **args)


# An epoch has 34 batches.
@pytest.mark.parametrize(("loader", "step"), [(shuffled, 34), (shuffled, 68), (Resumable, 34), (Resumable, 51)])
def test_resuming_is_going_on_bit_for_bit(pool: WorkerPool, tmp_path: Path, loader: Any, step: int) -> None:
    whole = pool.run(fit_and_keep, 2, str(tmp_path / "whole"), loader, False)[0]
    path = str(tmp_path / "whole" / f"step={step}.ckpt")
    resumed = pool.run(fit_and_keep, 2, str(tmp_path / "on"), loader, False, ckpt_path=path, seed=99)[0]
    assert resumed.rows == whole.rows[step:]
    for name, value in whole.state.items():
        torch.testing.assert_close(resumed.state[name], value, rtol=0, atol=0)


class ValidatedWithDropout(WithDropout, models.ValidatedMLP):
    pass


def shuffled_validation() -> DataLoader:
    return DataLoader(models.vectors().dataset, batch_size=16, shuffle=True)


def fit_and_validate(folder: str, virtual: bool, **kwargs: Any) -> Any:
    callback = ModelCheckpoint(folder, every_n_train_steps=34, save_top_k=-1, filename="{step}")
    args = {"enable_checkpointing": True, "max_epochs": 3, "make_val_loader": shuffled_validation, **kwargs}
    strategy = {"num_stages": 2, "virtual": virtual}
    model = models.ValidatedMLP if virtual else ValidatedWithDropout
    return fit(model, shuffled, strategy, 1 if virtual else 2, callbacks=[callback], **args)


@pytest.mark.parametrize("virtual", [False, True])
def test_resuming_behind_a_validation_is_going_on(pool: WorkerPool, tmp_path: Path, virtual: bool) -> None:
    devices = 1 if virtual else 2
    whole = pool.run(fit_and_validate, devices, str(tmp_path / "whole"), virtual)[0]
    path = str(tmp_path / "whole" / "step=34.ckpt")
    resumed = pool.run(fit_and_validate, devices, str(tmp_path / "on"), virtual, ckpt_path=path, seed=99)[0]
    for name, value in whole.state.items():
        torch.testing.assert_close(resumed.state[name], value, rtol=0, atol=0)


def fit_and_accumulate(folder: str, virtual: bool, **kwargs: Any) -> Any:
    callback = ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    args = {"enable_checkpointing": True, "max_epochs": 2, "accumulate_grad_batches": 3, **kwargs}
    strategy = {"num_stages": 3, "virtual": virtual}
    return fit(models.MLP, Resumable, strategy, 1 if virtual else 3, callbacks=[callback], **args)


@pytest.mark.parametrize("virtual", [False, True])
def test_resuming_with_accumulation_in_the_middle_of_an_epoch(pool: WorkerPool, tmp_path: Path, virtual: bool) -> None:
    devices = 1 if virtual else 3
    whole = pool.run(fit_and_accumulate, devices, str(tmp_path / "whole"), virtual)[0]
    path = str(tmp_path / "whole" / "step=5.ckpt")
    resumed = pool.run(fit_and_accumulate, devices, str(tmp_path / "on"), virtual, ckpt_path=path)[0]
    for name, value in whole.state.items():
        torch.testing.assert_close(resumed.state[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("step", [34, 68])
def test_resuming_virtual_stages_is_going_on(pool: WorkerPool, tmp_path: Path, step: int) -> None:
    whole = pool.run(fit_and_keep, 1, str(tmp_path / "whole"), shuffled, True)[0]
    path = str(tmp_path / "whole" / f"step={step}.ckpt")
    resumed = pool.run(fit_and_keep, 1, str(tmp_path / "on"), shuffled, True, ckpt_path=path, seed=99)[0]
    assert resumed.rows == whole.rows[step:]


def save_and_die(rank: int, port: int, folder: str, where: str) -> None:
    """Save once, then let the process that writes be killed in the middle of saving again."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_RANK=str(rank), NODE_RANK="0"
    )
    module = models.MLP(width=400)
    trainer = Trainer(accelerator="cpu", devices=2, strategy=DelayedMPStrategy(2), logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, max_steps=2)  # fmt: skip
    trainer.fit(module, models.vectors())
    trainer.save_checkpoint(f"{folder}/last.ckpt")

    def die(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write_a_part(checkpoint: Any, path: str) -> None:
        Path(path).write_bytes(b"PK" * 50)
        die()

    writer = "lightning.fabric.plugins.io.torch_io._atomic_save"
    with patch("os.replace", die) if where == "replace" else patch(writer, write_a_part):
        trainer.save_checkpoint(f"{folder}/last.ckpt")


@pytest.mark.parametrize("where", ["write", "replace"])
def test_a_kill_leaves_the_previous_checkpoint(tmp_path: Path, where: str) -> None:
    killed, other = exit_codes(save_and_die, 2, str(tmp_path), where)
    assert killed == -signal.SIGKILL
    assert other not in (None, 0)
    assert (tmp_path / "last.ckpt.part").exists()
    module = models.MLP.load_from_checkpoint(tmp_path / "last.ckpt", width=400, weights_only=True)
    assert module.state_dict().keys() == models.MLP().state_dict().keys()


class SavesItsArguments(models.MLP):
    def __init__(self, width: int = 16, **kwargs: Any) -> None:
        super().__init__(width=width, **kwargs)
        self.save_hyperparameters()


def fit_saving_weights(folder: str) -> Any:
    checkpoints = [
        ModelCheckpoint(folder, filename="weights", save_weights_only=True),
        ModelCheckpoint(folder, filename="all", every_n_train_steps=10),
    ]
    args: dict[str, Any] = {"callbacks": checkpoints, "enable_checkpointing": True, "limit_train_batches": 10}
    return fit(SavesItsArguments, models.vectors, {"num_stages": 2}, 2, module_args={"width": 24}, **args)


def test_the_module_of_a_checkpoint(pool: WorkerPool, tmp_path: Path) -> None:
    """With all that is saved, and with weights alone."""
    outcomes = pool.run(fit_saving_weights, 2, str(tmp_path))
    saved = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert not {"optimizer_states", "lr_schedulers", "callbacks"} & saved.keys()
    assert torch.load(tmp_path / "all.ckpt", weights_only=True)["optimizer_states"]
    for path in tmp_path.iterdir():
        loaded = SavesItsArguments.load_from_checkpoint(path, weights_only=True)
        torch.testing.assert_close(loaded.state_dict(), outcomes[0].state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("other", "Error.s. in loading state_dict"),
        *((what, "bad.ckpt` cannot be read") for what in ("truncated", "half", "all but a byte", "text")),
    ],
)
def test_a_checkpoint_that_does_not_fit(pool: WorkerPool, tmp_path: Path, what: str, text: str) -> None:
    path = tmp_path / "bad.ckpt"
    pool.run(fit_and_save, 1, str(tmp_path / "good"), None, 1, limit_train_batches=10)
    good = next((tmp_path / "good").iterdir())
    whole = good.read_bytes()
    lengths = {"truncated": 2000, "half": len(whole) // 2, "all but a byte": len(whole) - 1}
    if what in lengths:
        path.write_bytes(whole[: lengths[what]])
    elif what == "text":
        path.write_text("the address of the file\n")
    else:
        checkpoint = torch.load(good, weights_only=True)
        checkpoint["state_dict"] = {f"other.{name}": value for name, value in checkpoint["state_dict"].items()}
        torch.save(checkpoint, path)
    before = path.read_bytes()
    results = pool.try_run(fit_and_save, 2, str(tmp_path / "on"), {"num_stages": 2}, 2, ckpt_path=str(path))
    for result in results:
        assert isinstance(result, Failure)
        assert text in result.message.replace("(s)", ".s.")
    assert path.read_bytes() == before


class SavesItsNet(models.MLP):
    """`save_hyperparameters()` with the net among the arguments, as lightning-hydra-template has it."""

    def __init__(self, net: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        net = nn.Linear(16, 4) if net is None else net
        self.save_hyperparameters({"net": net})
        self.out = net


def test_hyperparameters_may_have_modules(pool: WorkerPool, tmp_path: Path) -> None:
    args: dict[str, Any] = {"enable_checkpointing": True, "limit_train_batches": 10}
    for name, strategy in (("virtual", {"num_stages": 2, "virtual": True}), ("processes", {"num_stages": 2})):
        devices = 1 if name == "virtual" else 2
        outcomes = pool.run(fit, devices, SavesItsNet, models.vectors, strategy, devices,
                            default_root_dir=str(tmp_path / name), **args)  # fmt: skip
        (path,) = (tmp_path / name).rglob("*.ckpt")
        checkpoint = torch.load(path, weights_only=False)
        net = checkpoint["hyper_parameters"]["net"]
        assert type(net.weight) is nn.Parameter
        torch.testing.assert_close(net.weight.detach(), outcomes[0].state["out.weight"], rtol=0, atol=0)
        loaded = SavesItsNet.load_from_checkpoint(path, weights_only=False)
        torch.testing.assert_close(loaded.state_dict(), outcomes[0].state, rtol=0, atol=0)


def test_shards_have_no_modules(pool: WorkerPool, tmp_path: Path) -> None:
    strategy = {"num_stages": 2, "save_distributed_checkpoint": True}
    results = pool.try_run(fit, 2, SavesItsNet, models.vectors, strategy, 2, default_root_dir=str(tmp_path))
    assert all("cannot write modules that are hyperparameters" in result.message for result in results), results
