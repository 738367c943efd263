"""All compat modules with their data, and what is expected of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from tests.compat import data
from tests.compat import modules_generative as generative
from tests.compat import modules_hooks as hooks
from tests.compat import modules_patterns as patterns
from tests.compat import modules_refused as refused
from tests.compat import modules_sequences as sequences
from tests.compat import modules_structures as structures
from tests.compat import modules_text as text
from tests.compat import modules_vision as vision

__all__ = ["ACCEPTED", "CASES", "REFUSED", "Case"]

SGD = 1e-5
ADAM = 1e-4  # the first steps of Adam kinds depend on a gradient's sign alone


@dataclass(frozen=True)
class Case:
    """A module, and what is known of it.

    Attributes:
        module: Makes it.
        data: Makes its data; ``None`` if it has its own.
        monitor: The name of the metric by which the best checkpoint is chosen.
        arguments: For ``module``; functions are called to make a new one each time.
        tolerance: Relative to the largest value of a tensor.
        refusal: What the message must match if it is refused.
        may_work: Whether it may work although it has a ``refusal``, or be refused although it has none.
    """

    module: type[LightningModule]
    data: Callable[[], LightningDataModule] | None
    monitor: str = "val_loss"
    arguments: dict[str, Callable[[], Any]] = field(default_factory=dict)
    tolerance: float = SGD
    refusal: str | None = None
    may_work: bool = False

    @property
    def pattern(self) -> str:
        """What the module is an example of."""
        return (self.module.__doc__ or "").strip().rstrip(".")

    @property
    def is_complete(self) -> bool:
        """Whether it has all steps that Lightning calls, so that its story has everything in it."""
        return all(
            is_overridden(f"{name}_step", self.module, LightningModule) for name in ("validation", "test", "predict")
        )

    def make(self) -> LightningModule:
        """A new module."""
        return self.module(**{name: make() for name, make in self.arguments.items()})


def _deterministic() -> dict[str, Callable[[], Any]]:
    return {"deterministic": lambda: True}


def _hydra(compile: bool) -> dict[str, Callable[[], Any]]:
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    return {
        "net": vision.ResNet,
        "optimizer": lambda: partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=0.01),
        "scheduler": lambda: partial(plateau, mode="min", factor=0.1, patience=0),
        "compile": lambda: compile,
    }


ACCEPTED = {
    "ResNetClassifier": Case(vision.ResNetClassifier, data.shuffled_images, "val/loss"),
    "HydraTemplate": Case(vision.HydraTemplate, data.images, "val/acc", _hydra(False)),
    "HydraTemplateCompiled": Case(vision.HydraTemplate, data.images, "val/acc", _hydra(True), may_work=True),
    "UNetSegmentation": Case(vision.UNetSegmentation, data.masks, "val/loss", tolerance=ADAM),
    "ConvAutoencoder": Case(vision.ConvAutoencoder, data.images, tolerance=ADAM),
    "FrozenBackbone": Case(vision.FrozenBackbone, data.images),
    "HalfFrozen": Case(vision.HalfFrozen, data.shuffled_images),
    "Distillation": Case(vision.Distillation, data.images, "val/loss"),
    "VAE": Case(generative.VAE, data.images, "val_loss", _deterministic(), ADAM),
    "Diffusion": Case(generative.Diffusion, data.images, "val/loss", _deterministic(), ADAM),
    "SimCLR": Case(generative.SimCLR, data.views),
    "Siamese": Case(generative.Siamese, data.pairs),
    "SimSiam": Case(generative.SimSiam, data.views, "val_loss_ssl"),
    "CLIP": Case(generative.CLIP, data.captions),
    "MinGPT": Case(text.MinGPT, data.tokens, tolerance=ADAM),
    "HandWrittenOutput": Case(text.HandWrittenOutput, data.sentences),
    "HuggingFaceGPT2": Case(text.HuggingFaceGPT2, data.encodings),
    "TiedGPT2": Case(text.TiedGPT2, data.encodings),
    "TiedT5": Case(text.TiedT5, data.encodings),
    "HuggingFaceBert": Case(text.HuggingFaceBert, data.sentences),
    "MaskedLM": Case(text.MaskedLM, data.tokens, "val_loss", _deterministic()),
    "Seq2Seq": Case(sequences.Seq2Seq, data.translations),
    "PaddedEncoder": Case(sequences.PaddedEncoder, data.ragged),
    "LSTMForecaster": Case(sequences.LSTMForecaster, data.series, tolerance=ADAM),
    # Packing reads its input, so what is behind it belongs to one stage.
    "PackedGRU": Case(sequences.PackedGRU, data.ragged, tolerance=ADAM, may_work=True),
    "ConfiguredMLP": Case(patterns.ConfiguredMLP, data.vectors, tolerance=ADAM),
    "SubmodulesInStep": Case(patterns.SubmodulesInStep, data.vectors, "val/loss"),
    "EncodeDecode": Case(patterns.EncodeDecode, data.vectors),
    "MetricsCollections": Case(hooks.MetricsCollections, data.vectors),
    "AsksTrainer": Case(hooks.AsksTrainer, data.vectors, "val/loss"),
    "OwnParameters": Case(patterns.OwnParameters, data.vectors),
    "CollectsOutputs": Case(hooks.CollectsOutputs, data.vectors),
    "ReadsAfterLoss": Case(hooks.ReadsAfterLoss, data.vectors),
    "GathersReplicas": Case(hooks.GathersReplicas, data.vectors),
    "OwnLoaders": Case(hooks.OwnLoaders, None, tolerance=ADAM),
    "SeveralValidationSets": Case(
        hooks.SeveralValidationSets, data.vectors_two_validation_sets, "val_loss/dataloader_idx_0"
    ),
    "MultiTask": Case(structures.MultiTask, data.vectors, "val/loss"),
    "GraphNetwork": Case(structures.GraphNetwork, data.graphs, tolerance=ADAM),
    "GraphGym": Case(structures.GraphGym, data.molecules, tolerance=ADAM),
    "DataclassBatch": Case(structures.DataclassBatch, data.samples),
    "NamedTupleBatch": Case(structures.NamedTupleBatch, data.measurements, "val/loss"),
    "TabularNet": Case(structures.TabularNet, data.table_rows),
    "MatrixFactorization": Case(structures.MatrixFactorization, data.ratings, "val_rmse", tolerance=ADAM),
}

REFUSED = {
    "GAN": Case(refused.GAN, data.vectors, refusal="needs automatic optimization"),
    "SeveralOptimizers": Case(refused.SeveralOptimizers, data.vectors, refusal="needs a single optimizer"),
    "ManualOptimization": Case(refused.ManualOptimization, data.vectors, refusal="needs automatic optimization"),
    "LBFGS": Case(refused.SecondOrder, data.vectors, refusal="evaluates each batch once"),
    "SkipsSteps": Case(refused.SkipsSteps, data.vectors, refusal="must return a loss on every batch"),
    "GradientPenalty": Case(refused.GradientPenalty, data.vectors, refusal=r"autograd\.grad"),
    "WeightPenalty": Case(patterns.WeightPenalty, data.vectors, refusal="a result of `abs` in `the step` would cross"),
    "WeightPenaltyBehind": Case(
        patterns.WeightPenaltyBehind, data.vectors, refusal="a result of `abs` in `the step` would cross"
    ),
    "MeanTeacher": Case(
        refused.MeanTeacher, data.vectors, refusal="of parameters of its own stage alone", may_work=True
    ),
}

CASES = ACCEPTED | REFUSED
