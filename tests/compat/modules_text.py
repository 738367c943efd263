"""Modules after text projects."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.text import Perplexity

VOCAB = 20


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width)
        self.n_head, self.n_embd = heads, width
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * k.size(-1) ** -0.5
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))  # type: ignore[index]
        return self.c_proj((F.softmax(att, dim=-1) @ v).transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        layers = {"c_fc": nn.Linear(width, 2 * width), "act": nn.GELU(), "c_proj": nn.Linear(2 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class MinGPT(LightningModule):
    """minGPT: shape-dependent code, no decay for bias and LayerNorm, warm-up in `optimizer_step`."""

    def __init__(self, vocab_size: int = VOCAB, n_layer: int = 3, n_embd: int = 12, dropout: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.block_size = 16
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(self.block_size, n_embd)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList([Block(n_embd) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.perplexity = Perplexity()

    def forward(self, idx: Tensor) -> Tensor:
        t = idx.size(1)
        assert t <= self.block_size, f"Cannot forward sequence of length {t}, block size is only {self.block_size}"
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device).unsqueeze(0)
        x = self.drop(self.wte(idx) + self.wpe(pos))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self(batch[:, :-1])
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), batch[:, 1:].reshape(-1), ignore_index=-1)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        logits = self(batch[:, :-1])
        self.perplexity.update(logits, batch[:, 1:])
        self.log("val_loss", F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
        self.log("val_ppl", self.perplexity)

    test_step = validation_step

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        idx = batch[:, :3]
        for _ in range(3):
            idx = torch.cat((idx, self(idx)[:, -1, :].argmax(dim=-1, keepdim=True)), dim=1)
        return idx

    def configure_optimizers(self) -> Any:
        param_dict = {pn: p for pn, p in self.named_parameters() if p.requires_grad}
        groups = [
            {"params": [p for p in param_dict.values() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in param_dict.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = {"fused": False} if "fused" in inspect.signature(torch.optim.AdamW).parameters else {}
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), **fused)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        if self.trainer.global_step < 10:
            lr_scale = min(1.0, float(self.trainer.global_step + 1) / 10.0)
            for pg in optimizer.param_groups:
                pg["lr"] = lr_scale * 1e-3


@dataclass
class ClassifierOutput:
    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...]


class TinyEncoder(nn.Module):
    def __init__(self, width: int = 12, layers: int = 3, num_labels: int = 2) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.embeddings = nn.Embedding(VOCAB, width)
        self.layer = nn.ModuleList(Block(width) for _ in range(layers))
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, num_labels)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> ClassifierOutput:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.embeddings(input_ids) * attention_mask.unsqueeze(-1)
        all_hidden: tuple[Tensor, ...] = (hidden,)
        for layer in self.layer:
            hidden = layer(hidden)
            all_hidden = (*all_hidden, hidden)
        logits = self.classifier(torch.tanh(self.pooler(hidden[:, 0] + hidden.mean(1))))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.view(-1, self.num_labels), labels.view(-1))
        return ClassifierOutput(loss=loss, logits=logits, hidden_states=all_hidden)


class HandWrittenOutput(LightningModule):
    """Loss computed inside the model, which returns a dataclass; outputs collected and concatenated."""

    def __init__(self, learning_rate: float = 0.05, weight_decay: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = TinyEncoder()
        self.validation_step_outputs: list[dict[str, Any]] = []

    def forward(self, **inputs: Tensor) -> ClassifierOutput:
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        outputs = self(**batch)
        self.log("train_loss", outputs.loss)
        return outputs.loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        outputs = self(**batch)
        preds = torch.argmax(outputs.logits, axis=1)  # type: ignore[call-arg]
        self.validation_step_outputs.append({"loss": outputs.loss, "preds": preds, "labels": batch["labels"]})
        return outputs.loss

    def on_validation_epoch_end(self) -> None:
        preds = torch.cat([x["preds"] for x in self.validation_step_outputs]).detach().cpu().numpy()
        labels = torch.cat([x["labels"] for x in self.validation_step_outputs]).detach().cpu().numpy()
        loss = torch.stack([x["loss"] for x in self.validation_step_outputs]).mean()
        self.log("val_loss", loss, prog_bar=True)
        self.log_dict({"acc": float((preds == labels).mean())}, prog_bar=True)
        self.validation_step_outputs.clear()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(input_ids=batch["input_ids"]).logits

    def configure_optimizers(self) -> Any:
        no_decay = ["bias", "ln_1.weight", "ln_2.weight"]
        named = list(self.model.named_parameters())
        groups = [
            {
                "params": [p for n, p in named if not any(nd in n for nd in no_decay)],
                "weight_decay": self.hparams["weight_decay"],
            },
            {"params": [p for n, p in named if any(nd in n for nd in no_decay)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(groups, lr=self.hparams["learning_rate"], momentum=0.9)
        total = int(self.trainer.estimated_stepping_batches)
        linear = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, (total - step) / total))
        return [optimizer], [{"scheduler": linear, "interval": "step", "frequency": 1}]


class HuggingFaceGPT2(LightningModule):
    """`GPT2LMHeadModel` with `model(**batch).loss`."""

    def __init__(self, tie_word_embeddings: bool = False) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=VOCAB, n_positions=16, n_embd=12, n_layer=4, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=tie_word_embeddings,
        )  # fmt: skip
        self.model = GPT2LMHeadModel(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        outputs = self.model(**batch)
        self.log("train_loss", outputs.loss, prog_bar=True)
        return outputs.loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        outputs = self.model(**batch)
        self.log("val_loss", outputs.loss)
        self.log("val_ppl", torch.exp(outputs.loss))

    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        model: Any = self.model
        return model.generate(
            batch["input_ids"][:, :4], attention_mask=batch["attention_mask"][:, :4], max_new_tokens=3, do_sample=False
        )

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class TiedGPT2(HuggingFaceGPT2):
    """`GPT2LMHeadModel` with `tie_word_embeddings=True`."""

    def __init__(self) -> None:
        super().__init__(tie_word_embeddings=True)


class TiedT5(LightningModule):
    """`T5ForConditionalGeneration`, whose encoder, decoder and output share one matrix."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(
            vocab_size=VOCAB, d_model=12, d_kv=6, d_ff=24, num_layers=3, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        self.model = T5ForConditionalGeneration(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class HuggingFaceBert(LightningModule):
    """`BertForSequenceClassification` as in Lightning's examples: `outputs[0]`, linear schedule with warm-up."""

    def __init__(self, warmup_steps: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(  # type: ignore[call-arg]
            vocab_size=VOCAB, max_position_embeddings=16, hidden_size=12, intermediate_size=16, num_hidden_layers=4,
            num_attention_heads=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2,
            pad_token_id=0,
        )  # fmt: skip
        self.model = BertForSequenceClassification(config)
        self.outputs: dict[int, list[Any]] = {0: []}

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        outputs = self(**batch)
        loss = outputs[0]
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        val_loss, logits = self(**batch)[:2]
        self.outputs[dataloader_idx].append((val_loss.item(), logits.argmax(1).cpu().numpy(), batch["labels"].numpy()))

    def on_validation_epoch_end(self) -> None:
        losses, preds, labels = zip(*self.outputs[0])
        self.log("val_loss", sum(losses) / len(losses))
        correct = [int((p == y).sum()) for p, y in zip(preds, labels)]
        self.log("val_acc", sum(correct) / sum(len(y) for y in labels))
        self.outputs[0].clear()

    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def configure_optimizers(self) -> Any:
        from transformers import get_linear_schedule_with_warmup

        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        scheduler = get_linear_schedule_with_warmup(
            optimizer,
            num_warmup_steps=self.hparams["warmup_steps"],
            num_training_steps=int(self.trainer.estimated_stepping_batches),
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 1}]


class MaskedLM(LightningModule):
    """BERT pre-training: mask drawn in the step, loss on the masked positions alone."""

    def __init__(self, width: int = 12, probability: float = 0.3, deterministic: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Embedding(VOCAB, width)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.1)
        layer = {"d_model": width, "nhead": 2, "dim_feedforward": 16, "dropout": 0.0}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(**layer, batch_first=True, norm_first=True)  # type: ignore[arg-type]
            for _ in range(3)
        )
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, VOCAB))

    def mask(self, ids: Tensor, batch_idx: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(batch_idx) if self.hparams["deterministic"] else None
        probabilities = torch.full(ids.shape, self.hparams["probability"])
        masked = torch.bernoulli(probabilities, generator=generator).bool().to(ids.device)
        masked[:, 0] = True
        labels = ids.clone()
        labels[~masked] = -100
        return ids.masked_fill(masked, 2), labels

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position[:, : ids.size(1)]
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def shared(self, batch: Tensor, batch_idx: int, name: str) -> Tensor:
        ids, labels = self.mask(batch, batch_idx)
        loss = F.cross_entropy(self(ids).transpose(1, 2), labels)
        self.log(name, loss, batch_size=batch.shape[0])
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.shared(batch, batch_idx, "train_loss")

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.shared(batch, batch_idx, "val_loss")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)]
