"""The two byte-level language models of the Ouroboros paper (arXiv 1909.06695): Transformer and Transformer-XL.

Both are made of the layers of the code of Transformer-XL (Dai et al., arXiv 1901.02860), whose settings for enwik8 the
paper takes over and which are the defaults here; the Trainer has one more of them, ``gradient_clip_val=0.25``. Tokens
are bytes: the 256 logits are few enough for one softmax, and no vocabulary is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from paper.attention import CausalAttention, RelativeAttention, sinusoids
from paper.metric import BitsPerCharacter

__all__ = ["Block", "LanguageModel", "Transformer", "TransformerXL"]


class Block(nn.Module):
    """A layer: attention, then an MLP, each added to its input.

    Args:
        attention: Of ``(batch, time, width)`` to the same shape.
        width: Channels of the input and the output.
        inner: Channels inside of the MLP.
        dropout: Of what is added, and inside of the MLP.
        pre_norm: Whether the inputs of attention and MLP are normalised, in place of the sums.
    """

    def __init__(self, attention: nn.Module, width: int, inner: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.attention, self.drop = attention, nn.Dropout(dropout)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, inner), nn.ReLU(), nn.Dropout(dropout), nn.Linear(inner, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, time, width)`` to the same shape."""
        if self.pre_norm:
            x = x + self.drop(self.attention(self.norm_1(x)))
            return x + self.mlp(self.norm_2(x))
        x = self.norm_1(x + self.drop(self.attention(x)))
        return self.norm_2(x + self.mlp(x))


class LanguageModel(LightningModule):
    """What both models are, apart from their attention.

    Args:
        attention: Makes the attention of a layer.
        layers: Number of blocks.
        width: Channels of each block's input and output; a multiple of ``heads``, and even.
        heads: Attention heads of each block.
        inner: Channels inside of each block's MLP.
        dropout: Of embeddings, of what attention and MLP add, and of what the head reads; attention itself has none.
        tied: Whether the embedding and the head are one Parameter.
        pre_norm: Whether blocks normalise their inputs in place of their sums. The paper's do not; it bears higher
            learning rates.
        lr: Adam's learning rate after the warm-up.
        warmup_steps: Updates during which the learning rate rises linearly.
        steps: The length of training in updates; the learning rate falls to 0 as a cosine over all of them.
    """

    def __init__(
        self,
        attention: Callable[[], nn.Module],
        layers: int,
        width: int,
        heads: int,
        inner: int,
        dropout: float,
        tied: bool,
        pre_norm: bool,
        lr: float,
        warmup_steps: int,
        steps: int,
    ) -> None:
        super().__init__()
        if width % heads or width % 2:
            raise ValueError(
                f"`width` must be even and a multiple of `heads`, but is {width} with {heads} heads: change one."
            )
        self.lr, self.warmup_steps, self.steps = lr, warmup_steps, steps
        self.embedding = nn.Embedding(256, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(attention(), width, inner, dropout, pre_norm) for _ in range(layers))
        self.norm = nn.LayerNorm(width) if pre_norm else nn.Identity()
        self.head = nn.Linear(width, 256)
        for parameter in self.parameters():
            if parameter.dim() >= 2:  # 0.02 at the paper's width; a narrower sum has fewer terms
                nn.init.normal_(parameter, std=0.02 * math.sqrt(512 / width))
        nn.init.zeros_(self.head.bias)
        if tied:
            self.head.weight = self.embedding.weight
        self.val_bpc, self.test_bpc = BitsPerCharacter(), BitsPerCharacter()

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``(batch, time)`` to the logits ``(batch, time, 256)`` of the bytes that follow."""
        x = self.drop(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(self.norm(x)))

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens ``(batch, time)`` to ``(batch, time, width)``."""
        # The head needs small weights and the blocks inputs of about 1; where both are one matrix, this serves both.
        return self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """``batch``: bytes ``(batch, time + 1)``, each predicted from those before it. Returns the loss in nats."""
        logits = self(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.log("train/bpc", loss / math.log(2), prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """``batch`` as in training."""
        self.val_bpc.update(self(batch[:, :-1]), batch[:, 1:])
        self.log("val/bpc", self.val_bpc, prog_bar=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """``batch`` as in training."""
        self.test_bpc.update(self(batch[:, :-1]), batch[:, 1:])
        self.log("test/bpc", self.test_bpc)

    def configure_optimizers(self) -> Any:
        """Adam without weight decay."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, betas=(0.9, 0.999), eps=1e-8)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_factor(self, step: int) -> float:
        """By what ``lr`` is multiplied after ``step`` updates."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return warmup * (1 + math.cos(math.pi * min(1.0, step / self.steps))) / 2


class Transformer(LanguageModel):
    """The 12-layer Transformer: sinusoidal positions are added to the embeddings, and segments know nothing of others.

    Args: see :class:`LanguageModel`.
    """

    def __init__(
        self,
        *,
        layers: int = 12,
        width: int = 512,
        heads: int = 8,
        inner: int = 2048,
        dropout: float = 0.1,
        tied: bool = True,
        pre_norm: bool = False,
        lr: float = 2.5e-4,
        warmup_steps: int = 4_000,
        steps: int = 400_000,
    ) -> None:
        super().__init__(
            lambda: CausalAttention(width, heads),
            layers, width, heads, inner, dropout, tied, pre_norm, lr, warmup_steps, steps,
        )  # fmt: skip
        self.save_hyperparameters()

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens ``(batch, time)`` to ``(batch, time, width)``, with their positions."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = super().embed(tokens)
        return x + sinusoids(positions, x.shape[-1]).to(x.dtype)


class TransformerXL(LanguageModel):
    """The 12-layer Transformer-XL: relative positions, and in every layer a memory of the segments before.

    Needs batches of which row ``i`` continues row ``i`` of the batch before; :class:`paper.data.TextData` makes them.
    Memories are empty at the beginning of an epoch and of a run that goes on from a checkpoint.

    Args:
        memory_length: The most positions that each layer remembers.
        share_biases: Whether ``u`` and ``v`` are one Parameter each for all layers, as in the authors' code with
            ``untie_r=False``.
        kwargs: see :class:`LanguageModel`.
    """

    def __init__(
        self,
        *,
        layers: int = 12,
        width: int = 512,
        heads: int = 8,
        inner: int = 2048,
        memory_length: int = 512,
        dropout: float = 0.1,
        tied: bool = True,
        share_biases: bool = False,
        pre_norm: bool = False,
        lr: float = 2.5e-4,
        warmup_steps: int = 4_000,
        steps: int = 400_000,
    ) -> None:
        super().__init__(
            lambda: RelativeAttention(width, heads, memory_length, dropout),
            layers, width, heads, inner, dropout, tied, pre_norm, lr, warmup_steps, steps,
        )  # fmt: skip
        self.save_hyperparameters()
        if share_biases:
            first, *others = self.attentions()
            for attention in others:
                attention.u, attention.v = first.u, first.v

    def attentions(self) -> list[RelativeAttention]:
        """The attention of each block."""
        return [module for module in self.modules() if isinstance(module, RelativeAttention)]

    def reset_memory(self, training: bool) -> None:
        """Forget all segments of training, or all of evaluation."""
        for attention in self.attentions():
            attention.memory[training] = None

    def on_train_epoch_start(self) -> None:
        """The text begins anew."""
        self.reset_memory(training=True)

    def on_validation_epoch_start(self) -> None:
        """Another text begins, or has ended: its memory may be on a device that the model leaves."""
        self.reset_memory(training=False)

    on_train_end = on_train_epoch_start
    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_start
