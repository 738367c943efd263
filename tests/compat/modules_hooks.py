"""Modules after patterns of the LightningModule: metrics, logging, hooks, the trainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision

from tests.compat import data
from tests.compat.modules_patterns import deep_mlp


class MetricsCollections(LightningModule):
    """`MetricCollection` cloned with prefixes, updated in steps, computed, logged and reset at epoch ends."""

    def __init__(self) -> None:
        super().__init__()
        self.net = deep_mlp(8, 4)
        metrics = MetricCollection([MulticlassAccuracy(4), MulticlassF1Score(4), MulticlassPrecision(4)])
        self.train_metrics = metrics.clone(prefix="train_")
        self.valid_metrics = metrics.clone(prefix="val_")
        self.test_metrics = metrics.clone(prefix="test_")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.log("train_loss", loss)
        self.log_dict(self.train_metrics(logits, y))
        return loss

    def on_train_epoch_end(self) -> None:
        self.train_metrics.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.net(x)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.valid_metrics.update(logits, y)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.valid_metrics.compute())
        self.valid_metrics.reset()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.test_metrics(self.net(x), y)
        self.log_dict(self.test_metrics)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class AsksTrainer(LightningModule):
    """`self.trainer.*` in the step (annealed weight) and in `configure_optimizers` (`OneCycleLR`)."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = deep_mlp(8, 4), 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        assert self.trainer.max_epochs is not None
        total = self.trainer.num_training_batches * self.trainer.max_epochs
        weight = min(1.0, self.trainer.global_step / total)
        logits = self.net(x)
        entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        loss = F.cross_entropy(logits, y) - 0.1 * weight * entropy
        if self.trainer.is_global_zero:
            self.seen += len(x)
        self.log("train/weight", weight)
        self.log("train/loss", loss)
        if self.trainer.is_last_batch:
            self.log("train/last", loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val/loss", F.cross_entropy(self.net(x), y), sync_dist=True)
        self.log("val/epoch", float(self.current_epoch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)
        total = int(self.trainer.estimated_stepping_batches) + 20  # a later fit may go on
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class CollectsOutputs(LightningModule):
    """State kept between steps: lists filled in steps, reduced, logged and cleared at epoch ends."""

    def __init__(self) -> None:
        super().__init__()
        self.net = deep_mlp(8, 4)
        self.training_step_outputs: list[Tensor] = []
        self.validation_step_outputs: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.training_step_outputs.append(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        epoch_average = torch.stack(self.training_step_outputs).mean()
        self.log("training_epoch_average", epoch_average)
        self.training_step_outputs.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.validation_step_outputs.append((self.net(x), y))

    def on_validation_epoch_end(self) -> None:
        logits, y = (torch.cat(parts) for parts in zip(*self.validation_step_outputs))
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_acc", (logits.argmax(1) == y).float().mean())
        self.validation_step_outputs.clear()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ReadsAfterLoss(LightningModule):
    """`.item()` and numpy after the loss, in logged values too; averages logged at the epoch's end."""

    def __init__(self) -> None:
        super().__init__()
        self.net = deep_mlp(8, 4)
        self.losses: list[float] = []
        self.correct = np.zeros(4)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        preds = logits.detach().argmax(dim=1).cpu().numpy()
        self.correct += np.bincount(preds[preds == y.cpu().numpy()], minlength=4)
        self.losses.append(loss.item())
        self.log("train_loss", loss.item())
        self.log("train_acc", float((preds == y.numpy()).mean()))
        if loss.item() > 100:
            print("diverged")
        return {"loss": loss, "preds": preds}

    def on_train_epoch_end(self) -> None:
        self.log("train_loss_mean", float(np.mean(self.losses)))
        self.log("train_correct", self.correct.sum().item())
        self.losses, self.correct = [], np.zeros(4)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y).item()
        self.log("val_loss", loss, batch_size=len(x))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class GathersReplicas(LightningModule):
    """`self.all_gather` in validation, `sync_dist=True`, `rank_zero_only=True`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = deep_mlp(8, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.net(x)
        gathered, labels = self.all_gather(logits), self.all_gather(y)
        loss = F.cross_entropy(gathered.reshape(-1, 4), labels.reshape(-1))  # type: ignore[union-attr]
        self.log("val_loss", loss, sync_dist=True)
        self.log("val_count", float(labels.numel()), reduce_fx="sum", sync_dist=True)  # type: ignore[union-attr]
        if self.trainer.is_global_zero:
            self.log("val_loss_zero", loss, rank_zero_only=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self.net(x), y), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class OwnLoaders(LightningModule):
    """The LightningModule has its own dataloaders."""

    def __init__(self) -> None:
        super().__init__()
        self.net = deep_mlp(8, 4)

    def setup(self, stage: str) -> None:
        self.data = data.shuffled_vectors()
        self.data.setup(stage)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.data.train_dataloader()

    def val_dataloader(self) -> DataLoader[Any]:
        return self.data.val_dataloader()

    def test_dataloader(self) -> DataLoader[Any]:
        return self.data.test_dataloader()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adagrad(self.parameters(), lr=0.05)


class SeveralValidationSets(LightningModule):
    """Two validation loaders with `dataloader_idx`, `LightningModule.lr_scheduler_step` overridden."""

    def __init__(self) -> None:
        super().__init__()
        self.net = deep_mlp(8, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))
        self.log(f"val_acc_{dataloader_idx}", (self.net(x).argmax(1) == y).float().mean(), add_dataloader_idx=False)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9), "interval": "step"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(epoch=self.trainer.global_step)
