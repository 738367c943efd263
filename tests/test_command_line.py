"""``python -m lightning_dgmp``: what it prints, and what it says where it cannot."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_dgmp.__main__ import main
from lightning_dgmp.running import start_children_alike
from tests.scripts import ROOT
from tests.scripts import run as run_script

MODELS = str(ROOT / "tests" / "models.py")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def log(folder: Path, seconds: float, losses: list[float], monitored: bool) -> Path:
    """A folder of events as of a run whose steps take so many seconds."""
    writer = SummaryWriter(str(folder))
    for step, loss in enumerate(losses):
        when = 1000 + seconds * 10 * step
        writer.add_scalar("val_loss", loss, 10 * step, walltime=when)
        if monitored:
            for k in range(2):
                for kind, share in (("forward", 0.3), ("backward", 0.6), ("wait_error", 0.1)):
                    writer.add_scalar(f"stage_{k}/{kind}", share, 10 * step, walltime=when)
            writer.add_scalar("pipeline/efficiency", 0.9, 10 * step, walltime=when)
            writer.add_scalar("pipeline/speedup", 1.8, 10 * step, walltime=when)
    writer.close()
    return folder


# ----- plan


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", f"{MODELS}:LanguageModel", "--data", "tests.models:ragged_tokens", "--stages", "2", "4", "40", "0"]
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert out.count("first module") == 2
    assert "gpt.blocks.2.qkv" in out
    assert "Predicted: 1.9" in out
    assert " batches a second for each TFLOP/s of a device" in out
    assert "`num_stages=40` needs 39 cuts" in out
    code, out, _ = run(capsys, *argv, "--json")
    two, four, forty, none = json.loads(out)
    assert [one["num_stages"] for one in (two, four, forty)] == [2, 4, 40]
    assert none["refused"] == "`num_stages` must be at least 1, but is 0."
    assert two["split_at"] == ["gpt.blocks.2.qkv"]
    assert 3 < four["speedup"] < 4
    total = sum(stage["cost"] for stage in four["stages"])
    assert four["batches_per_second_per_tflops"] == pytest.approx(four["speedup"] * 1e12 / total)
    assert "refused" in forty
    memory = two["stages"][0]["memory"]
    assert memory["total"] == sum(value for name, value in memory.items() if name != "total")
    assert memory["parameters"] == memory["snapshots"] / 2 == memory["gradients"] > 20_000
    assert memory["optimizer"] == 0  # of SGD


def test_plan_with_a_limit(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "plan",
        "tests.models:MLP",
        "--args",
        '{"width": 256}',
        "--data",
        "tests.models:vectors",
        "--stages",
        "1",
        "2",
    ]
    code, out, _ = run(capsys, *argv, "--json")
    one, two = (max(stage["memory"]["total"] for stage in plan["stages"]) for plan in json.loads(out))
    code, out, _ = run(capsys, *argv, "--memory-limit", f"{(one + two) / 2:g}")
    assert code == 0
    assert f"with the cuts that need least stages need up to {one / 1e6:.1f} MB" in out
    assert "What would do: `num_stages=2` (" in out
    assert out.count("first module") == 1
    with pytest.raises(SystemExit):
        run(capsys, *argv, "--memory-limit", "-1")
    assert "must be a number of bytes above 0, such as 20e9, but is '-1'" in capsys.readouterr().err


def test_plan_of_a_data_module_with_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = tmp_path / "project.py"
    script.write_text(
        "from lightning.pytorch import LightningDataModule\nfrom tests import models\n"
        "class Data(LightningDataModule):\n"
        "    def __init__(self, size): super().__init__(); self.size = size\n"
        "    def train_dataloader(self): return models.vectors(self.size)\n"
    )
    argv = ["plan", "tests.models:MLP", "--args", '{"depth": 6}', "--data", f"{script}:Data"]
    code, out, _ = run(capsys, *argv, "--data-args", '{"size": 32}', "--stages", "3", "--json")
    assert code == 0
    assert len(json.loads(out)[0]["stages"]) == 3


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("tests.models", "must be given as `package.module:Name` or `script.py:Name`, but is 'tests.models'"),
        ("nowhere.at_all:Model", "`nowhere.at_all` cannot be imported: ModuleNotFoundError"),
        ("missing.py:Model", "`missing.py` cannot be imported: FileNotFoundError"),
        ("tests.models:Nothing", "`tests.models` has no `Nothing`. It has "),
        ("tests.models:vectors", "must be a `LightningModule`, but 'tests.models:vectors' is a `DataLoader`"),
        ("tests.models:Manual", "has no `Manual`"),
    ],
)
def test_modules_that_cannot_be_planned(capsys: pytest.CaptureFixture[str], module: str, text: str) -> None:
    code, out, err = run(capsys, "plan", module, "--data", "tests.models:vectors")
    assert (code, out) == (1, "")
    assert text in err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--stages", "30", "40"], "the module can be cut into none of these numbers of stages"),
        (["--data", "tests.models:MLP"], "`--data` must be a LightningDataModule or a loader, but 'tests.models:MLP'"),
    ],
)
def test_plans_that_cannot_be_made(capsys: pytest.CaptureFixture[str], argv: list[str], text: str) -> None:
    code, _, err = run(capsys, "plan", "tests.models:MLP", "--data", "tests.models:vectors", *argv)
    assert code == 1
    assert text in err


@pytest.mark.parametrize("value", ["{bad", "[1]"])
def test_arguments_are_json_objects(capsys: pytest.CaptureFixture[str], value: str) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "tests.models:MLP", "--args", value])
    assert f"must be a JSON object, such as '{{\"layers\": 24}}', but is {value!r}" in capsys.readouterr().err


def test_what_training_refuses_a_plan_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = tmp_path / "manual.py"
    script.write_text(
        "from tests import models\nclass Manual(models.MLP):\n"
        "    def __init__(self): super().__init__(); self.automatic_optimization = False\n"
    )
    code, _, err = run(capsys, "plan", f"{script}:Manual", "--data", "tests.models:vectors")
    assert code == 1
    assert "needs automatic optimization" in err


PROJECT = """
from lightning.pytorch import LightningDataModule
from tests import models
print("as it is imported")
class Failing(models.MLP):
    def training_step(self, batch, batch_idx):
        raise KeyError("no such column")
class Printing(models.MLP):
    def training_step(self, batch, batch_idx):
        print("a step")
        return super().training_step(batch, batch_idx)
class Data(LightningDataModule):
    def setup(self, stage):
        raise OSError("no such folder")
"""


def test_only_the_plan_is_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "printing.py").write_text(PROJECT)
    argv = ["plan", f"{tmp_path}/printing.py:Printing", "--data", "tests.models:vectors", "--stages", "2", "--json"]
    code, out, err = run(capsys, *argv)
    assert code == 0
    assert json.loads(out)[0]["num_stages"] == 2
    assert "as it is imported" in err
    assert "a step" in err


@pytest.mark.parametrize(
    ("module", "data", "error", "line"),
    [
        ("failing.py:Failing", "tests.models:vectors", "KeyError: 'no such column'", 7),
        ("tests.models:MLP", "failing.py:Data", "OSError: no such folder", 14),
    ],
)
def test_errors_of_a_project_name_their_place(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, data: str,
    error: str, line: int,
) -> None:  # fmt: skip
    (tmp_path / "failing.py").write_text(PROJECT)
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "plan", module, "--data", data)
    assert code == 1
    assert f"plan: {tmp_path}/failing.py:{line} raised {error}\n" in err
    assert "Traceback" in err.partition(error)[2]


def test_scripts_that_parse_arguments_are_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = tmp_path / "parsing.py"
    script.write_text(
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('--lr', required=True)\np.parse_args()"
    )
    code, _, err = run(capsys, "plan", f"{script}:Model", "--stages", "2")
    assert code == 1
    assert "usage: parsing.py" in err
    assert "ends the process when it is imported, as scripts do that parse arguments. Let it" in err


STANDALONE = """
import pytorch_lightning as pl
from torch import nn, ones, optim
from torch.utils.data import DataLoader
class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    def training_step(self, batch):
        return self.net(batch).sum()
    def configure_optimizers(self):
        return optim.SGD(self.parameters(), 0.1)
    def train_dataloader(self):
        return DataLoader(ones(16, 8), 4)
"""


def test_plan_of_the_standalone_package(tmp_path: Path) -> None:
    (tmp_path / "project.py").write_text(STANDALONE)
    command = [sys.executable, "-m", "lightning_dgmp", "plan", "project.py:Model", "--stages", "2", "--json"]
    done = run_script(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["split_at"] == ["net.1"]


LOGGING = """
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, OnExceptionCheckpoint
from tests import models
class Logging(models.MLP):
    def configure_callbacks(self):
        every = ModelCheckpoint("saved", every_n_train_steps=1)
        return [LearningRateMonitor("step"), every, OnExceptionCheckpoint("saved")]
    def on_train_start(self):
        self.logger.log_hyperparams({"width": 8}, {"hp/metric": 0})
        self.logger.experiment.add_text("notes", "of the run")
        assert self.trainer.checkpoint_callback.dirpath
        (Path(self.trainer.log_dir) / "samples").mkdir()
    def training_step(self, batch, batch_idx):
        self.logger.experiment.add_scalar("of the step", 1.0, batch_idx)
        return super().training_step(batch, batch_idx)
"""


def test_a_plan_leaves_no_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any) -> None:
    """Although there are a logger and checkpoints, as in training."""
    (tmp_path / "logging_project.py").write_text("from pathlib import Path\n" + LOGGING)
    (tmp_path / "here" / "temporary").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "here" / "temporary"))
    argv = ["plan", f"{tmp_path}/logging_project.py:Logging", "--data", "tests.models:vectors", "--stages", "2"]
    code, _, err = run(capsys, *argv)
    assert code == 0, err
    assert [path.name for path in Path().rglob("*")] == ["temporary"]


# ----- simulate


def test_simulate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["simulate", "--forward", "10", "10", "14", "10", "--backward", "20", "20", "28", "20"]
    code, out, _ = run(capsys, *argv, "--png", str(tmp_path / "timeline.png"))
    assert code == 0
    assert "delayed                                42.00  100 %  3.14" in out
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    code, out, _ = run(capsys, *argv, "--json", "--latency", "50", "--slack", "3")
    rows = json.loads(out)
    assert rows[0]["schedule"] == "delayed, slack=3"
    assert [rows[0][key] for key in ("period", "efficiency", "speedup")] == pytest.approx([0.042, 1, 132 / 42])
    assert [row["schedule"] for row in rows[1:]] == [f"{n}, 8 microbatches" for n in ("GPipe", "1F1B", "zero-bubble")]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--forward", "-1", "--backward", "2"], "`forward` of a stage must be at least 0 and finite, but is -1 ms"),
        (["--forward", "1", "--backward", "2", "--latency", "-5"], "at least 0 ms and finite, but is -5 ms"),
        (
            ["--forward", "inf", "1", "--backward", "2"],
            "at least 0 and finite, but is inf",
        ),
        (["--forward", "0", "0", "--backward", "0", "0"], "all of these take 0 seconds"),
        (["--forward", "1", "--backward", "2", "--png", "nodir/a.png"], "`--png` must be a file that can be written"),
        (["--forward", "1", "--backward", "2", "--png", "a.xyz"], "'a.xyz' is not: Format 'xyz' is not supported"),
        (["--forward", "1", "2", "--backward", "1", "2", "3"], "2 for `forward`, but there are 3 for `backward`"),
        (["--forward", "1", "--backward", "2", "--slack", "-1"], "`slack` must be at least 0, but is -1"),
        (["--forward", "1", "--backward", "2", "--bandwidth", "0"], "`bandwidth` must be more than 0"),
    ],
)
def test_impossible_simulations(capsys: pytest.CaptureFixture[str], argv: list[str], text: str) -> None:
    code, _, err = run(capsys, "simulate", *argv)
    assert code == 1
    assert text in err


# ----- report


def test_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The second run makes a step in twice the time, and needs two thirds of the steps to the loss of the first."""
    ours = log(tmp_path / "ours" / "version_0", 0.1, [4, 3.5, 3, 2.5], monitored=True)
    theirs = log(tmp_path / "theirs" / "version_0", 0.2, [float("nan"), 3, 2, 1], monitored=False)
    code, out, _ = run(capsys, "report", str(tmp_path / "ours"))
    assert code == 0
    assert "100.0 ms a step" in out
    assert "computes in 90 % of the time; 1.80 times as fast as one device" in out
    picture = tmp_path / "both.png"
    code, out, _ = run(capsys, "report", str(ours), str(theirs), "--json", "--png", str(picture))
    told = json.loads(out)
    assert told["runs"][0]["num_stages"] == 2
    assert told["runs"][0]["seconds_per_step"] == pytest.approx(0.1)
    assert told["runs"][0]["shares"][1]["backward"] == pytest.approx(0.6)
    comparison: dict[str, Any] = told["comparison"]
    assert comparison["tag"] == "val_loss"
    assert comparison["target"] == 2.5
    assert comparison["steps"] == [30, 20]
    assert comparison["faster"] == pytest.approx(2.0)
    assert comparison["fewer"] == pytest.approx(21 / 31)
    assert comparison["speedup"] == pytest.approx(2 * 21 / 31)
    assert picture.stat().st_size > 10_000
    code, out, _ = run(capsys, "report", str(ours), str(theirs))
    rows = [re.split("  +", line) for line in out.splitlines()[-4:]]
    assert rows == [
        ["`val_loss` down to 2.5", "ours/version_0", "theirs/version_0", "the first against the second"],
        ["ms a step", "100.0", "200.0", "2.00 times as fast"],
        ["steps", "30", "20", "0.68 times as few"],
        ["both", "1.35 times sooner"],
    ]


def test_runs_are_compared_by_smoothed_losses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One lucky batch of 100 is no target."""
    losses = [100.0 - step for step in range(100)]
    lucky = [*losses[:10], 0.0, *losses[11:]]
    folders = [str(log(tmp_path / name, 0.1, run, monitored=False)) for name, run in (("a", lucky), ("b", losses))]
    _, out, _ = run(capsys, "report", *folders, "--json")
    comparison = json.loads(out)["comparison"]
    assert (comparison["target"], comparison["mean_of"]) == (3.0, 5)
    assert comparison["steps"] == [990, 990]
    _, out, _ = run(capsys, "report", *folders)
    assert "`val_loss` down to 3, mean of 5 entries" in out


def test_shares_of_a_stage_sum_to_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Each interval counts as long as it is, and that in which the pipeline fills not at all."""
    writer = SummaryWriter(str(tmp_path))
    rows = (10, 1.0, 0.0), (20, 0.9, 0.1), (30, 0.5, 0.5), (50, 0.2, 0.8)
    for step, forward, wait in rows:
        writer.add_scalar("stage_0/forward", forward, step, walltime=step)
        writer.add_scalar("stage_0/wait_error", wait, step, walltime=step)
    writer.close()
    _, out, _ = run(capsys, "report", str(tmp_path), "--json")
    shares = json.loads(out)["runs"][0]["shares"][0]
    assert shares["forward"] == pytest.approx((0.9 + 0.5 + 2 * 0.2) / 4)
    assert sum(shares.values()) == pytest.approx(1)


def test_reports_that_cannot_be_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run_folder = log(tmp_path / "run", 0.1, [4, 3], monitored=False)
    diverged = log(tmp_path / "diverged", 0.1, [float("nan"), float("inf")], monitored=False)
    short = log(tmp_path / "short", 0.1, [4], monitored=False)
    for argv, text in (
        ([str(run_folder), "--png", "nodir/a.png"], "`--png` must be a file that can be written, but 'nodir/a.png'"),
        (["nowhere"], "A log folder must exist, but nowhere does not."),
        ([str(tmp_path / "empty")], "has none, also in subfolders"),
        ([str(short)], "must have logged a scalar twice"),
        ([str(run_folder), str(diverged)], "compared by a finite `val_loss`, but all of"),
        ([str(run_folder), str(run_folder), "--loss", "accuracy"], "'accuracy' is not in ['val_loss']"),
    ):
        code, _, err = run(capsys, "report", *argv)
        assert code == 1
        assert text in err


# ----- run


SCRIPT = """
import argparse
from lightning.pytorch import Trainer, seed_everything
from tests import models
parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int)
args = parser.parse_args()
seed_everything(1)
trainer = Trainer(accelerator="cpu", devices=2, strategy="delayed_mp", max_epochs=args.epochs, logger=False,
                  enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(models.MLP(), models.vectors())
print(f"rank {trainer.global_rank} of {trainer.world_size} made {trainer.global_step} steps")
"""


def test_run_needs_no_import(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "lightning_dgmp", "run", str(script), "--epochs", "1"]
    done = run_script(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rank (\d) of 2 made 34 steps", done.stdout)) == ["0", "1"]  # lines may run into another


def test_children_of_hydra_scripts_run_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder and with the overrides that Lightning gives them."""

    def of_hydra(local_rank: int) -> tuple[list[str], str]:
        return [sys.executable, "/project/train.py", "epochs=1", f"hydra.job.name=train_ddp_process_{local_rank}"], "/"

    command = [sys.executable, "-m", "lightning_dgmp", "run", "/project/train.py"]
    monkeypatch.setattr("lightning_dgmp.running._command", command)
    launchers = SimpleNamespace(_basic_subprocess_cmd=None, _hydra_subprocess_cmd=of_hydra)
    for _ in range(2):  # as several trainers do
        start_children_alike(launchers)
    expected = [*command, "epochs=1", "hydra.job.name=train_ddp_process_3"], "/"
    assert launchers._hydra_subprocess_cmd(local_rank=3) == launchers._hydra_subprocess_cmd(3) == expected


def test_run_leaves_errors_as_they_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("raise ValueError('of the script')")
    with pytest.raises(ValueError, match="of the script"):
        main(["run", str(script)])
    code, _, err = run(capsys, "run", str(tmp_path / "none.py"))
    assert code == 1
    assert "is no file" in err


def test_run_needs_a_script_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run"])
    assert "the following arguments are required: script\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "simulate", "report", "run"])
def test_help_shows_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"python -m lightning_dgmp {command} " in capsys.readouterr().out
