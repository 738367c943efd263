"""The example reads texts in every form that it promises."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import pytest
from char_lm import python_library, read_text

TEXT = b"a text of which a model can learn " * 9


def test_plain_and_packed_texts(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(TEXT)
    (tmp_path / "text.gz").write_bytes(gzip.compress(TEXT))
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as archive:
        archive.writestr("enwik8", TEXT)
    assert [read_text(tmp_path / name) for name in ("text", "text.gz", "text.zip")] == [TEXT] * 3


@pytest.mark.parametrize("name", ["missing", "broken.gz", "broken.zip", "two.zip"])
def test_a_text_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    if name.startswith("broken"):
        (tmp_path / name).write_bytes(TEXT)
    if name.startswith("two"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("a", TEXT)
            archive.writestr("b", TEXT)
    with pytest.raises(ValueError, match=name):
        read_text(tmp_path / name)


def test_the_default_text() -> None:
    assert b"import" in python_library(limit=100_000)
