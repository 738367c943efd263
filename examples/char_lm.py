"""Train a 12-layer byte-level Transformer over two processes: an ordinary LightningModule, and one word in main().

    python examples/char_lm.py                          # a pipeline of 2 stages, one on each of two processes
    python examples/char_lm.py --stages 1               # plain Lightning on one process, to compare with
    python examples/char_lm.py --stages 4 --virtual     # what would 4 stages do to the loss? on one device
    python examples/char_lm.py --data enwik8.zip        # any text, plain, .gz or .zip, in place of Python's own library

On the screen: the plan (which modules each stage holds, what they cost and what travels between them), then Lightning's
progress bar with the bits per character of the newest batch, and at the end one line that says how far they fell and
how to see the curve in TensorBoard. They begin at 8, what guessing costs, and end near 3. That takes about two minutes
on two free cores, and nearly twice as long with ``--stages 1`` on one of them.
"""

from __future__ import annotations

import gzip
import logging
import math
import os
import sysconfig
import warnings
import zipfile
import zlib
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_dgmp import DelayedMPStrategy

# ----- the model


class Block(nn.Module):
    """A pre-norm decoder block: causal self-attention of ``heads`` heads, then an MLP, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"`width` must be a multiple of `heads`, but {heads} does not divide {width}: change one.")
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, time, width)`` to the same shape."""
        heads = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class CharLM(LightningModule):
    """A byte-level language model in the shape of GPT-2.

    Args:
        layers: Number of blocks.
        width: Channels of each block's input and output; a multiple of ``heads``.
        heads: Attention heads of each block.
        context: The longest sequence, in bytes.
        lr: The learning rate after the warm-up.
        steps: The length of training, over which the learning rate decays.
    """

    def __init__(
        self, layers: int = 12, width: int = 128, heads: int = 4, context: int = 64, lr: float = 2e-3, steps: int = 800
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tok_emb = nn.Embedding(256, width)
        self.pos_emb = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                # The 2 * layers additions to the residual stream begin small, so that their sum is of its size (GPT-2).
                residual = name.endswith(("proj.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=width**-0.5 / (math.sqrt(2 * layers) if residual else 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``(batch, time)`` to the logits ``(batch, time, 256)`` of the bytes that follow."""
        x = self.tok_emb(tokens) + self.pos_emb[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """``batch``: bytes ``(batch, context + 1)``, each predicted from those before it."""
        logits = self(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.log("train/bpc", loss / math.log(2), prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW that decays matrices only, and a learning rate that warms up linearly and decays as a cosine."""
        groups = [
            {"params": [p for p in self.parameters() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in self.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["lr"], betas=(0.9, 0.95))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        progress = (step + 1) / self.hparams["steps"]
        return min(1.0, 10 * progress) * (0.55 + 0.45 * math.cos(math.pi * min(1.0, progress)))


# ----- the data


class TextCrops(Dataset[Tensor]):
    """Random crops of ``text``, of ``context + 1`` bytes: inputs, and shifted by one the targets.

    Item ``i`` is always the same crop for the same ``seed``, so all processes see the same batches.
    """

    def __init__(self, text: bytes, context: int, num_crops: int, seed: int = 0) -> None:
        if len(text) <= context:
            raise ValueError(
                f"The text must be longer than the context of {context} bytes, but has {len(text)} bytes:"
                " take a longer text (`--data`) or a smaller `--context`."
            )
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.context = context
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(len(text) - context, (num_crops,), generator=generator)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        start = int(self.starts[index])
        return self.text[start : start + self.context + 1].long()


def python_library(limit: int = 8_000_000) -> bytes:
    """The sources of Python's standard library, in the order of their names, up to about ``limit`` bytes."""
    text = bytearray()
    for folder, subfolders, files in os.walk(sysconfig.get_paths()["stdlib"]):
        skipped = ("test", "tests", "idle_test", "site-packages", "dist-packages")
        subfolders[:] = sorted(name for name in subfolders if name not in skipped)
        for name in sorted(files):
            if name.endswith(".py") and len(text) < limit:
                text += Path(folder, name).read_bytes()
    return bytes(text)


def read_text(path: Path) -> bytes:
    """The bytes of a file; ``.gz`` and ``.zip`` are unpacked. A ValueError says what is wrong with it."""
    if not path.is_file():
        raise ValueError(f"`--data` must be a file, but there is none at '{path}': correct the path.")
    try:
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes())
        if path.suffix != ".zip":
            return path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if len(members) == 1:
                return archive.read(members[0])
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"`--data` must be readable, but '{path}' is not ({error}): fetch it again.") from error
    raise ValueError(f"`--data` must be a zip of one file, but '{path}' has {len(members)}: unpack it and give a text.")


# ----- training


class BpcHistory(Callback):
    """Keeps what was logged as ``train/bpc``, on the process that logs it."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.is_global_zero:
            self.values.append(trainer.callback_metrics["train/bpc"])


def positive(text: str) -> int:
    """An integer of the command line that counts something."""
    if int(text) < 1:
        raise ArgumentTypeError(f"must be at least 1, but is {text}")
    return int(text)


def parse_arguments(argv: Sequence[str] | None = None) -> Namespace:
    """The flags that ``--help`` lists."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stages", type=positive, default=2, help="stages of the pipeline; 1: plain training (default 2)")
    add("--virtual", action="store_true", help="all stages on one device, with the delays of as many devices")
    add("--backward", choices=("stash", "recompute", "replay"), default="stash", help="what a stage keeps of a batch")
    sizes = {"layers": 12, "width": 128, "heads": 4, "context": 64, "batch-size": 8, "steps": 800}
    for flag, default in sizes.items():
        add(f"--{flag}", type=positive, default=default, help=f"(default {default})")
    add("--lr", type=float, default=2e-3, help="the learning rate after the warm-up (default 0.002)")
    add("--seed", type=int, default=0, help="of the weights and the batches (default 0)")
    add("--data", type=Path, help="a text, plain, .gz or .zip (default: the sources of Python's standard library)")
    add("--accelerator", default="auto", help="as in Lightning's Trainer: auto, cpu, gpu (default auto)")
    add("--log-every", type=positive, default=10, help="steps between points of the curve in TensorBoard (default 10)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    args = parse_arguments(argv)
    seed_everything(args.seed, verbose=False)
    warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec)")  # says nothing about this example
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda line: "Tip:" not in line.getMessage())
    devices = 1 if args.virtual else args.stages
    if devices > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        text = python_library() if args.data is None else read_text(args.data)
        crops = TextCrops(text, args.context, args.steps * args.batch_size, args.seed)
        model = CharLM(args.layers, args.width, args.heads, args.context, args.lr, args.steps)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error

    strategy: Any = "auto"
    if args.stages > 1:
        strategy = DelayedMPStrategy(num_stages=args.stages, virtual=args.virtual, backward=args.backward)
    history = BpcHistory()
    name = f"char_lm-{args.stages}{'-virtual' if args.virtual else ''}-stages"
    trainer = Trainer(
        accelerator=args.accelerator,
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        max_steps=args.steps,
        logger=TensorBoardLogger("lightning_logs", name=name, default_hp_metric=False),
        log_every_n_steps=args.log_every,
        callbacks=[history],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(crops, batch_size=args.batch_size))
    if trainer.is_global_zero:
        bpc, tenth = torch.stack(history.values), max(1, args.steps // 10)
        print(
            f"\nBits per character: {bpc[:tenth].mean():.2f} in the first tenth, {bpc[-tenth:].mean():.2f} in the last."
            f" The curve is in {trainer.loggers[0].log_dir}: tensorboard --logdir lightning_logs"
        )


if __name__ == "__main__":
    main()
