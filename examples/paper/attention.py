"""Causal self-attention: the plain one, and that of Transformer-XL with relative positions and a memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CausalAttention", "RelativeAttention", "relative_shift", "sinusoids"]


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Encode positions ``(time,)`` as ``(time, width)``: sines, then cosines, of wavelengths from 2 pi to 20,000 pi.

    In float32, whatever the default type is: bfloat16 has no whole numbers of more than 8 bits.
    """
    frequencies = 10_000.0 ** -(torch.arange(0, width, 2, dtype=torch.float, device=positions.device) / width)
    angles = positions[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def relative_shift(scores: Tensor) -> Tensor:
    """Turn scores by distance into scores by key (appendix B of arXiv 1901.02860).

    Column ``c`` of ``scores`` ``(..., queries, keys)`` belongs to the distance ``keys - 1 - c``. The row of query ``i``
    must move left by ``queries - 1 - i``, so that column ``j`` belongs to key ``j``. One column in front of all makes
    every row one longer; read with the old length, each row begins one further to the left than the row below it. What
    comes in at the right are keys of the future, whose values mean nothing.
    """
    queries, keys = scores.shape[-2:]
    padded = F.pad(scores, (1, 0)).flatten(-2)
    return padded[..., queries:].unflatten(-1, (queries, keys))


class CausalAttention(nn.Module):
    """Attention of ``heads`` heads from each position to itself and those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, time, width)`` to the same shape."""
        q, k, v = (_split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(attended.transpose(1, 2).flatten(2))


class RelativeAttention(nn.Module):
    """Attention with relative positions to a segment and to the memory of those before it (arXiv 1901.02860, eq. 3).

    The score of a query ``q`` for the key ``k`` at the distance ``d`` is ``(q + u) k + (q + v) W r_d``, where ``r_d``
    encodes ``d``.

    The memory is kept here and nowhere else, so that it lives on the stage of a pipeline that owns the layer: the
    inputs of the last ``memory_length`` positions. Training has one memory and evaluation another, so training goes on
    after a validation as if there had been none. Row ``i`` of a batch must continue row ``i`` of the one before; a
    batch of another size has other rows, and begins with an empty memory.

    Args:
        width: Channels of the input and the output; a multiple of ``heads``.
        heads: Attention heads.
        memory_length: The most positions that are remembered; 0: none.
        dropout: Of the encoded distances.

    Attributes:
        u: What all queries add for the content of keys, ``(heads, width / heads)``.
        v: What all queries add for the distance of keys, ``(heads, width / heads)``.
        memory: ``(batch, up to memory_length, width)`` by ``self.training``, or ``None`` if it is empty. A plain
            attribute: DDP copies buffers from one replica to the others, which have streams of their own.
    """

    def __init__(self, width: int, heads: int, memory_length: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.memory_length = heads, memory_length
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.distance = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.u = nn.Parameter(torch.zeros(heads, width // heads))
        self.v = nn.Parameter(torch.zeros(heads, width // heads))
        self.drop = nn.Dropout(dropout)
        self.memory: dict[bool, Tensor | None] = {True: None, False: None}

    def forward(self, x: Tensor) -> Tensor:
        """The segments ``(batch, time, width)`` that follow the memory, to the same shape."""
        context = self._remember(x)
        (queries, width), keys = x.shape[1:], context.shape[1]
        q = _split_heads(self.query(x), self.heads)
        k, v = (_split_heads(part, self.heads) for part in self.key_value(context).chunk(2, -1))
        distances = sinusoids(torch.arange(keys - 1, -1, -1, device=x.device), width).to(x.dtype)
        r = _split_heads(self.distance(self.drop(distances[None])), self.heads)

        scale = (width // self.heads) ** -0.5
        by_distance = relative_shift((q + self.v[:, None]) * scale @ r.transpose(-1, -2))
        future = torch.ones(queries, keys, dtype=torch.bool, device=x.device).triu(1 + keys - queries)
        by_distance = by_distance.masked_fill(future, float("-inf"))
        attended = F.scaled_dot_product_attention(q + self.u[:, None], k, v, attn_mask=by_distance, scale=scale)
        return self.proj(attended.transpose(1, 2).flatten(2))

    def _remember(self, x: Tensor) -> Tensor:
        """The memory and ``x``, one after the other; their end is the memory from now on."""
        memory = self.memory[self.training]
        if memory is None or len(memory) != len(x):
            memory = x[:, :0]
        context = torch.cat([memory, x], dim=1)
        first = max(0, context.shape[1] - self.memory_length)
        self.memory[self.training] = context[:, first:].detach().clone()  # a view would keep all of the context alive
        return context


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """``(batch, time, width)`` to ``(batch, heads, time, width / heads)``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
