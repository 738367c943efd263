"""Texts to train on: enwik8 and text8 as they are published, parts of them, or any other, in three parts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from char_lm import read_text

__all__ = ["Corpus", "read_corpus", "split_text"]

_PUBLISHED_BYTES = 100_000_000
_HELD_OUT_BYTES = 5_000_000  # for validation, and for test, of a published text
_BEGINNINGS = {"enwik8": b"<mediawiki", "text8": b" anarchism originated"}


class Corpus(NamedTuple):
    """A text in three parts.

    Attributes:
        train: The first 90 percent.
        validation: The next 5 percent.
        test: The last 5 percent.
        remark: What the text is and how it was split, to be told beside every result.
    """

    train: bytes
    validation: bytes
    test: bytes
    remark: str


def read_corpus(path: Path) -> Corpus:
    """Read and split a file, plain, .gz or .zip.

    A name that begins with ``enwik8`` or ``text8`` is a claim, which is checked. The whole of either is split as the
    literature does, 90M/5M/5M bytes; less than that counts as a prefix, and the remark says so.

    Raises:
        ValueError: If the file cannot be read, holds too little, or is not what its name says.
    """
    text = read_text(path)
    published = next((name for name in _BEGINNINGS if path.name.lower().startswith(name)), None)
    if published is None:
        return split_text(text, path.name)
    _check_published(text, published, path)
    if len(text) < _PUBLISHED_BYTES:
        prefix = f"a prefix of {published} ({len(text):,} of {_PUBLISHED_BYTES:,} bytes; not comparable with results on"
        return split_text(text, f"{prefix} {published})")
    validation, test = _PUBLISHED_BYTES - 2 * _HELD_OUT_BYTES, _PUBLISHED_BYTES - _HELD_OUT_BYTES
    return Corpus(text[:validation], text[validation:test], text[test:], f"{published}, split 90M/5M/5M bytes")


def split_text(text: bytes, name: str) -> Corpus:
    """Split any text into 90, 5 and 5 percent of its bytes.

    Raises:
        ValueError: If a part would be empty.
    """
    held_out = len(text) // 20
    if not held_out:
        raise ValueError(
            f"A text must have at least 20 bytes to be split 90/5/5, but '{name}' has {len(text)}: take a longer one."
        )
    validation, test = len(text) - 2 * held_out, len(text) - held_out
    return Corpus(text[:validation], text[validation:test], text[test:], f"{name}, split 90/5/5 percent by bytes")


def _check_published(text: bytes, published: str, path: Path) -> None:
    cure = f"fetch {published} again, or give the file another name"
    beginning = _BEGINNINGS[published][: len(text)]
    if not text.startswith(beginning) or not text:
        raise ValueError(
            f"A file named {published} must begin with {_BEGINNINGS[published]!r}, but '{path}' begins with"
            f" {text[: len(_BEGINNINGS[published])]!r}: {cure}."
        )
    if len(text) > _PUBLISHED_BYTES:
        raise ValueError(
            f"A file named {published} must have {_PUBLISHED_BYTES:,} bytes, or fewer as a prefix, but '{path}' has"
            f" {len(text):,}: {cure}."
        )
    if published == "text8" and (odd := re.search(rb"[^a-z ]", text)):
        raise ValueError(
            f"A file named text8 must hold only the letters a to z and spaces, but '{path}' has {odd.group()!r} at byte"
            f" {odd.start():,}: {cure}."
        )
