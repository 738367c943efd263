"""Bits per character: what a language model needs on average to tell the next one."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

__all__ = ["BitsPerCharacter"]


class BitsPerCharacter(Metric):
    """The mean cross entropy in bits of all characters since the last reset, however they came in batches.

    Every character counts alike, so batches of different sizes weigh as much as they hold. Sums are in float64: in
    float32 the terms of a test set of millions of characters would be rounded away.

    Example:
        >>> bits_per_character = BitsPerCharacter()
        >>> bits_per_character.update(torch.zeros(2, 3, 256), torch.zeros(2, 3, dtype=torch.long))
        >>> bits_per_character.compute()
        tensor(8., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    nats: Tensor
    num_characters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_characters", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, target: Tensor | int) -> None:
        """Count a batch, by its logits or by its loss.

        Args:
            predicted: Logits ``(..., vocabulary)``; or a mean loss in nats, as ``F.cross_entropy`` returns it.
            target: The characters ``(...)`` that came; or, with a mean loss, how many characters it is the mean of.
        """
        if isinstance(target, int):
            self.nats += predicted.detach().double() * target
            self.num_characters += target
        else:
            losses = F.cross_entropy(predicted.detach().flatten(0, -2).float(), target.flatten(), reduction="none")
            self.nats += losses.double().sum()
            self.num_characters += target.numel()

    def compute(self) -> Tensor:
        """Bits per character, a float64 scalar; NaN if there were none."""
        return self.nats / self.num_characters / math.log(2)
