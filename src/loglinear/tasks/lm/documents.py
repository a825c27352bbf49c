"""Documents: every kind of input becomes one ordered stream of strings, and each string has its side of the split.

The split looks only at the text. The documents with the smallest hashes are the validation documents, so the order of the
files, a renamed folder or a second copy of a document cannot move text across.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal

from loglinear.tasks.lm.config import Data, DataConfig, names_of
from loglinear.tasks.lm.hub import is_dataset, read_dataset, read_stream
from loglinear.tasks.lm.text_files import files_below, is_glob, matches, read_file

Side = Literal["train", "validation", "all"]
Kind = Literal["stdlib", "file", "folder", "dataset"]


@dataclass(frozen=True)
class Source:
    """Documents of one input, in a fixed order, split by document.

    Names in ``data`` are read in their order. A folder and a glob stand for their files in the order of the names. A file is
    read once, even if several names stand for it. Empty documents are left out.

    A single document cannot be split by document. Its last ``validation_fraction`` of characters is then the validation side.

    max_documents: the most documents to read. stream_to: a cache folder to which datasets are copied row by row (``hub.py``).
    """

    data: Data
    suffixes: tuple[str, ...] = DataConfig.suffixes
    text_field: str = DataConfig.text_field
    validation_fraction: float = DataConfig.validation_fraction
    max_documents: int | None = None
    stream_to: Path | None = None

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

    @property
    def label(self) -> str:
        """The name of the text, for messages and reports."""
        return ", ".join(names_of(self.data))

    @cached_property
    def digests(self) -> list[bytes]:
        """Hash of each document, in order. This takes one pass over the input, and only the hashes stay in memory."""
        digests = [_digest(text) for text in self._read()]
        if not digests:
            raise ValueError(f"data: no text found in {self.label!r}")
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
        return islice(filter(None, self._read_all()), self.max_documents)

    def _read_all(self) -> Iterator[str]:
        read: set[str] = set()
        for name, kind in self.inputs():
            if kind == "dataset" and self.stream_to is not None:
                yield from read_stream(name, self.text_field, self.max_documents, self.stream_to)
            elif kind == "dataset":
                yield from read_dataset(name, self.text_field)
            elif kind == "stdlib":
                yield from _stdlib()
            else:
                for file in [Path(name)] if kind == "file" else files_below(Path(name), self.suffixes):
                    if os.path.abspath(file) not in read:
                        read.add(os.path.abspath(file))
                        yield from read_file(file, self.text_field)

    def inputs(self) -> list[tuple[str, Kind]]:
        """Every name that is read and its kind, with globs resolved. Raises FileNotFoundError for a missing file."""
        given = [os.path.expanduser(name) for name in names_of(self.data)]
        names = [name for one in given for name in (matches(one) if is_glob(one) else [one])]
        return [(name, self._kind(name)) for name in names]

    def _kind(self, name: str) -> Kind:
        path = Path(name)
        if name == "stdlib":
            return "stdlib"
        if path.is_file():
            return "file"
        if path.is_dir():
            return "dataset" if is_dataset(path) else "folder"
        if self._looks_like_a_path(name):
            raise FileNotFoundError(f"data: no file or folder {name!r}")
        return "dataset"

    def _looks_like_a_path(self, name: str) -> bool:
        """Whether ``name`` must be a missing file: datasets are called ``name`` or ``owner/name``."""
        marks = name.startswith((".", "/")) or "\\" in name or name.count("/") > 1
        return marks or name.endswith((*self.suffixes, ".gz", ".xz"))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _stdlib() -> Iterator[str]:
    """Sources of this Python's standard library. Bytes that are not UTF-8, which some of its tests hold, are read as U+FFFD."""
    for file in files_below(Path(sysconfig.get_path("stdlib")), (".py",)):
        yield file.read_bytes().decode("utf-8", errors="replace")
