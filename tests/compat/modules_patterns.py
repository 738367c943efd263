"""Modules after patterns of models: configuration, several outputs, parameters in unusual places."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F


def deep_mlp(inputs: int, outputs: int, width: int = 10, depth: int = 5) -> nn.Sequential:
    layers = [m for i in range(depth) for m in (nn.Linear(inputs if i == 0 else width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


class ConfiguredNet(nn.Module):
    """Branches on configuration and on shapes; returns several outputs."""

    def __init__(self, inputs: int, width: int, depth: int, norm: str | None, residual: bool, dropout: float) -> None:
        super().__init__()
        self.residual = residual
        self.inp = nn.Linear(inputs, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth)) if norm == "layer" else None
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.out, self.aux = nn.Linear(width, 4), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.dim() > 2:
            x = x.flatten(1)
        h = middle = F.gelu(self.inp(x))
        for i, layer in enumerate(self.layers):
            y = layer(h if self.norms is None else self.norms[i](h))
            if self.dropout is not None:
                y = self.dropout(y)
            h = h + F.gelu(y) if self.residual else F.gelu(y)
            if i == len(self.layers) // 2:
                middle = h
        return self.out(h), self.aux(middle), h


class ConfiguredMLP(LightningModule):
    """`if` on configuration, several outputs, `example_input_array`, `save_hyperparameters`."""

    def __init__(
        self,
        width: int = 12,
        depth: int = 5,
        norm: str | None = "layer",
        residual: bool = True,
        aux_weight: float = 0.3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = ConfiguredNet(8, width, depth, norm, residual, dropout=0.0)
        self.example_input_array = torch.zeros(4, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits, aux, _ = self(x)
        loss = F.cross_entropy(logits, y)
        if self.hparams["aux_weight"] > 0:
            loss = loss + self.hparams["aux_weight"] * F.cross_entropy(aux, y)
        self.log("train_loss", loss, prog_bar=True, logger=True, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x)[0], y))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor]:
        logits, _, features = self(batch[0])
        return logits.argmax(1), features

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}


class SubmodulesInStep(LightningModule):
    """No `forward`: the step calls several submodules, with `nn.Dropout` configured to 0.0."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.encode = nn.Linear(8, 10), nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10))
        self.gate, self.norm = nn.Linear(10, 10), nn.BatchNorm1d(10)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(10, 4)
        self.loss_fn = nn.CrossEntropyLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        h = torch.relu(self.embed(x))
        h = self.drop(self.encode(h))
        h = h * torch.sigmoid(self.gate(h))
        loss = self.loss_fn(self.head(self.norm(h)), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        h = self.encode(torch.relu(self.embed(x)))
        self.log("val/loss", self.loss_fn(self.head(self.norm(h * torch.sigmoid(self.gate(h)))), y))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return [optimizer], [{"scheduler": plateau, "monitor": "val/loss", "interval": "epoch", "strict": True}]


class AutoencoderNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class EncodeDecode(LightningModule):
    """Methods of a submodule other than `__call__`: `self.model.encode(x)`, `self.model.decode(z)`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = AutoencoderNet()
        self.probe = nn.Linear(3, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        z = self.model.encode(x)
        x_hat = self.model.decode(z)
        loss = F.mse_loss(x_hat, x) + 0.5 * F.cross_entropy(self.probe(z), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, _ = batch
        self.log("val_loss", F.mse_loss(self.model(x), x))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model.encode(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class OwnParameters(LightningModule):
    """Parameters and buffers of the LightningModule itself: normalisation, class weights, temperature, bias."""

    class_weights: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = deep_mlp(8, 4)
        self.scale = nn.Parameter(torch.ones(8))
        self.log_temperature = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(4))
        self.register_buffer("mean", torch.full((8,), 0.1))
        self.register_buffer("class_weights", torch.tensor([1.0, 2.0, 1.0, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net((x - self.mean) * self.scale)
        return logits / self.log_temperature.exp() + self.bias

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y, weight=self.class_weights)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y, weight=self.class_weights))
        self.log("temperature", self.log_temperature.exp())

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).softmax(1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class WeightPenalty(LightningModule):
    """Parameters used in the loss: L1 over all weights."""

    def __init__(self, l1: float = 1e-3) -> None:
        super().__init__()
        self.l1 = l1
        self.net = deep_mlp(8, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        penalty = sum(p.abs().sum() for p in self.net.parameters())
        loss = F.cross_entropy(self.net(x), y) + self.l1 * penalty
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02)


class WeightPenaltyBehind(WeightPenalty):
    """Parameters used in the loss, behind the network: L1 over all weights."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        l1_norm = sum(p.abs().sum() for name, p in self.named_parameters() if "bias" not in name)
        self.log("train_loss", loss)
        return loss + self.l1 * l1_norm
