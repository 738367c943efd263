"""Modules after structured data: tables, graphs, ratings, typed batches, several tasks."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, MeanSquaredError, MetricCollection, R2Score
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC

from tests.compat.data import GraphBatch, Measurement, Sample


class MultiTask(LightningModule):
    """Two heads, a dict of losses, `log_dict`, learned uncertainty weights."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.shared = nn.Sequential(*(m for i in range(4) for m in (nn.Linear(width if i else 8, width), nn.SiLU())))
        self.heads = nn.ModuleDict({"label": nn.Linear(width, 4), "sum": nn.Linear(width, 1)})
        self.log_vars = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.shared(x)
        return {name: head(features) for name, head in self.heads.items()}

    def losses(self, batch: Any) -> dict[str, Tensor]:
        x, y = batch
        out = self(x)
        losses = {"label": F.cross_entropy(out["label"], y), "sum": F.mse_loss(out["sum"], x.sum(1, keepdim=True))}
        weighted = [loss * torch.exp(-v) + v for loss, v in zip(losses.values(), self.log_vars)]
        return {**losses, "loss": torch.stack(weighted).sum()}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        losses = self.losses(batch)
        self.log_dict({f"train/{k}": v for k, v in losses.items()}, on_step=True, on_epoch=True)
        return losses

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        losses = self.losses(batch)
        self.log_dict({f"val/{k}": v for k, v in losses.items()})
        return losses

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({f"test/{k}": v for k, v in self.losses(batch).items()})

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        groups: list[dict[str, Any]] = [
            {"params": self.shared.parameters()},
            {"params": self.heads.parameters(), "lr": 0.02},
            {"params": [self.log_vars], "lr": 0.001},
        ]
        return torch.optim.SGD(groups, lr=0.01, momentum=0.9)


class GraphConvolution(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ (x @ self.weight) + self.bias


class GraphNetwork(LightningModule):
    """Graph network: adjacency matrix products, dict batch, modules with bare Parameters."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.convs = nn.ModuleList(GraphConvolution(width if i else 5, width) for i in range(4))
        self.readout = nn.Linear(width, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        adjacency = batch["adjacency"] + torch.eye(batch["adjacency"].size(-1), device=self.device)
        degree = adjacency.sum(-1).rsqrt()
        adjacency = degree.unsqueeze(-1) * adjacency * degree.unsqueeze(-2)
        x = batch["x"]
        for conv in self.convs:
            x = F.elu(conv(x, adjacency))
        return self.readout(x.mean(dim=1))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self(batch)
        loss = F.cross_entropy(logits, batch["y"])
        self.log("train_loss", loss, batch_size=batch["y"].size(0))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch), batch["y"]), batch_size=batch["y"].size(0))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch), batch["y"]), batch_size=batch["y"].size(0))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"prediction": self(batch).argmax(-1), "target": batch["y"]}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=5e-3, weight_decay=5e-4)


class NodeEncoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, width)

    def forward(self, batch: GraphBatch) -> GraphBatch:
        batch.x = self.embedding(batch.x)
        return batch


class GraphLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.own, self.neighbours, self.norm = nn.Linear(width, width), nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, batch: GraphBatch) -> GraphBatch:
        source, target = batch.edge_index
        sums = torch.zeros_like(batch.x).index_add_(0, target, batch.x[source])
        batch.x = batch.x + F.relu(self.norm(self.neighbours(sums) + self.own(batch.x)))
        return batch


class GraphHead(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, 1)

    def forward(self, batch: GraphBatch) -> tuple[Tensor, Tensor]:
        sums = batch.x.new_zeros(batch.num_graphs, batch.x.size(1)).index_add_(0, batch.batch, batch.x)
        return self.out(sums).squeeze(-1), batch.y


class GraphGym(LightningModule):
    """As GraphGym: every module takes the batch, an object, sets its activations in it, and returns it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        layers = nn.Sequential(*(GraphLayer(width) for _ in range(4)))
        self.model = nn.ModuleDict({"encoder": NodeEncoder(width), "layers": layers, "head": GraphHead(width)})
        self.mae = MeanAbsoluteError()

    def forward(self, batch: Any) -> Any:
        for module in self.model.children():
            batch = module(batch)
        return batch

    def shared_step(self, batch: GraphBatch, split: str) -> dict[str, Tensor]:
        batch.y = (batch.y - 2) / 2
        prediction, true = self(batch)
        loss = F.l1_loss(prediction, true)
        self.log(f"{split}_loss", loss, batch_size=batch.num_graphs, on_epoch=True)
        return {"loss": loss, "true": true, "prediction": prediction.detach()}

    def training_step(self, batch: GraphBatch, *args: Any) -> dict[str, Tensor]:
        return self.shared_step(batch, "train")

    def validation_step(self, batch: GraphBatch, *args: Any) -> dict[str, Tensor]:
        outputs = self.shared_step(batch, "val")
        self.mae(outputs["prediction"], outputs["true"])
        self.log("val_mae", self.mae, batch_size=batch.num_graphs)
        return outputs

    test_step = validation_step

    def predict_step(self, batch: GraphBatch, batch_idx: int) -> Tensor:
        return self(batch)[0]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]


class DataclassBatch(LightningModule):
    """A dataclass batch with weights for the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.out = nn.Linear(8, 4)

    def forward(self, batch: Sample) -> Tensor:
        x = batch.features
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.out(x)

    def loss(self, batch: Sample) -> Tensor:
        return (F.cross_entropy(self(batch), batch.label, reduction="none") * batch.weight).mean()

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, batch_size=len(batch.label))
        return loss

    def validation_step(self, batch: Sample, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch.label))

    test_step = validation_step

    def predict_step(self, batch: Sample, batch_idx: int) -> Tensor:
        return self(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        lambdas = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.7**epoch)
        return {"optimizer": optimizer, "lr_scheduler": lambdas}


class NamedTupleBatch(LightningModule):
    """A named tuple batch, a regression with `MeanSquaredError` and `R2Score`, a chain of schedulers."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.model = nn.Sequential(*(m for i in range(4) for m in (nn.Linear(width if i else 8, width), nn.ELU())))
        self.out = nn.Linear(width, 1)
        self.metrics = MetricCollection({"mse": MeanSquaredError(), "r2": R2Score()}, prefix="val/")

    def forward(self, batch: Measurement) -> Tensor:
        return self.out(self.model(batch.features))

    def training_step(self, batch: Measurement, batch_idx: int) -> Tensor:
        loss = F.huber_loss(self(batch), batch.target)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Measurement, batch_idx: int) -> None:
        prediction = self(batch)
        self.metrics.update(prediction, batch.target)
        self.log_dict(self.metrics)  # type: ignore[arg-type]
        self.log("val/loss", F.huber_loss(prediction, batch.target), on_epoch=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[5])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class TabularNet(LightningModule):
    """Table with several embeddings, concatenated with BatchNorm of the numbers; AUROC."""

    def __init__(self, cardinalities: tuple[int, ...] = (5, 5, 5), num_numeric: int = 4, width: int = 12) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embeddings = nn.ModuleList(nn.Embedding(n, min(4, (n + 1) // 2)) for n in cardinalities)
        self.norm = nn.BatchNorm1d(num_numeric)
        size = sum(e.embedding_dim for e in self.embeddings) + num_numeric  # type: ignore[misc]
        self.layers = nn.Sequential(
            nn.Linear(size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.head = nn.Linear(width, 1)
        self.auroc, self.accuracy = BinaryAUROC(), BinaryAccuracy()

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        embedded = [embedding(categories[:, i]) for i, embedding in enumerate(self.embeddings)]
        x = torch.cat([*embedded, self.norm(numbers)], dim=1)
        return self.head(self.layers(x)).squeeze(-1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        y = batch.pop("label")
        loss = F.binary_cross_entropy_with_logits(self(**batch), y)
        self.log("train_loss", loss, batch_size=len(y))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits, y = self(batch["categories"], batch["numbers"]), batch["label"]
        self.auroc.update(logits.sigmoid(), y.long())
        self.accuracy(logits, y)
        self.log("val_auroc", self.auroc, on_epoch=True, on_step=False)
        self.log("val_accuracy", self.accuracy)
        self.log("val_loss", F.binary_cross_entropy_with_logits(logits, y))

    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(batch["categories"], batch["numbers"]).sigmoid()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class MatrixFactorization(LightningModule):
    """Recommender: products of embeddings with biases, and an MLP on top (NeuMF)."""

    def __init__(self, users: int = 10, items: int = 15, width: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.user_factors, self.item_factors = nn.Embedding(users, width), nn.Embedding(items, width)
        self.user_bias, self.item_bias = nn.Embedding(users, 1), nn.Embedding(items, 1)
        self.mlp = nn.Sequential(nn.Linear(2 * width, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU())
        self.output = nn.Linear(8 + width, 1)
        self.global_mean = nn.Parameter(torch.tensor(3.0), requires_grad=False)
        for embedding in (self.user_bias, self.item_bias):
            nn.init.zeros_(embedding.weight)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        u, i = self.user_factors(user), self.item_factors(item)
        deep = self.mlp(torch.cat([u, i], dim=-1))
        score = self.output(torch.cat([deep, u * i], dim=-1))
        return (score + self.user_bias(user) + self.item_bias(item)).squeeze(-1) + self.global_mean

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        user, item, rating = batch
        loss = F.mse_loss(self(user, item), rating)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        user, item, rating = batch
        self.log("val_rmse", F.mse_loss(self(user, item), rating).sqrt())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        user, item, rating = batch
        self.log("test_rmse", F.mse_loss(self(user, item), rating).sqrt())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0], batch[1]).clamp(1, 5)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)
