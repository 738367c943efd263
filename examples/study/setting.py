"""What tells one run from another."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["Setting"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A run: the model, what the strategy and the optimizer are told, and for how long.

    Attributes:
        model: ``"transformer"`` or ``"transformer-xl"``.
        layers: Its blocks.
        width: Its width; MLPs are twice as wide.
        tied: Whether embedding and head are one matrix.
        stages: Virtual stages; 1: plain Lightning.
        optimizer: See :func:`study.optimizers.make_optimizer`.
        microbatches: Batches of one update. They are so much smaller that an update sees the same tokens.
        predict_weights: See :class:`lightning_dgmp.DelayedMPStrategy`, as for the next four.
        lr_discount_steps: ...
        correct_updates: ...
        synchronous_steps: ...
        tied_rule: Its argument ``tied``.
        tied_lr_factor: By what the learning rate is multiplied for a tied matrix.
        embedding_scale: By what embedded tokens are multiplied, beside the square root of the width.
        updates: The length of training, and of the cosine of the learning rate.
        rows: Rows of 64 characters of an update.
        lr: The learning rate after the warm-up.
        seed: Of the weights and of the order of the data.
    """

    model: str = "transformer"
    layers: int = 8
    width: int = 48
    tied: bool = False
    stages: int = 1
    optimizer: str = "adamw"
    microbatches: int = 1
    predict_weights: bool = False
    lr_discount_steps: int = 0
    correct_updates: bool = False
    synchronous_steps: int = 0
    tied_rule: str = "aligned"
    tied_lr_factor: float = 1.0
    embedding_scale: float = 1.0
    updates: int = 1500
    rows: int = 16
    lr: float = 2e-3
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """All attributes, as they stand in a row of the results."""
        return asdict(self)

    def __str__(self) -> str:
        """What differs from the defaults, and the learning rate."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return ", ".join(
            f"{f.name}={given[f.name]}" for f in fields(self) if given[f.name] != f.default or f.name == "lr"
        )
