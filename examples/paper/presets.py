"""Named sizes of both models and of their batches."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

__all__ = ["PRESETS", "Preset"]

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Preset(NamedTuple):
    """What differs from the defaults, which are the paper's.

    Attributes:
        model: Arguments of :class:`paper.language_model.Transformer` and :class:`paper.language_model.TransformerXL`.
        memory: Arguments of the latter alone.
        data: Arguments of :class:`paper.data.TextData`.
    """

    model: Mapping[str, Any] = _NOTHING
    memory: Mapping[str, Any] = _NOTHING
    data: Mapping[str, Any] = _NOTHING


PRESETS = {
    "paper": Preset(),
    "small": Preset(  # 12 layers, 2 million parameters: the paper's depth on a few cores
        {"width": 128, "heads": 4, "inner": 384, "lr": 1e-3, "warmup_steps": 200, "steps": 10_000},
        {"memory_length": 128},
        {"batch_size": 16, "length": 128},
    ),
    "tiny": Preset(  # 8 layers, 0.6 million parameters (Transformer-XL: 0.7): minutes on a laptop
        {"layers": 8, "width": 96, "heads": 4, "inner": 192, "dropout": 0.0, "lr": 1e-3, "warmup_steps": 100,
         "steps": 2_000},
        {"memory_length": 64},
        {"batch_size": 16, "length": 64},
    ),
}  # fmt: skip
