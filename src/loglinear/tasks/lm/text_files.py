"""Text files: which files a name stands for, and the documents in each. A file that is no text is refused, never repaired.

A file holds one document. A ``.jsonl`` or ``.json`` holds one document a line, and a FASTA file one a record. All may be
compressed, with ``.gz`` or ``.xz`` behind the name.
"""

from __future__ import annotations

import glob
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from loglinear.tasks.lm import fasta

OPENERS: dict[str, Callable[..., IO[bytes]]] = {".gz": gzip.open, ".xz": lzma.open}  # type: ignore[dict-item]
SIGNATURES = {b"\x1f\x8b": ".gz", b"\xfd7zXZ\x00": ".xz"}
LINES = (".jsonl", ".json")
INSTALLED = {"site-packages", "dist-packages"}


def plain_name(path: Path) -> str:
    """The name without the ending of a compressed file."""
    return path.name.removesuffix(path.suffix) if path.suffix in OPENERS else path.name


def matches(pattern: str) -> list[str]:
    """The paths of a glob, in the order of their names. Raises FileNotFoundError if there are none."""
    found = [str(path) for path in sorted(map(Path, glob.glob(pattern, recursive=True)))]
    if not found:
        raise FileNotFoundError(f"data: nothing matches {pattern!r}")
    return found


def is_glob(name: str) -> bool:
    """Whether a name is a pattern. The name of a file that exists is no pattern."""
    return glob.has_magic(name) and not Path(name).exists()


def files_below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files whose names end in one of ``suffixes``, in the order of their names, without installed packages.

    Raises FileNotFoundError if there is none.
    """
    paths = [path for path in folder.rglob("*") if plain_name(path).endswith(suffixes) or path.name.endswith(suffixes)]
    paths = sorted(path for path in paths if not INSTALLED & set(path.relative_to(folder).parts) and path.is_file())
    if not paths:
        raise FileNotFoundError(f"data: no text found in {str(folder)!r}: no file ends in one of {', '.join(suffixes)}")
    return paths


def read_file(path: Path, text_field: str) -> Iterator[str]:
    """The documents of one file. Raises ValueError naming the file and the place that is no text or no JSON."""
    try:
        if path.suffix in OPENERS and not path.stat().st_size:
            raise EOFError("it is empty")
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            if plain_name(path).endswith(LINES):
                yield from _lines(file, path, text_field)
            elif plain_name(path).endswith(fasta.SUFFIXES):
                yield from fasta.read_fasta(file, f"data: {path}")
            else:
                yield decode(file.read(), f"data: {path}")
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"data: {path} is not a whole {path.suffix} file: {error}") from error


def _lines(file: IO[bytes], path: Path, text_field: str) -> Iterator[str]:
    start = 0
    for number, line in enumerate(file, start=1):
        where = f"data: {path}, line {number}"
        text = decode(line, where, start)
        start += len(line)
        try:
            value = json.loads(text.removeprefix("\ufeff"))[text_field]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where} is not a JSON object with a string field {text_field!r}") from error
        yield check_text(value, where, text_field)


def decode(content: bytes, where: str, start: int = 0) -> str:
    """``content`` as text. Raises ValueError for NUL bytes and for bytes that are not UTF-8.

    The message begins with ``where`` and counts bytes from ``start``. In a compressed file it counts unpacked bytes.
    """
    wrong = content.find(b"\0")
    try:
        text = content.decode("utf-8")
        if wrong < 0:
            return text
    except UnicodeDecodeError as error:
        wrong = error.start if wrong < 0 else min(wrong, error.start)
    kinds = [suffix for signature, suffix in SIGNATURES.items() if content.startswith(signature)]
    hint = f"; it is compressed, and its name must end in {kinds[0]}" if kinds and not start else ""
    raise ValueError(f"{where} is not UTF-8 text: byte {start + wrong} is 0x{content[wrong]:02x}{hint}")


def check_text(value: object, where: str, text_field: str) -> str:
    """``value`` if it is a string that UTF-8 can hold. JSON and Arrow can also hold half of a surrogate pair."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {text_field!r} must hold a string, not {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"half of a surrogate pair (U+{ord(value[error.start]):04X}) at character {error.start}"
        raise ValueError(f"{where}: {text_field!r} holds {half}, which is no text") from error
    return value
