"""What the paper's models are trained on and measured by: texts, segments, bits per character."""

from __future__ import annotations

import gzip
import math
import zipfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import paper.corpus
import pytest
import torch
from paper.corpus import read_corpus, split_text
from paper.data import StreamSegments, TextData
from paper.metric import BitsPerCharacter
from torch.nn import functional as F

# ----- bits per character


def test_bits_per_character_by_hand() -> None:
    """Probabilities of 1/2, 1/4 and 1/8 cost 1, 2 and 3 bits."""
    metric = BitsPerCharacter()
    probabilities = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    metric.update(probabilities.log().expand(1, 2, 4), torch.tensor([[0, 1]]))
    metric.update(probabilities.log()[None], torch.tensor([[3]]))
    assert metric.compute().item() == pytest.approx((1 + 2 + 3) / 3, rel=1e-6)
    metric.reset()
    assert math.isnan(metric.compute())


def test_uneven_batches_count_by_their_characters() -> None:
    logits, target = torch.randn(4, 9, 20), torch.randint(0, 20, (4, 9))
    whole, parts, losses = BitsPerCharacter(), BitsPerCharacter(), BitsPerCharacter()
    whole.update(logits, target)
    for rows in (slice(0, 3), slice(3, 4)):
        parts.update(logits[rows], target[rows])
        loss = F.cross_entropy(logits[rows].flatten(0, 1), target[rows].flatten())
        losses.update(loss, target[rows].numel())
    expected = F.cross_entropy(logits.flatten(0, 1).double(), target.flatten()).item() / math.log(2)
    for metric in (whole, parts, losses):
        assert metric.compute().item() == pytest.approx(expected, rel=1e-6)


def test_sums_do_not_round_small_terms_away() -> None:
    metric = BitsPerCharacter()
    metric.half()  # as `precision="16-true"` does with what is in a LightningModule
    metric.update(torch.tensor(1.0), 100_000_000)
    for _ in range(10):
        metric.update(torch.tensor(2.0), 1)
    assert metric.nats.item() == 100_000_020


# ----- texts

ENWIK8 = b"<mediawiki xmlns=" + b"text of the encyclopedia, " * 20
TEXT8 = b" anarchism originated as a term of abuse " * 12


def write(path: Path, text: bytes) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(path.stem, text)
    else:
        path.write_bytes(text)
    return path


@pytest.mark.parametrize("ending", ["", ".gz", ".zip"])
@pytest.mark.parametrize("text", [ENWIK8, TEXT8], ids=["enwik8", "text8"])
def test_published_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes, ending: str) -> None:
    name = "enwik8" if text is ENWIK8 else "text8"
    monkeypatch.setattr(paper.corpus, "_PUBLISHED_BYTES", len(text))
    monkeypatch.setattr(paper.corpus, "_HELD_OUT_BYTES", 50)
    corpus = read_corpus(write(tmp_path / f"{name}{ending}", text))
    assert corpus[:3] == (text[:-100], text[-100:-50], text[-50:])
    assert corpus.remark == f"{name}, split 90M/5M/5M bytes"


@pytest.mark.parametrize("name", ["enwik8", "enwik8.first537.gz"])
def test_less_than_all_is_called_a_prefix(tmp_path: Path, name: str) -> None:
    corpus = read_corpus(write(tmp_path / name, ENWIK8))
    assert b"".join(corpus[:3]) == ENWIK8
    assert (len(corpus.validation), len(corpus.test)) == (len(ENWIK8) // 20,) * 2
    assert corpus.remark == (
        "a prefix of enwik8 (537 of 100,000,000 bytes; not comparable with results on enwik8), split 90/5/5 percent by"
        " bytes"
    )


def test_any_other_text_is_called_by_its_name(tmp_path: Path) -> None:
    corpus = read_corpus(write(tmp_path / "novel.txt", bytes(range(200))))
    assert [len(part) for part in corpus[:3]] == [180, 10, 10]
    assert corpus.remark == "novel.txt, split 90/5/5 percent by bytes"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("enwik8", b"", "must begin with b'<mediawiki', but '.*' begins with b''"),
        ("enwik8", TEXT8, "must begin with b'<mediawiki', but '.*' begins with b' anarchism': fetch enwik8 again"),
        ("enwik8", ENWIK8[:15], "at least 20 bytes"),
        ("text8.zip", ENWIK8, "must begin with b' anarchism originated'"),
        ("text8", TEXT8 + b"A", "only the letters a to z and spaces, but '.*' has b'A' at byte 492"),
        ("novel", b"", "at least 20 bytes to be split 90/5/5, but 'novel' has 0: take a longer one"),
    ],
)
def test_a_text_that_is_not_what_it_says(tmp_path: Path, name: str, text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_corpus(write(tmp_path / name, text))


def test_a_text_that_is_too_long_for_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper.corpus, "_PUBLISHED_BYTES", 500)
    with pytest.raises(ValueError, match=r"must have 500 bytes, or fewer as a prefix, but '.*' has 537"):
        read_corpus(write(tmp_path / "enwik8", ENWIK8))


@pytest.mark.parametrize("name", ["enwik8.gz", "enwik8.zip", "missing.zip"])
def test_truncated_and_missing_files(tmp_path: Path, name: str) -> None:
    if name != "missing.zip":
        path = write(tmp_path / name, ENWIK8)
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=name):
        read_corpus(tmp_path / name)


# ----- batches


def test_each_row_of_a_batch_continues_that_of_the_batch_before() -> None:
    data = TextData(split_text(bytes(range(240)), "numbers"), batch_size=3, length=10)
    batches = list(data.train_dataloader())
    assert [tuple(batch.shape) for batch in batches] == [(3, 11)] * 7 + [(3, 2)]
    for before, after in pairwise(batches):
        assert torch.equal(before[:, -1], after[:, 0])
    rows = [torch.cat([batch[row, 1:] for batch in batches]).tolist() for row in range(3)]
    assert rows == [list(range(72 * row + 1, 72 * row + 72)) for row in range(3)]


def test_replicas_have_streams_of_their_own() -> None:
    starts: list[Any] = []
    for rank in range(2):
        data = TextData(split_text(bytes(range(240)), "numbers"), batch_size=2, length=10)
        data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": rank})  # type: ignore
        batches = list(data.train_dataloader())
        assert all(torch.equal(before[:, -1], after[:, 0]) for before, after in pairwise(batches))
        starts.append(batches[0][:, 0].tolist())
    assert starts == [[0, 108], [54, 162]]


def test_random_crops() -> None:
    data = TextData(split_text(bytes(range(240)), "numbers"), batch_size=4, length=2, num_crops=10, seed=1)
    batches = list(data.train_dataloader())
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert all((batch.diff(dim=1) == 1).all() and batch.max() < 216 for batch in batches)
    assert sum(batch.shape[0] for batch in data.val_dataloader()) == 4  # in order


def test_a_text_too_short_for_its_streams() -> None:
    with pytest.raises(ValueError, match=r"more than 10 bytes for each of 4 streams, but has 43 bytes: take a longer"):
        StreamSegments(bytes(43), 4, 10)
