"""One run: a model trained by the strategy, and its bits per character on the way."""

from __future__ import annotations

import logging
import math
import platform
import re
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from paper.corpus import Corpus, read_corpus
from paper.data import StreamSegments, TextData
from paper.language_model import LanguageModel, Transformer, TransformerXL
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

import lightning_dgmp
from lightning_dgmp import DelayedMPStrategy
from study.optimizers import make_optimizer
from study.setting import Setting

__all__ = ["LENGTH", "train"]

LENGTH = 64  # characters of a row, and of Transformer-XL's memory
_NUM_POINTS = 25  # of a curve
_NUM_STREAMS, _STREAM_SEGMENTS = 16, 16  # of the validation text that curves are measured on: 16,384 characters


class _WithOptimizer(LanguageModel):
    """Lets the setting choose the optimizer."""

    setting: Setting

    def configure_optimizers(self) -> Any:
        setting = self.setting
        optimizer: Optimizer = make_optimizer(setting.optimizer, self, setting.lr, setting.tied_lr_factor)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """As in the model, without logging."""
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


class _Transformer(_WithOptimizer, Transformer): ...


class _TransformerXL(_WithOptimizer, TransformerXL): ...


class Curve(Callback):
    """Measures the bits per character on the same part of the validation text every so many updates.

    Not by Lightning's validation, before which a pipeline is flushed: training must not depend on how often it is
    measured. What is measured are the newest weights of all stages.

    Args:
        text: The validation text.
        every: Updates between two points.

    Attributes:
        values: The points.
    """

    def __init__(self, text: bytes, every: int) -> None:
        part = len(text) // _NUM_STREAMS
        segments = min(_STREAM_SEGMENTS, (part - 1) // LENGTH)
        streams = b"".join(text[i * part :][: segments * LENGTH + 1] for i in range(_NUM_STREAMS))
        whole = StreamSegments(streams, _NUM_STREAMS, LENGTH)
        items = torch.stack([whole[i] for i in range(segments * _NUM_STREAMS)])
        self._batches = items.view(segments, _NUM_STREAMS, LENGTH + 1)
        self.every, self._last = every, 0
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, if an update is done and it is time."""
        step = trainer.global_step
        if step == self._last or step % self.every:
            return
        self._last = step
        self.values.append(self.measure(pl_module))
        if not math.isfinite(self.values[-1]):
            trainer.should_stop = True

    @torch.no_grad()
    def measure(self, model: LightningModule) -> float:
        """Bits per character now."""
        model.eval()
        if isinstance(model, TransformerXL):
            model.reset_memory(training=False)
        losses = [F.cross_entropy(model(b[:, :-1]).flatten(0, 1), b[:, 1:].flatten()) for b in self._batches]
        model.train()
        return torch.stack(losses).mean().item() / math.log(2)


def train(setting: Setting, data: Path) -> dict[str, Any]:
    """Run ``setting`` on the text ``data``.

    Returns:
        A row of the results: the settings, the curve and what it took.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    corpus = read_corpus(data)
    seed_everything(setting.seed, verbose=False)
    model = _make_model(setting)
    curve = Curve(corpus.validation, max(1, setting.updates // _NUM_POINTS))
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=_make_strategy(setting),
        max_epochs=-1,
        max_steps=setting.updates,
        accumulate_grad_batches=setting.microbatches,
        limit_val_batches=0,
        callbacks=[curve],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    begin = time.perf_counter()
    trainer.fit(model, _make_data(setting, corpus))
    seconds = time.perf_counter() - begin
    if trainer.global_step < setting.updates and all(map(math.isfinite, curve.values)):
        raise RuntimeError(f"The run ended after {trainer.global_step} of {setting.updates} updates: {setting}")
    return {
        **setting.as_dict(),
        "every": curve.every,
        "bpc": _rounded(curve.values),
        "final": _rounded(curve.values[-1:])[0],
        "tokens_per_update": setting.rows * LENGTH,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 1),
        "text": _name_of(corpus),
        "versions": {
            "lightning_dgmp": lightning_dgmp.__version__,
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
    }


def _make_model(setting: Setting) -> LanguageModel:
    arguments: dict[str, Any] = {
        "layers": setting.layers, "width": setting.width, "heads": setting.width // 16, "inner": 2 * setting.width,
        "dropout": 0.0, "tied": setting.tied, "pre_norm": True, "lr": setting.lr,
        "warmup_steps": setting.updates // 20, "steps": setting.updates,
    }  # fmt: skip
    if setting.model == "transformer":
        model: _WithOptimizer = _Transformer(**arguments)
    else:
        model = _TransformerXL(**arguments, memory_length=LENGTH)
    model.setting = setting
    if setting.embedding_scale != 1:  # what is added to the tokens, such as their positions, stays as it is
        model.embedding.register_forward_hook(lambda module, args, output: output * setting.embedding_scale)
    return model


def _make_strategy(setting: Setting) -> DelayedMPStrategy | str:
    if setting.stages == 1:
        return "auto"
    return DelayedMPStrategy(
        num_stages=setting.stages,
        virtual=True,
        tied=setting.tied_rule,  # type: ignore[arg-type]
        predict_weights=setting.predict_weights,
        lr_discount_steps=setting.lr_discount_steps,
        correct_updates=setting.correct_updates,
        synchronous_steps=setting.synchronous_steps,
    )


def _make_data(setting: Setting, corpus: Corpus) -> TextData:
    data = TextData(corpus, batch_size=setting.rows // setting.microbatches, length=LENGTH, seed=setting.seed)
    if setting.model == "transformer":
        data.num_crops = setting.updates * setting.rows
    return data


def _name_of(corpus: Corpus) -> str:
    """The text in short; a part of a published one must not be taken for it."""
    if not (prefix := re.match(r"a prefix of (\w+) ", corpus.remark)):
        return corpus.remark
    size = len(corpus.train) + len(corpus.validation) + len(corpus.test)
    return f"{prefix[1]}, first {size / 1e6:.2f} MB, split 90/5/5"


def _rounded(values: Sequence[float]) -> list[float | None]:
    """JSON has no number for what has diverged."""
    return [round(value, 4) if math.isfinite(value) else None for value in values]
