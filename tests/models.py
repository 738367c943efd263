"""Small LightningModules, written as users write them: nothing of this project is in them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

__all__: list[str] = []


class Base(LightningModule):
    """``network`` and ``loss`` are the subclass's; ``optimizer`` is "sgd", "momentum" or "adamw"."""

    def __init__(self, optimizer: str = "sgd", lr: float = 0.05) -> None:
        super().__init__()
        self.optimizer_name, self.lr = optimizer, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        if self.optimizer_name == "adamw":
            decay = [p for p in self.parameters() if p.dim() >= 2]
            rest = [p for p in self.parameters() if p.dim() < 2]
            groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=self.lr * 0.02)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        momentum = 0.9 if self.optimizer_name == "momentum" else 0.0
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=momentum)


class MLP(Base):
    def __init__(self, depth: int = 4, width: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inp = nn.Linear(8, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        for layer in self.hidden:
            x = torch.tanh(layer(x))
        return self.out(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)
