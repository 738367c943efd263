"""LightningModules that make their networks in ``configure_model``, as users write them."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import models

__all__ = ["LateGPT", "LateMLP", "LateNorm"]


class _Late(models.Base):
    """``make`` gives the network."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"optimizer": "adamw", **kwargs})
        self.net: nn.Module | None = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.make()

    def make(self) -> nn.Module:
        raise NotImplementedError

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])  # type: ignore[misc]


class LateMLP(_Late):
    def __init__(self, depth: int = 4, width: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.depth, self.width = depth, width
        self.example_input_array = torch.zeros(2, 8)

    def make(self) -> nn.Module:
        width = self.width
        hidden = [layer for _ in range(self.depth) for layer in (nn.Linear(width, width), nn.Tanh())]
        return nn.Sequential(nn.Linear(8, width), nn.Tanh(), *hidden, nn.Linear(width, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[misc, no-any-return]

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)


class LateNorm(LateMLP):
    """Running statistics, reads of values in the constructor, a head that is there before, and a hidden teacher."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head = nn.Linear(4, 4)
        self.teachers: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x)) + self.teachers[0](x).detach()  # type: ignore[no-any-return]

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])  # type: ignore[no-any-return]

    def make(self) -> nn.Module:
        layers: list[nn.Module] = [nn.Linear(8, 16)]
        for rate in torch.linspace(0, 0.1, self.depth).tolist():
            layers += [nn.Linear(16, 16), nn.BatchNorm1d(16, momentum=0.1 + rate), nn.ReLU()]
        layers += [copy.deepcopy(layers[1]), nn.Linear(16, 4)]
        net = nn.Sequential(*layers)
        self.teachers = [nn.Linear(8, 4)]
        for module in net.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.2)
        return net


class TiedGPT(models.GPT):
    """As GPT-2: one function for all modules, tied embeddings, scaled initialisation of some parameters by name."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers, 16, 20)
        self.apply(self._init)
        self.head.weight = self.tok_emb.weight
        for name, parameter in self.named_parameters():
            if name.endswith("proj.weight"):
                nn.init.normal_(parameter, mean=0.0, std=0.1 / math.sqrt(2 * layers))

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=0.1)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.zero_()


class LateGPT(_Late):
    def make(self) -> nn.Module:
        return TiedGPT(4)

    def loss(self, batch: Tensor) -> Tensor:
        logits = self.net(batch[:, :-1])  # type: ignore[misc]
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
