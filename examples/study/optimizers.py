"""The three optimizers of the study, each for a whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from paper.language_model import LanguageModel
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from lightning_dgmp.optim import RotatedAdamW

__all__ = ["OPTIMIZERS", "MuonAndAdamW", "make_optimizer"]

OPTIMIZERS = ("adamw", "nadamw", "muon", "rotated")


class MuonAndAdamW(Optimizer):
    """Muon for hidden matrices and AdamW for all other parameters, as one optimizer, which is what a strategy takes.

    The groups and the state are those of both, so schedulers and the remedies see an ordinary optimizer.

    Args:
        groups: Parameters; those with ``momentum`` are Muon's.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        muons = [group for group in self.param_groups if "momentum" in group]
        adams = [group for group in self.param_groups if "momentum" not in group]
        # The parts take the same group dictionaries, so a scheduler that changes a rate here changes it there.
        self._parts = [Muon(muons, adjust_lr_fn="match_rms_adamw"), AdamW(adams)]
        for part in self._parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


def make_optimizer(name: str, model: LanguageModel, lr: float, tied_lr_factor: float = 1.0) -> Optimizer:
    """The optimizer ``name`` for ``model``, without weight decay.

    Args:
        name: ``"adamw"``; ``"nadamw"``: AdamW with Nesterov's momentum of 0.99 (Ajanthan et al., ICML 2025);
            ``"muon"`` or ``"rotated"``: one of these for the matrices of the blocks and AdamW for the rest.
        model: The model.
        lr: The learning rate of all groups; Muon's is scaled to updates as large as AdamW's.
        tied_lr_factor: By what it is multiplied for a matrix that is both embedding and head.
    """
    hidden = [p for p in model.blocks.parameters() if p.dim() == 2]
    shared = [model.embedding.weight] if model.embedding.weight is model.head.weight else []
    special = {id(p) for p in (*hidden, *shared)}
    others = [p for p in model.parameters() if id(p) not in special]
    common = {"lr": lr, "weight_decay": 0.0}
    groups = [_group(hidden, **common), _group(others, **common)]
    if shared:
        groups.append(_group(shared, **{**common, "lr": lr * tied_lr_factor}))
    if name == "adamw":
        return AdamW(groups, fused=True)
    if name == "nadamw":  # a fixed momentum: the default schedule discounts gradients all through a short run
        return torch.optim.NAdam(groups, betas=(0.99, 0.999), momentum_decay=0.0, decoupled_weight_decay=True)
    if name == "muon":
        groups[0]["momentum"] = 0.95
        return MuonAndAdamW(groups)
    if name == "rotated":
        for group in groups[1:]:
            group["rotate"] = False
        return RotatedAdamW(groups)
    raise ValueError(f"`optimizer` must be one of {', '.join(OPTIMIZERS)}, but is {name!r}.")


def _group(parameters: list[nn.Parameter], **options: Any) -> dict[str, Any]:
    return {"params": parameters, **options}
