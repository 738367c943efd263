"""LightningModules in which stages share parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import models


class Tied(models.LanguageModel):
    """Input and output embeddings are one matrix, as in GPT-2 and in the models of Ouroboros."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        nn.init.normal_(self.gpt.tok_emb.weight, std=0.2)
        self.gpt.head.weight = self.gpt.tok_emb.weight

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.gpt(batch)


class TiedByHand(models.Base):
    """The matrix is a Parameter of the LightningModule, and no module is called for it."""

    def __init__(self, width: int = 16, vocab: int = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.embedding = nn.Parameter(torch.randn(vocab, width) * 0.2)
        self.blocks = nn.ModuleList(models.Block(width) for _ in range(4))
        self.norm = nn.LayerNorm(width)

    def loss(self, batch: Tensor) -> Tensor:
        x = first = F.embedding(batch[:, :-1], self.embedding)
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x + first) @ self.embedding.T
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


class BiasedBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries, self.mlp = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q = self.queries(x)
        attended = ((q + bias) @ x.transpose(-1, -2)).softmax(-1) @ x
        return x + torch.tanh(self.mlp(attended))


class OneBias(models.Base):
    """One bias is given to all layers, as in Transformer-XL."""

    def __init__(self, width: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.embed = nn.Embedding(20, width)
        self.bias = nn.Parameter(torch.randn(width) * 0.1)
        self.blocks = nn.ModuleList(BiasedBlock(width) for _ in range(5))
        self.head = nn.Linear(width, 20)

    def loss(self, batch: Tensor) -> Tensor:
        x = self.embed(batch[:, :-1])
        for block in self.blocks:
            x = block(x, self.bias)
        return F.cross_entropy(self.head(x).flatten(0, 1), batch[:, 1:].flatten())


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear, self.gain = (
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.Parameter(torch.ones(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x))) * self.gain


class OneLayer(models.Base):
    """One layer is called again and again, as in ALBERT; ``others`` are between its calls."""

    def __init__(self, width: int = 16, others: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inp, self.out = nn.Linear(8, width), nn.Linear(width, 4)
        self.layer = Layer(width)
        self.others = nn.ModuleList(Layer(width) for _ in range(5)) if others else None

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        x = self.inp(x)
        for i in range(5):
            x = self.layer(x)
            if self.others is not None:
                x = self.others[i](x)
        return F.cross_entropy(self.out(x), y)


class TwoHomes(models.Base):
    """Two matrices, each on two stages: what the first stage shares with the last is not all that the last shares."""

    def __init__(self, width: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.embedding, self.between = nn.Embedding(20, width), nn.ModuleList(Layer(width) for _ in range(3))
        self.layer, self.head = Layer(width), nn.Linear(width, 20, bias=False)
        self.head.weight = self.embedding.weight

    def loss(self, batch: Tensor) -> Tensor:
        x = self.between[1](self.between[0](self.embedding(batch[:, :-1])))
        x = self.layer(self.between[2](self.layer(x)))
        return F.cross_entropy(self.head(x).flatten(0, 1), batch[:, 1:].flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class Sometimes(Tied):
    """The output side uses the matrix in some batches, and is a stranger to it in others."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.count = 0

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.gpt.tok_emb(batch[:, :-1])
        for block in self.gpt.blocks:
            hidden = block(hidden)
        logits = self.gpt.head(self.gpt.ln_f(hidden))
        if self.trainer.fit_loop.batch_idx % 3 == 1:
            logits = logits.detach() + self.gpt.ln_f(hidden).sum(-1, keepdim=True)
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


class Thaws(Tied):
    """The matrix is frozen for some batches."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.gpt.tok_emb.weight.requires_grad_(batch_idx >= 9)
