"""Train a language model of the Ouroboros paper, Transformer or Transformer-XL, with or without its delays.

    python examples/ouroboros.py                                      # a tiny Transformer, plain Lightning
    python examples/ouroboros.py --model transformer-xl               # with a memory of the segment before
    python examples/ouroboros.py --stages 4 --virtual                 # the delays of 4 stages, on one device
    python examples/ouroboros.py --stages 2                           # 2 stages on two processes
    python examples/ouroboros.py --preset paper --data enwik8.zip     # 12 layers of width 512: days on one GPU

On the screen: which text it is and how it was split, with several stages the plan, Lightning's progress bar with the
bits per character of the newest batch and, ten times on the way, of the beginning of the validation text, and at the
end one line with those of the test text. The curves are in TensorBoard. ``tiny`` begins at 8 bits, what guessing costs,
and ends near 2.2 on the default text, the sources of Python's standard library, after some minutes on one core.
"""

from __future__ import annotations

import logging
import os
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from char_lm import positive, python_library
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from paper.corpus import read_corpus, split_text
from paper.data import TextData
from paper.language_model import Transformer, TransformerXL
from paper.presets import PRESETS

from lightning_dgmp import DelayedMPStrategy


def parse_arguments(argv: Sequence[str] | None = None) -> Namespace:
    """The flags that ``--help`` lists."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=("transformer", "transformer-xl"), default="transformer", help="(default transformer)")
    add("--preset", choices=tuple(PRESETS), default="tiny", help="sizes of the model and its batches (default tiny)")
    add("--stages", type=positive, default=1, help="stages of the pipeline; 1: plain training (default 1)")
    add("--virtual", action="store_true", help="all stages on one device, with the delays of as many devices")
    add("--tied", action="store_true", default=True, help="embedding and head are one matrix (default)")
    add("--untied", action="store_false", dest="tied", help="embedding and head are two matrices")
    add("--data", type=Path, help="enwik8, text8 or any text, plain, .gz or .zip (default: Python's standard library)")
    add("--steps", type=positive, help="updates, over which the learning rate decays (default: the preset's)")
    add("--lr", type=float, help="the learning rate after the warm-up (default: the preset's)")
    add("--seed", type=int, default=0, help="of the weights and the batches (default 0)")
    add("--accelerator", default="auto", help="as in Lightning's Trainer: auto, cpu, gpu (default auto)")
    return parser.parse_args(argv)


def make_model(args: Namespace) -> LightningModule:
    """The model that the command line describes."""
    preset = PRESETS[args.preset]
    given = {name: value for name in ("steps", "lr") if (value := getattr(args, name)) is not None}
    arguments: dict[str, Any] = {**preset.model, **given, "tied": args.tied}
    if args.model == "transformer":
        return Transformer(**arguments)
    return TransformerXL(**arguments, **preset.memory)


def make_data(args: Namespace, steps: int) -> TextData:
    """The text that the command line names, in order for a model with a memory and at random for one without."""
    if args.data is None:
        corpus = split_text(python_library(limit=4_000_000), "the beginning of Python's standard library")
    else:
        corpus = read_corpus(args.data)
    data = TextData(corpus, **PRESETS[args.preset].data, seed=args.seed)
    if args.model == "transformer":
        data.num_crops = steps * data.batch_size
    return data


def main(argv: Sequence[str] | None = None) -> None:
    """Train and test as the command line says."""
    args = parse_arguments(argv)
    seed_everything(args.seed, verbose=False)
    warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec)")  # says nothing about this example
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda line: "Tip:" not in line.getMessage())
    devices = 1 if args.virtual else args.stages
    if devices > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    model = make_model(args)
    try:
        data = make_data(args, model.steps)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error

    strategy: Any = "auto"
    if args.stages > 1:
        strategy = DelayedMPStrategy(num_stages=args.stages, virtual=args.virtual)
    name = f"{args.model}-{args.preset}-{args.stages}{'-virtual' if args.virtual else ''}-stages"
    trainer = Trainer(
        accelerator=args.accelerator,
        devices=devices,
        strategy=strategy,
        max_epochs=-1,
        max_steps=model.steps,
        gradient_clip_val=0.25,
        val_check_interval=max(1, model.steps // 10),
        check_val_every_n_epoch=None,  # in batches of the whole training, however many epochs that is
        limit_val_batches=100,
        logger=TensorBoardLogger("lightning_logs", name=name, default_hp_metric=False),
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    if trainer.is_global_zero:
        print(f"The text is {data.corpus.remark}.")
    trainer.fit(model, data)
    (result,) = trainer.test(model, data, verbose=False)
    if trainer.is_global_zero:
        print(
            f"\nBits per character of the test text: {result['test/bpc']:.3f} on {data.corpus.remark}."
            f" The curves are in {trainer.loggers[0].log_dir}: tensorboard --logdir lightning_logs"
        )


if __name__ == "__main__":
    main()
