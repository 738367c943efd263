"""Small LightningModules, written as users write them: nothing of this project is in them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
import torch.utils.checkpoint
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset


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


class ValidatedMLP(MLP):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class Block(nn.Module):
    """A pre-norm Transformer block."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        # Without bias: the gradient of the keys' bias is zero but for rounding, which Adam blows up to whole steps.
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = (part.view(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(self.ln_1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(b, t, w))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """As minGPT: a Parameter of the container is read in its forward."""

    def __init__(self, layers: int, width: int, vocab: int, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(vocab, width)
        self.pos_emb = nn.Parameter(torch.randn(1, 32, width) * 0.1)
        self.drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(block(width) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.drop(self.tok_emb(idx) + self.pos_emb[:, : idx.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


class LanguageModel(Base):
    def __init__(self, layers: int = 4, width: int = 16, vocab: int = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gpt = GPT(layers, width, vocab)

    def loss(self, batch: Tensor) -> Tensor:
        logits = self.gpt(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


class TupleBlock(Block):
    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, total = inputs
        x = super().forward(x)
        return x, total + x.mean(dim=-1, keepdim=True)


class TupleModel(Base):
    """Blocks that take and return tuples."""

    def __init__(self, layers: int = 4, width: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.embed = nn.Embedding(20, width)
        self.blocks = nn.Sequential(*(TupleBlock(width) for _ in range(layers)))
        self.head = nn.Linear(width, 20)

    def loss(self, batch: Tensor) -> Tensor:
        x = self.embed(batch[:, :-1])
        x, total = self.blocks((x, x.new_zeros(*x.shape[:2], 1)))
        return F.cross_entropy(self.head(x).flatten(0, 1), batch[:, 1:].flatten()) + total.square().mean()


class ResidualBlock(nn.Module):
    """The input is changed in place before anything else: right after a cut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv_1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_1 = nn.BatchNorm2d(channels)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        y = self.relu(self.norm_1(self.conv_1(x)))
        y = self.norm_2(self.conv_2(y))
        y += x
        return y


class ResidualNet(Base):
    def __init__(self, channels: int = 4, blocks: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(blocks))
        self.head = nn.Linear(channels, 4)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(F.relu(x, inplace=True).mean(dim=(2, 3))), y)


class DoubleConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(2, outputs), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(inplace=True),
        )  # fmt: skip


class UNet(Base):
    """Long skips: the first stage's results are needed on the last."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.down_1, self.down_2, self.down_3 = DoubleConv(1, 4), DoubleConv(4, 8), DoubleConv(8, 16)
        self.up_2 = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.conv_2 = DoubleConv(16, 8)
        self.up_1 = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.conv_1 = DoubleConv(8, 4)
        self.out = nn.Conv2d(4, 1, 1)

    def loss(self, batch: Any) -> Tensor:
        x, _ = batch
        a = self.down_1(x)
        b = self.down_2(F.max_pool2d(a, 2))
        c = self.down_3(F.max_pool2d(b, 2))
        y = self.conv_2(torch.cat([self.up_2(c), b], dim=1))
        y = self.conv_1(torch.cat([self.up_1(y), a], dim=1))
        return F.mse_loss(self.out(y), x)


class DemoTransformer(Base):
    """Lightning's own: one embedding for source and target, the encoder's memory in every decoder layer."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        from lightning.pytorch.demos.transformer import Transformer

        self.model = Transformer(vocab_size=20, ninp=16, nhead=2, nhid=16, nlayers=2, dropout=0.0)

    def loss(self, batch: Tensor) -> Tensor:
        source, target = batch[:, :-1], batch[:, 1:]
        output = self.model(source, target)
        return F.nll_loss(output, target.reshape(-1))


class Contrastive(Base):
    """Two views through one network."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.projector = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))

    def loss(self, batch: Any) -> Tensor:
        x, _ = batch
        one, two = (self.projector(self.encoder(view)) for view in (x + 0.1, x * 0.9))
        logits = F.normalize(one, dim=-1) @ F.normalize(two, dim=-1).T / 0.5
        return F.cross_entropy(logits, torch.arange(len(x), device=x.device))


class HuggingFace(Base):
    """A language model of transformers, by its configuration: "gpt2", "llama" or "bert"."""

    def __init__(self, kind: str = "gpt2", tied: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        import transformers as hf

        common: dict[str, Any] = {"vocab_size": 20, "tie_word_embeddings": tied}
        ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        if kind == "gpt2":
            dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            self.model = hf.GPT2LMHeadModel(
                hf.GPT2Config(n_positions=32, n_embd=16, n_layer=4, n_head=2, **dropout, **common, **ends)
            )
        elif kind == "llama":
            sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
            heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
            self.model = hf.LlamaForCausalLM(
                hf.LlamaConfig(max_position_embeddings=32, **sizes, **heads, **common, **ends)
            )
        else:
            sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
            dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            self.model = hf.BertForMaskedLM(
                hf.BertConfig(max_position_embeddings=32, **sizes, **dropout, **common, **ends)
            )
        self.model.train()

    def loss(self, batch: Tensor) -> Tensor:
        mask = torch.ones_like(batch)
        mask[:, -2:] = 0
        return self.model(input_ids=batch, attention_mask=mask, labels=batch).loss


# ----- data


def vectors(size: int = 8 * 33 + 4, batch_size: int = 8) -> DataLoader:
    """Batches of (8 numbers, a class); the last is short."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(size, 8, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum(dim=1) > 0).long() + 2 * (x[:, 0] > 0).long()), batch_size=batch_size)


def images(size: int = 4 * 33 + 2) -> DataLoader:
    """Batches of (1 x 8 x 8 image, a class); the last is short."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(size, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, (x.mean(dim=(1, 2, 3)) > 0).long()), batch_size=4)


class _Ragged(Dataset[Tensor]):
    def __init__(self, num_batches: int) -> None:
        generator = torch.Generator().manual_seed(5)
        sizes = [(4, 9), (4, 12), (2, 9), (5, 7)]
        shapes = [sizes[i * i % 4] for i in range(num_batches - 1)] + [(1, 6)]
        self.items = [torch.randint(0, 20, shape, generator=generator) for shape in shapes]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tensor:
        return self.items[index]


def ragged_tokens(num_batches: int = 34) -> DataLoader:
    """Batches of token ids whose size and length change from one to the next."""
    return DataLoader(_Ragged(num_batches), batch_size=None)


class Storage(MutableMapping[str, Any]):
    def __init__(self, parent: Graph, items: dict[str, Any]) -> None:
        self.parent, self.items_by_name = weakref.ref(parent), items

    def __getitem__(self, key: str) -> Any:
        return self.items_by_name[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.items_by_name[key] = value

    def __delitem__(self, key: str) -> None:
        del self.items_by_name[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_by_name)

    def __len__(self) -> int:
        return len(self.items_by_name)

    def __copy__(self) -> Storage:
        other: Storage = object.__new__(Storage)
        other.__dict__.update(vars(self), items_by_name=copy.copy(self.items_by_name))
        return other


class Graph:
    """Keeps its attributes as those of PyTorch Geometric do, in a mapping that knows its owner."""

    def __init__(self, **items: Any) -> None:
        self.__dict__["store"] = Storage(self, items)

    def __getattr__(self, name: str) -> Any:
        if name == "store" or name not in self.store:
            raise AttributeError(name)
        return self.store[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self.store[name] = value

    def __reduce__(self) -> Any:
        return _graph, (dict(self.store),)


def _graph(items: dict[str, Any]) -> Graph:
    return Graph(**items)


def collate_graphs(samples: list[Any]) -> Graph:
    x, y = torch.utils.data.default_collate(samples)
    return Graph(x=x, y=y, names=["a"] * len(y))


def graphs() -> DataLoader:
    """:func:`vectors` in objects."""
    return DataLoader(vectors().dataset, batch_size=8, collate_fn=collate_graphs)
