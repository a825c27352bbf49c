"""Documents: every kind of input becomes one ordered stream of strings, and each string has its side of the split.

Special about this file: the split looks only at the text. The documents with the smallest hashes are the validation
documents, so the order of the files, a renamed folder or a second copy of a document cannot move text across.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from loglinear.tasks.lm.config import DataConfig

Side = Literal["train", "validation", "all"]


@dataclass(frozen=True)
class Source:
    """Documents of one input, in a fixed order, split by document.

    A lone document cannot be split by document: its last ``validation_fraction`` of characters is then the validation
    side. Invalid UTF-8 is read as U+FFFD; empty documents hold nothing and are left out.
    """

    data: str
    suffixes: tuple[str, ...] = DataConfig.suffixes
    text_field: str = DataConfig.text_field
    validation_fraction: float = DataConfig.validation_fraction

    def documents(self, side: Side = "all") -> Iterator[str]:
        """The documents of one side. Raises FileNotFoundError or ValueError for input that is missing or unreadable."""
        if side == "all":
            yield from self._read()
        elif len(self.digests) == 1:
            (text,) = self._read()
            cut = round(len(text) * (1 - self.validation_fraction))
            yield from filter(None, [text[:cut] if side == "train" else text[cut:]])
        else:
            yield from (text for text in self._read() if (_digest(text) in self._held_out) == (side == "validation"))

    @cached_property
    def digests(self) -> list[bytes]:
        """Hash of each document, in order: one pass over the input, of which nothing else stays in memory."""
        digests = [_digest(text) for text in self._read()]
        if not digests:
            raise ValueError(f"data: no text found in {self.data!r}")
        return digests

    @cached_property
    def hash(self) -> str:
        """Hash of all documents in order: the identity of the data in caches and records."""
        return hashlib.blake2b(b"".join(self.digests), digest_size=16).hexdigest()

    @cached_property
    def _held_out(self) -> frozenset[bytes]:
        distinct = sorted(set(self.digests))
        if self.validation_fraction == 0 or len(distinct) == 1:
            return frozenset()
        return frozenset(distinct[: max(1, round(self.validation_fraction * len(distinct)))])

    def _read(self) -> Iterator[str]:
        path = Path(self.data).expanduser()
        if self.data == "stdlib":
            texts = _folder(Path(sysconfig.get_path("stdlib")), (".py",), self.text_field)
        elif path.is_file():
            texts = _file(path, self.text_field)
        elif path.is_dir() and not _is_dataset(path):
            texts = _folder(path, self.suffixes, self.text_field)
        elif path.is_dir() or not self._looks_like_a_path():
            texts = _dataset(self.data, self.text_field)
        else:
            raise FileNotFoundError(f"data: no file or folder {self.data!r}")
        return filter(None, texts)

    def _looks_like_a_path(self) -> bool:
        """A dataset is called ``name`` or ``owner/name``; anything else that is not there is a missing file."""
        return self.data.startswith((".", "/", "~")) or self.data.endswith(self.suffixes) or self.data.count("/") > 1


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _file(path: Path, text_field: str) -> Iterator[str]:
    """One document per line of a ``.jsonl``, otherwise one per file; either may be compressed as ``.xz``."""
    try:
        yield from _documents(path, text_field)
    except (EOFError, lzma.LZMAError) as error:
        raise ValueError(f"data: {path} is not a whole .xz file: {error}") from error


def _documents(path: Path, text_field: str) -> Iterator[str]:
    if ".jsonl" not in path.suffixes:
        with _open(path) as file:
            yield file.read().decode("utf-8", errors="replace")
        return
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield _text(json.loads(line)[text_field])
            except (ValueError, KeyError, TypeError) as error:
                needed = f"a JSON object with a string field {text_field!r}"
                raise ValueError(f"data: {path}, line {number} is not {needed}") from error


def _text(value: object) -> str:
    """``value`` as valid Unicode: JSON and Arrow can hold half a surrogate pair, which UTF-8 cannot."""
    if not isinstance(value, str):
        raise TypeError(f"text_field: must hold strings, got {type(value).__name__}")
    return value.encode("utf-8", errors="replace").decode()


def _open(path: Path):
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    return path.open("rb")


def _folder(folder: Path, suffixes: tuple[str, ...], text_field: str) -> Iterator[str]:
    """Files below ``folder`` in the order of their names. Packages installed next to the sources are not part of it."""
    paths = sorted(path for path in folder.rglob("*") if path.name.endswith(suffixes) and path.is_file())
    for path in paths:
        if not {"site-packages", "dist-packages"} & set(path.relative_to(folder).parts):
            yield from _file(path, text_field)


def _is_dataset(folder: Path) -> bool:
    """Whether `datasets` wrote this folder: by ``save_to_disk``, or as Parquet files."""
    saved = (folder / "state.json", folder / "dataset_dict.json")
    return any(path.exists() for path in saved) or any(folder.rglob("*.parquet"))


def _dataset(name: str, text_field: str) -> Iterator[str]:
    """Rows of the ``train`` split of a Hugging Face dataset, by name or from a folder."""
    import datasets

    try:
        if Path(name).is_dir() and not any(Path(name).rglob("*.parquet")):
            loaded = datasets.load_from_disk(name)
            rows = loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            path, _, config = name.partition(":")
            rows = datasets.load_dataset(path, config or None, split="train")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"data: {name!r} is no file or folder and no dataset that loads: {reason}") from error
    if text_field not in rows.column_names:
        raise ValueError(f"text_field: {name!r} has no column {text_field!r}, only {rows.column_names}")
    for value in rows[text_field]:
        yield _text(value)
