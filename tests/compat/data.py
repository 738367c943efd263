"""Data of the compat modules: deterministic, tiny, eight training batches of which the last is short."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

Make = Callable[[int, Generator], Dataset[Any]]


class Data(LightningDataModule):
    """Splits that ``make(size, generator)`` returns; the batches of validation are larger."""

    def __init__(self, make: Make, shuffle: bool = False, collate: Any = None, batch_size: int = 8) -> None:
        super().__init__()
        self.make, self.shuffle, self.collate, self.batch_size = make, shuffle, collate, batch_size

    def setup(self, stage: str) -> None:
        sizes = {"train": 7 * self.batch_size + 4, "val": 20, "test": 20}
        self.splits = {
            split: self.make(size, Generator().manual_seed(seed)) for seed, (split, size) in enumerate(sizes.items())
        }

    def train_dataloader(self) -> DataLoader[Any]:
        generator = Generator().manual_seed(11) if self.shuffle else None
        return DataLoader(
            self.splits["train"],
            batch_size=self.batch_size,
            shuffle=self.shuffle,
            generator=generator,
            collate_fn=self.collate,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.splits["val"], batch_size=12, collate_fn=self.collate)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.splits["test"], batch_size=12, collate_fn=self.collate)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.test_dataloader()


class TwoValidationSets(Data):
    def val_dataloader(self) -> Any:
        return [super().val_dataloader(), self.test_dataloader()]


class Items(Dataset[Any]):
    """A map-style dataset over a list."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


# ----- vectors


def _vectors(size: int, generator: Generator) -> Dataset[Any]:
    x = torch.randn(size, 8, generator=generator)
    return TensorDataset(x, (x.sum(dim=1) > 0).long() + 2 * (x[:, 0] > 0).long())


def vectors() -> Data:
    """(8 numbers, one of 4 classes)."""
    return Data(_vectors)


def shuffled_vectors() -> Data:
    return Data(_vectors, shuffle=True)


def vectors_two_validation_sets() -> Data:
    return TwoValidationSets(_vectors)


def _targets(size: int, generator: Generator) -> Dataset[Any]:
    x = torch.randn(size, 8, generator=generator)
    return TensorDataset(x, (x[:, :2] * x[:, 2:4]).sum(dim=1, keepdim=True))


def targets() -> Data:
    """(8 numbers, a number)."""
    return Data(_targets)


class Measurement(NamedTuple):
    """What a named tuple batch holds."""

    features: Tensor
    target: Tensor


@dataclass
class Sample:
    """What a dataclass batch holds."""

    features: Tensor
    label: Tensor
    weight: Tensor


def _measurements(size: int, generator: Generator) -> Dataset[Any]:
    x, y = _targets(size, generator).tensors  # type: ignore[attr-defined]
    return Items([Measurement(*pair) for pair in zip(x, y)])


def measurements() -> Data:
    """Named tuples, which the default collation keeps."""
    return Data(_measurements, shuffle=True)


def _samples(size: int, generator: Generator) -> Dataset[Any]:
    x, y = _vectors(size, generator).tensors  # type: ignore[attr-defined]
    return Items([Sample(a, b, 0.5 + a[1].sigmoid()) for a, b in zip(x, y)])


def _collate_samples(items: list[Sample]) -> Sample:
    return Sample(*(torch.stack([getattr(i, name) for i in items]) for name in ("features", "label", "weight")))


def samples() -> Data:
    """Dataclasses, by a collate function."""
    return Data(_samples, collate=_collate_samples)


def _rows(size: int, generator: Generator) -> Dataset[Any]:
    categories = torch.randint(0, 5, (size, 3), generator=generator)
    numbers = torch.randn(size, 4, generator=generator)
    label = ((categories[:, 0] > 2) ^ (numbers[:, 0] > 0)).float()
    return Items([{"categories": c, "numbers": n, "label": y} for c, n, y in zip(categories, numbers, label)])


def table_rows() -> Data:
    """Dicts of three categories, four numbers and a label."""
    return Data(_rows, shuffle=True)


def _ratings(size: int, generator: Generator) -> Dataset[Any]:
    users, items = (torch.randint(0, n, (size,), generator=generator) for n in (10, 15))
    return TensorDataset(users, items, ((users * 3 + items) % 5 + 1).float())


def ratings() -> Data:
    """(user, item, rating)."""
    return Data(_ratings, shuffle=True)


def _graphs(size: int, generator: Generator) -> Dataset[Any]:
    x = torch.randn(size, 6, 5, generator=generator)
    adjacency = (torch.rand(size, 6, 6, generator=generator) > 0.6).float()
    adjacency = ((adjacency + adjacency.transpose(1, 2)) > 0).float()
    y = (adjacency.sum(dim=(1, 2)) > 23).long()
    return Items([{"x": a, "adjacency": b, "y": c} for a, b, c in zip(x, adjacency, y)])


def graphs() -> Data:
    """Dicts of six nodes with five features, their adjacency, and a class."""
    return Data(_graphs)


class GraphBatch:
    """Graphs of several sizes as one, whose nodes know theirs by number: an object, as those of PyTorch Geometric."""

    def __init__(self, **items: Any) -> None:
        self.__dict__.update(items)

    @property
    def num_graphs(self) -> int:
        """How many there are."""
        return int(self.ptr.numel()) - 1


def _molecules(size: int, generator: Generator) -> Dataset[Any]:
    items = []
    for _ in range(size):
        num_nodes = int(torch.randint(4, 9, (1,), generator=generator))
        x = torch.randint(5, (num_nodes,), generator=generator)
        items.append((x, torch.randint(num_nodes, (2, 3 * num_nodes), generator=generator), x.float().mean()))
    return Items(items)


def _collate_molecules(items: list[Any]) -> GraphBatch:
    sizes = torch.tensor([len(x) for x, _, _ in items])
    ptr = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    return GraphBatch(
        x=torch.cat([x for x, _, _ in items]),
        edge_index=torch.cat([edges + start for (_, edges, _), start in zip(items, ptr)], dim=1),
        y=torch.stack([y for _, _, y in items]),
        batch=torch.arange(len(items)).repeat_interleave(sizes),
        ptr=ptr,
    )


def molecules() -> Data:
    """Objects of nodes with a kind, edges, and a number for each graph."""
    return Data(_molecules, collate=_collate_molecules)


def _series(size: int, generator: Generator) -> Dataset[Any]:
    start = torch.rand(size, 1, generator=generator) * 6
    wave = torch.sin(start + 0.4 * torch.arange(16.0)) + 0.1 * torch.randn(size, 16, generator=generator)
    return TensorDataset(wave[:, :12, None], wave[:, 12:])


def series() -> Data:
    """(12 time steps of one number, the next 4)."""
    return Data(_series)


# ----- images


def _images(size: int, generator: Generator) -> Dataset[Any]:
    x = torch.randn(size, 1, 8, 8, generator=generator)
    y = torch.randint(0, 3, (size,), generator=generator)
    return TensorDataset(x + 0.5 * (y - 1.0)[:, None, None, None], y)


def images() -> Data:
    """(1 x 8 x 8 image, one of 3 classes)."""
    return Data(_images)


def shuffled_images() -> Data:
    return Data(_images, shuffle=True)


def _masks(size: int, generator: Generator) -> Dataset[Any]:
    x = torch.nn.functional.avg_pool2d(torch.randn(size, 1, 8, 8, generator=generator), 3, 1, 1)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 0] > 0.3).long())


def masks() -> Data:
    """(1 x 8 x 8 image, 8 x 8 classes of 3)."""
    return Data(_masks)


def _views(size: int, generator: Generator) -> Dataset[Any]:
    x, y = _images(size, generator).tensors  # type: ignore[attr-defined]
    one, two = (x + 0.2 * torch.randn(x.shape, generator=generator) for _ in range(2))
    return Items([((a, b.flip(-1)), c) for a, b, c in zip(one, two, y)])


def views() -> Data:
    """((image, image), class): two augmented views."""
    return Data(_views)


def _pairs(size: int, generator: Generator) -> Dataset[Any]:
    x, y = _vectors(2 * size, generator).tensors  # type: ignore[attr-defined]
    return TensorDataset(x[:size], x[size:], (y[:size] == y[size:]).float())


def pairs() -> Data:
    """(8 numbers, 8 numbers, whether their classes are equal)."""
    return Data(_pairs)


def _captions(size: int, generator: Generator) -> Dataset[Any]:
    x, y = _images(size, generator).tensors  # type: ignore[attr-defined]
    ids = torch.randint(0, 6, (size, 5), generator=generator) + 6 * y[:, None]
    return Items([{"image": a, "input_ids": b} for a, b in zip(x, ids)])


def captions() -> Data:
    """Dicts of an image and 5 token ids."""
    return Data(_captions)


# ----- text


def _token_ids(size: int, generator: Generator, length: int = 10) -> Tensor:
    start, step = (torch.randint(low, high, (size, 1), generator=generator) for low, high in ((0, 17), (1, 4)))
    return 3 + (start + step * torch.arange(length)) % 17


def _tokens(size: int, generator: Generator) -> Dataset[Any]:
    return Items(list(_token_ids(size, generator)))


def tokens() -> Data:
    """10 token ids below 20, of which 0, 1 and 2 are special."""
    return Data(_tokens, shuffle=True)


def _encodings(size: int, generator: Generator) -> Dataset[Any]:
    ids = _token_ids(size, generator)
    mask = (torch.arange(10) < torch.randint(6, 11, (size, 1), generator=generator)).long()
    ids = ids * mask
    labels = ids.masked_fill(mask == 0, -100)
    return Items([{"input_ids": a, "attention_mask": b, "labels": c} for a, b, c in zip(ids, mask, labels)])


def encodings() -> Data:
    """What a tokenizer returns, with labels for every token."""
    return Data(_encodings)


def _sentences(size: int, generator: Generator) -> Dataset[Any]:
    ids, labels = _token_ids(size, generator), torch.randint(0, 2, (size,), generator=generator)
    items = [{"input_ids": a, "attention_mask": torch.ones_like(a), "labels": b} for a, b in zip(ids, labels)]
    return Items(items)


def sentences() -> Data:
    """What a tokenizer returns, with a label for the sentence."""
    return Data(_sentences)


def _ragged(size: int, generator: Generator) -> Dataset[Any]:
    lengths = torch.randint(4, 11, (size,), generator=generator).tolist()
    return Items([(ids[:n], ids[0] % 2) for ids, n in zip(_token_ids(size, generator), lengths)])


def _collate_ragged(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    ids, labels = zip(*items)
    return pad_sequence(list(ids), batch_first=True), torch.tensor([len(i) for i in ids]), torch.stack(labels)


def ragged() -> Data:
    """(padded token ids, lengths, label); the length changes from batch to batch."""
    return Data(_ragged, collate=_collate_ragged)


def _translations(size: int, generator: Generator) -> Dataset[Any]:
    source = _token_ids(size, generator, 7)
    start = torch.ones(size, 1, dtype=torch.long)
    return TensorDataset(source, torch.cat([start, source.flip(1), 2 * start], dim=1))


def translations() -> Data:
    """(7 token ids, the same reversed between start and end)."""
    return Data(_translations)
