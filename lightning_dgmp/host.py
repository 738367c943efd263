"""The Lightning of the project: ``lightning.pytorch``, or ``pytorch_lightning`` if that alone is imported.

Both are the same code under two names, but their classes are not the same. All of this package takes Lightning from
here.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

__all__ = [
    "BasePredictionWriter",
    "BitsandbytesPrecision",
    "Callback",
    "DDPStrategy",
    "DeepSpeedPrecision",
    "DummyLogger",
    "FSDPPrecision",
    "LightningModule",
    "MisconfigurationException",
    "MixedPrecision",
    "ModelCheckpoint",
    "OnExceptionCheckpoint",
    "SIGTERMException",
    "StrategyRegistry",
    "TensorBoardLogger",
    "Timer",
    "TorchCheckpointIO",
    "Trainer",
    "TrainerFn",
    "TransformerEnginePrecision",
    "_EvaluationLoop",
    "_FitLoop",
    "_Loop",
    "_PredictionLoop",
    "_StrategyRegistry",
    "_TrainingEpochLoop",
    "call",
    "callbacks",
    "default_pg_timeout",
    "is_overridden",
    "is_param_in_hook_signature",
    "rank_zero_info",
    "rank_zero_warn",
    "sized_len",
    "subprocess_script",
]

_IS_STANDALONE = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules

if TYPE_CHECKING or not _IS_STANDALONE:
    from lightning.fabric.plugins import TorchCheckpointIO
    from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
    from lightning.fabric.strategies.registry import _StrategyRegistry
    from lightning.fabric.utilities.data import sized_len
    from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
    from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint, OnExceptionCheckpoint, Timer
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
    from lightning.pytorch.loops.fit_loop import _FitLoop
    from lightning.pytorch.loops.loop import _Loop
    from lightning.pytorch.loops.prediction_loop import _PredictionLoop
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
    from lightning.pytorch.plugins import (
        BitsandbytesPrecision,
        DeepSpeedPrecision,
        FSDPPrecision,
        MixedPrecision,
        TransformerEnginePrecision,
    )
    from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
    from lightning.pytorch.strategies.launchers import subprocess_script
    from lightning.pytorch.trainer import call
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
    from lightning.pytorch.utilities.model_helpers import is_overridden
    from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
else:
    from lightning_fabric.plugins import TorchCheckpointIO
    from lightning_fabric.plugins.collectives.torch_collective import default_pg_timeout
    from lightning_fabric.strategies.registry import _StrategyRegistry
    from lightning_fabric.utilities.data import sized_len
    from pytorch_lightning import Callback, LightningModule, Trainer, callbacks
    from pytorch_lightning.callbacks import BasePredictionWriter, ModelCheckpoint, OnExceptionCheckpoint, Timer
    from pytorch_lightning.loggers import TensorBoardLogger
    from pytorch_lightning.loggers.logger import DummyLogger
    from pytorch_lightning.loops.evaluation_loop import _EvaluationLoop
    from pytorch_lightning.loops.fit_loop import _FitLoop
    from pytorch_lightning.loops.loop import _Loop
    from pytorch_lightning.loops.prediction_loop import _PredictionLoop
    from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
    from pytorch_lightning.plugins import (
        BitsandbytesPrecision,
        DeepSpeedPrecision,
        FSDPPrecision,
        MixedPrecision,
        TransformerEnginePrecision,
    )
    from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry
    from pytorch_lightning.strategies.launchers import subprocess_script
    from pytorch_lightning.trainer import call
    from pytorch_lightning.trainer.states import TrainerFn
    from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
    from pytorch_lightning.utilities.model_helpers import is_overridden
    from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
    from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
