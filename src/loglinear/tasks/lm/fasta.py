"""FASTA: nucleotide sequences as documents.

A record is a document: its lines in one piece, in capitals, without the header. Letters are those of the IUPAC code; a gap or
another character is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO

import numpy as np

SUFFIXES = (".fna", ".fa", ".fasta")
NUCLEOTIDES = "ACGTN"  # tokens 0 to 4; letters that stand for several nucleotides are N
_WRONG = re.compile(rb"[^ACGTURYSWKMBDHVN]")


def read_fasta(file: IO[bytes], where: str) -> Iterator[str]:
    """The sequences in a FASTA file of nucleotides; U is read as T, and an empty record gives nothing.

    Raises ValueError, which begins with ``where`` and has the number of the line, for text before the first header and for a
    character that is no nucleotide.
    """
    pieces: list[bytes] | None = None
    for number, line in enumerate(file, start=1):
        line = line.strip()
        if line.startswith(b">"):
            yield from _whole(pieces)
            pieces = []
        elif line and not line.startswith(b";"):
            if pieces is None:
                raise ValueError(
                    f"{where}, line {number}: a FASTA file must begin with a header, a line that starts with >"
                )
            line = line.upper()
            wrong = _WRONG.search(line)
            if wrong:
                raise ValueError(f"{where}, line {number} must hold nucleotides: got {wrong[0].decode('latin-1')!r}")
            pieces.append(line.replace(b"U", b"T"))
    yield from _whole(pieces)


def _whole(pieces: list[bytes] | None) -> Iterator[str]:
    if pieces:
        yield b"".join(pieces).decode("ascii")


def reverse_complement(ids: np.ndarray) -> np.ndarray:
    """The other strand of token ids ``[T]``, read in its own direction; ids from N on stay."""
    return np.where(ids < 4, 3 - ids, ids)[::-1]
