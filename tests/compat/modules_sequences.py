"""Modules after sequence projects: sequence to sequence, forecasting, recurrent networks."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

VOCAB = 20


class Seq2Seq(LightningModule):
    """Encoder and decoder: every decoder layer attends to the encoder's memory; teacher forcing."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(VOCAB, width), nn.Embedding(VOCAB, width)
        options: dict[str, Any] = {"nhead": 2, "dim_feedforward": 16, "dropout": 0.0, "batch_first": True}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, **options), num_layers=2, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(width, **options), num_layers=2)
        self.generator = nn.Linear(width, VOCAB)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.encoder(self.source(source))
        mask = nn.Transformer.generate_square_subsequent_mask(target.size(1), device=target.device)
        return self.generator(self.decoder(self.target(target), memory, tgt_mask=mask))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        source, target = batch
        loss = F.cross_entropy(self(source, target[:, :-1]).transpose(1, 2), target[:, 1:])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        source, target = batch
        logits = self(source, target[:, :-1])
        self.log("val_loss", F.cross_entropy(logits.transpose(1, 2), target[:, 1:]))
        self.log("val_token_acc", (logits.argmax(-1) == target[:, 1:]).float().mean())

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        source, _ = batch
        memory = self.encoder(self.source(source))
        out = torch.ones(source.size(0), 1, dtype=torch.long, device=self.device)
        for _ in range(3):
            logits = self.generator(self.decoder(self.target(out), memory))
            out = torch.cat([out, logits[:, -1:].argmax(-1)], dim=1)
        return out

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class PaddedEncoder(LightningModule):
    """`nn.TransformerEncoder` with `src_key_padding_mask`, which makes nested tensors in evaluation."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width, padding_idx=0)
        layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=4, norm=nn.LayerNorm(width))
        self.out = nn.Linear(width, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(self.embedding(ids), src_key_padding_mask=ids == 0)

    def loss(self, batch: Any) -> Tensor:
        ids, _, label = batch
        logits = self.out(self(ids).mean(dim=1)).squeeze(1)  # over the padding too
        return F.binary_cross_entropy_with_logits(logits, label.float())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class LSTMForecaster(LightningModule):
    """Time series: stacked LSTMs with their states, forecast from the last step."""

    def __init__(self, hidden: int = 8, horizon: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.input = nn.Linear(1, hidden)
        self.lstms = nn.ModuleList([nn.LSTM(hidden, hidden, batch_first=True) for _ in range(3)])
        self.output = nn.Linear(hidden, horizon)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.input(x))
        for lstm in self.lstms:
            x, (h_n, _) = lstm(x)
        return self.output(x[:, -1] + h_n[-1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self(x), y)
        self.log("train_loss", loss)
        self.log("train_rmse", loss.sqrt().item(), on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.mse_loss(self(x), y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_mae", F.l1_loss(self(x), y))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.get("lr", 3e-3))


class PackedGRU(LightningModule):
    """Sentence classifier with `pack_padded_sequence`; the length changes from batch to batch."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width, padding_idx=0)
        self.mix = nn.Linear(width, width)
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.dense, self.out = nn.Linear(2 * width, width), nn.Linear(width, 1)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = torch.relu(self.mix(self.embedding(ids)))
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        unpacked, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        pooled = unpacked.sum(dim=1) / lengths.unsqueeze(1)
        return self.out(torch.relu(self.dense(pooled))).squeeze(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, lengths, label = batch
        loss = F.binary_cross_entropy_with_logits(self(ids, lengths), label.float())
        self.log("train_loss", loss, batch_size=len(label))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        ids, lengths, label = batch
        loss = F.binary_cross_entropy_with_logits(self(ids, lengths), label.float())
        self.log("val_loss", loss, batch_size=len(label))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=3e-3)
