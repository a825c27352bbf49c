"""The text that a language-modelling run reads, in one dataclass. Nothing heavy is imported: the command line builds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Packing = Literal["stream", "document"]
Data = str | tuple[str, ...]


def names_of(data: Data | list[str]) -> tuple[str, ...]:
    """The names in ``data``, which records hold as a string or a list."""
    return (data,) if isinstance(data, str) else tuple(data)


@dataclass(frozen=True)
class DataConfig:
    """The text to read, and how to split it, tokenize it and pack it into sequences."""

    data: Data = "stdlib"
    """Text files, folders of them, .jsonl or .json with an object a line, FASTA files of nucleotides (.fna, .fa, .fasta) with a
    document a record, all of these also as .gz or .xz; quoted patterns
    ('data/**/*.txt'); Hugging Face datasets (NAME or NAME:CONFIG); or stdlib: the sources of this Python's standard library.
    Several are read in the order given, the files of a folder or pattern in the order of their names, and no file twice."""
    validation_data: Data | None = None
    """Validate on all of this text (same kinds as --data) instead of on a share of --data."""
    streaming: bool = False
    """Read Hugging Face datasets row by row, from their first row on. Only the rows that are read are copied to --cache,
    compressed. The split and the hash are those of the documents read."""
    max_documents: int | None = None
    """Read at most this many documents of --data, and as many of --validation-data."""
    validation_fraction: float = 0.02
    """Share of the documents of --data kept for validation, chosen by a hash of their text."""
    suffixes: tuple[str, ...] = (
        ".txt",
        ".md",
        ".py",
        ".jsonl",
        ".jsonl.xz",
    )  # the last is in the records of older runs
    """Which files of a folder are read, with .gz or .xz behind the suffix, too."""
    text_field: str = "text"
    """Field of a JSON line or a dataset row that holds the text."""
    tokenizer: str | None = None
    """Folder or Hugging Face name of a tokenizer; bytes: a token for each byte; nucleotides: one for each of A, C, G, T and N;
    none: train a byte-level BPE on the training documents."""
    vocab_size: int = 8192
    """Entries of a tokenizer that is trained here."""
    context: int = 1024
    """Tokens in a sequence."""
    packing: Packing = "stream"
    """stream: documents joined end to end, then cut; document: sequences that lie inside one document."""
    cache: Path = field(default_factory=lambda: Path.home() / ".cache" / "loglinear")
    """Folder for tokenized data and trained tokenizers."""

    def __post_init__(self) -> None:
        for name in ("data", "validation_data"):
            names = getattr(self, name)
            if names is not None:
                names = names_of(names)
                if not names:
                    raise ValueError(f"{name} must hold at least one name")
                object.__setattr__(self, name, names[0] if len(names) == 1 else names)
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"max_documents must be at least 1: got {self.max_documents}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1): got {self.validation_fraction}")
        if self.context < 2:
            raise ValueError(f"context must be at least 2 tokens, to predict one: got {self.context}")

    @property
    def has_validation(self) -> bool:
        return self.validation_data is not None or self.validation_fraction > 0
