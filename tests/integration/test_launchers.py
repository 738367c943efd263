"""Lightning's own launchers start the stages, and end them all when one fails."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import models
from tests.pool import WorkerPool, free_port
from tests.scripts import environment, finish, run, start
from tests.training import fit

SCRIPT = """
from lightning.pytorch import Trainer, seed_everything
import lightning_dgmp
from tests import models

class Failing(models.MLP):
    def training_step(self, batch, batch_idx):
        if batch_idx == 9 and self.global_rank == {fails_on}:
            raise ZeroDivisionError("the user's own error")
        return self.loss(batch)

if __name__ == "__main__":
    seed_everything(1)
    module = Failing()
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="{strategy}", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
    )
    trainer.fit(module, models.vectors())
    if trainer.is_global_zero:
        print("SUM", round(sum(float(p.sum()) for p in module.parameters()), 4))
"""


def write(folder: Path, strategy: str = "delayed_mp", fails_on: int = -1) -> str:
    path = folder / "script.py"
    path.write_text(SCRIPT.format(strategy=strategy, fails_on=fails_on))
    return str(path)


def result(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith("SUM")]
    assert len(lines) == 1, output
    return lines[0]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write(tmp_path_factory.mktemp("subprocess"))
    done = run([sys.executable, path])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 stages:") == 1
    return result(done.stdout)


def test_subprocesses(expected: str, pool: WorkerPool) -> None:
    virtual = {"num_stages": 2, "virtual": True}
    state = pool.run(fit, 1, models.MLP, models.vectors, virtual, 1, seed=1)[0].state
    assert expected == f"SUM {round(sum(float(value.sum()) for value in state.values()), 4)}"


def test_spawn(expected: str, tmp_path: Path) -> None:
    command = [sys.executable, write(tmp_path, "delayed_mp_spawn")]
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert result(done.stdout) == expected


COMMAND = """
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
import lightning_dgmp
from tests import models

class Data(LightningDataModule):
    def train_dataloader(self):
        return models.vectors()

    def val_dataloader(self):
        return models.vectors()

if __name__ == "__main__":
    cli = LightningCLI(models.ValidatedMLP, Data, seed_everything_default=1)
    if cli.trainer.is_global_zero:
        print("SUM", cli.trainer.strategy.plan.num_stages, *cli.trainer.callback_metrics)
"""

CONFIG = """
trainer:
  accelerator: cpu
  devices: 2
  max_epochs: 1
  logger: false
  enable_progress_bar: false
  enable_checkpointing: false
  strategy:
    class_path: lightning_dgmp.DelayedMPStrategy
    init_args:
      num_stages: 2
      backward: recompute
"""


def test_lightning_cli(tmp_path: Path) -> None:
    script, config = tmp_path / "script.py", tmp_path / "run.yaml"
    script.write_text(COMMAND)
    config.write_text(CONFIG)
    command = [sys.executable, str(script), "fit", "--config", str(config)]
    done = run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert result(done.stdout) == "SUM 2 loss val_loss"


def test_lightning_cli_with_the_name_of_the_strategy(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(COMMAND)
    options = {"strategy": "delayed_mp", "accelerator": "cpu", "devices": 2, "max_epochs": 1, "logger": "false"}
    options |= {"enable_progress_bar": "false", "enable_checkpointing": "false"}
    command = [sys.executable, str(script), "fit", *(f"--trainer.{name}={value}" for name, value in options.items())]
    done = run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert result(done.stdout) == "SUM 2 loss val_loss"


STANDALONE = """
import sys
{imports}
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

if __name__ == "__main__":
    data = DataLoader(TensorDataset(torch.randn(64, 8)), 8)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="delayed_mp", max_epochs=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
    )
    trainer.fit(Model(), data, data)
    assert "lightning.pytorch" not in sys.modules
    if trainer.is_global_zero:
        print("SUM", *trainer.callback_metrics)
"""


@pytest.mark.parametrize("first", [0, 1])
def test_the_standalone_package(tmp_path: Path, first: int) -> None:
    path = tmp_path / "script.py"
    imports = ["import pytorch_lightning as pl", "import lightning_dgmp"]
    path.write_text(STANDALONE.replace("{imports}", "\n".join([imports[first], imports[1 - first]])))
    done = run([sys.executable, path])
    assert done.returncode == 0, done.stderr
    assert result(done.stdout) == "SUM val_loss"


def test_torchrun(expected: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = run([*command, write(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert result(done.stdout) == expected


def test_slurm(expected: str, tmp_path: Path) -> None:
    script, port = write(tmp_path), str(free_port())
    tasks = []
    for rank in range(2):
        slurm = {
            "NTASKS": "2", "NTASKS_PER_NODE": "2", "JOB_NAME": "test", "PROCID": str(rank), "LOCALID": str(rank),
            "NODEID": "0", "NNODES": "1", "JOB_ID": "1", "NODELIST": "127.0.0.1",
        }  # fmt: skip
        env = environment(MASTER_PORT=port, MASTER_ADDR="127.0.0.1", **{f"SLURM_{k}": v for k, v in slurm.items()})
        tasks.append(start([sys.executable, script], env=env))
    done = finish(*tasks, limit=120)
    assert [task.returncode for task in done] == [0, 0], done
    assert result(done[0].stdout) == expected


@pytest.mark.parametrize("fails_on", [0, 1])
def test_all_processes_end_when_one_fails(tmp_path: Path, fails_on: int) -> None:
    started = time.monotonic()
    path = write(tmp_path, fails_on=fails_on)
    done = run([sys.executable, path], limit=60)
    assert time.monotonic() - started < 60
    assert done.returncode != 0
    assert "ZeroDivisionError: the user's own error" in done.stderr
    assert "in training_step" in done.stderr
    left = subprocess.run(["pgrep", "-f", path], capture_output=True, text=True).stdout
    assert not left, "a process was left behind"
