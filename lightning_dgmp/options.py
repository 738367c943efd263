"""The arguments of the strategy that say how to train, and what of them does not go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from lightning_dgmp.remedies import Remedies
from lightning_dgmp.stage.runner import BackwardMode

__all__ = ["Options", "Tied"]

Tied = Literal["aligned", "ouroboros"]


@dataclass(frozen=True)
class Options:
    """See :class:`~lightning_dgmp.strategy.DelayedMPStrategy`.

    Raises:
        TypeError: If one has another type.
        ValueError: If one is none of its values, or if two do not go together.
    """

    virtual: bool = False
    split_at: Sequence[str] | None = None
    backward: BackwardMode = "stash"
    tied: Tied = "aligned"
    message_dtype: torch.dtype | None = None
    remedies: Remedies = field(default_factory=Remedies)
    slack: int = 0
    balance: Literal["flops", "measured"] = "flops"
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        names = self.split_at or ()
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
            raise TypeError(f"`split_at` must be a list of names of modules, but is {self.split_at!r}.")
        if self.backward not in ("stash", "recompute", "replay"):
            raise ValueError(f"`backward` must be 'stash', 'recompute' or 'replay', but is {self.backward!r}.")
        if self.tied not in ("aligned", "ouroboros"):
            raise ValueError(f"`tied` must be 'aligned' or 'ouroboros', but is {self.tied!r}.")
        if self.tied == "ouroboros" and not self.virtual:
            raise ValueError(
                "`tied='ouroboros'` makes the first stage and the last wait for each other in every batch, so it needs"
                " `virtual=True`. Use `tied='aligned'` for processes."
            )
        if self.message_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"`message_dtype` must be float32, bfloat16, float16 or None, but is {self.message_dtype}."
            )
        if self.virtual and self.message_dtype is not None:
            raise ValueError("`virtual=True` sends no messages, so `message_dtype` must be None.")
        if isinstance(self.slack, bool) or not isinstance(self.slack, int) or self.slack < 0:
            raise ValueError(f"`slack` must be an integer of at least 0, but is {self.slack!r}.")
        if self.balance not in ("flops", "measured"):
            raise ValueError(f"`balance` must be 'flops' or 'measured', but is {self.balance!r}.")
        if self.balance == "measured" and (self.virtual or self.split_at is not None):
            other = "`virtual=True` has no stages to measure" if self.virtual else "`split_at` says where to cut"
            raise ValueError(f"`balance='measured'` moves cuts by measured times, but {other}. Leave one of them out.")
        limit = self.memory_limit
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
            raise TypeError(f"`memory_limit` must be an integer, of bytes, but is {limit!r}. For 20 GB: `20 * 10**9`.")
        if limit is not None and limit < 1:
            raise ValueError(f"`memory_limit` must be at least 1 byte, but is {limit}. For no limit leave it out.")
        if limit is not None and self.virtual:
            raise ValueError(
                "`memory_limit` is for processes that hold one stage each, but `virtual=True` holds all in one. Leave"
                " one of them out."
            )
        if self.remedies.predict_weights and (self.backward == "replay" or self.tied == "ouroboros"):
            other = "backward='replay'" if self.backward == "replay" else "tied='ouroboros'"
            raise ValueError(
                f"`predict_weights=True` gives a batch one version of the weights, but `{other}` uses several. Use one"
                " of them."
            )
