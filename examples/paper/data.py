"""Batches of text: in order, so that a memory can go on from one to the next, or at random."""

from __future__ import annotations

from char_lm import TextCrops
from lightning.pytorch import LightningDataModule
from torch import Tensor, frombuffer, uint8
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from paper.corpus import Corpus

__all__ = ["StreamSegments", "TextData"]


class StreamSegments(Dataset[Tensor]):
    """The segments of parallel streams through a text, as the authors of Transformer-XL order them.

    The text is divided into ``num_streams`` streams of the same length, and each of these into segments of ``length``
    bytes and the one that follows, which is the last target and the next segment's first input. With 2 streams of
    3 segments::

        stream 0 | 0 2 4      batches of 2: (0, 1), (2, 3), (4, 5)
        stream 1 | 1 3 5

    so consecutive items, ``num_streams`` of them, are a batch that continues the one before, row by row. The last
    segment of all streams may be shorter. Under DDP rank ``r`` of ``R`` gets every ``R``-th item: with ``R`` times as
    many streams as rows of a batch it has streams of its own, which also go on from batch to batch.

    Args:
        text: The bytes.
        num_streams: The rows of a batch, of all replicas together.
        length: Inputs of a segment, in bytes.

    Raises:
        ValueError: If a stream would hold no whole segment.
    """

    def __init__(self, text: bytes, num_streams: int, length: int) -> None:
        self.num_streams, self.length = num_streams, length
        self.stream_length = len(text) // num_streams
        if self.stream_length <= length:
            raise ValueError(
                f"A text must have more than {length} bytes for each of {num_streams} streams, but has"
                f" {len(text):,} bytes: take a longer text (its held-out parts are a twentieth of it), shorter segments"
                " or smaller batches."
            )
        self.text = frombuffer(bytearray(text), dtype=uint8)

    def __len__(self) -> int:
        return -(-(self.stream_length - 1) // self.length) * self.num_streams

    def __getitem__(self, index: int) -> Tensor:
        segment, stream = divmod(index, self.num_streams)
        start = segment * self.length
        end = min(start + self.length + 1, self.stream_length)
        return self.text[stream * self.stream_length :][start:end].long()


class TextData(LightningDataModule):
    """Batches of bytes ``(batch_size, length + 1)``: inputs, and shifted by one the targets.

    Validation and test go through their texts in order, each byte once.

    Args:
        corpus: The text.
        batch_size: Rows of a batch, of each replica.
        length: Inputs of a row, in bytes.
        num_crops: ``None``: an epoch is the training text in order, for models with a memory. A number: an epoch is
            that many crops at random places, the same in every epoch.
        seed: Of these places.
    """

    def __init__(
        self, corpus: Corpus, *, batch_size: int = 22, length: int = 512, num_crops: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.corpus, self.batch_size, self.length = corpus, batch_size, length
        self.num_crops, self.seed = num_crops, seed

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Segments in order, or random crops."""
        if self.num_crops is None:
            return self._in_order(self.corpus.train)
        crops = TextCrops(self.corpus.train, self.length, self.num_crops, self.seed)
        return DataLoader(crops, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Segments in order."""
        return self._in_order(self.corpus.validation)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Segments in order."""
        return self._in_order(self.corpus.test)

    def _in_order(self, text: bytes) -> DataLoader[Tensor]:
        replicas = getattr(self.trainer, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        segments = StreamSegments(text, self.batch_size * replicas["num_replicas"], self.length)
        sampler = DistributedSampler(segments, shuffle=False, **replicas)  # that of Lightning's own choice shuffles
        return DataLoader(segments, batch_size=self.batch_size, sampler=sampler)
