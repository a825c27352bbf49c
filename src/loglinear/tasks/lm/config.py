"""What a language-modelling run reads, in one dataclass. Nothing heavy is imported: the command line builds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Packing = Literal["stream", "document"]


@dataclass(frozen=True)
class DataConfig:
    """What to read, how to split and tokenize it, and how to pack it into sequences."""

    data: str = "stdlib"
    """A text file, a folder of them, a .jsonl or .jsonl.xz, a Hugging Face dataset (NAME or NAME:CONFIG), or stdlib:
    the sources of this Python's standard library."""
    validation_data: str | None = None
    """Validate on all of this (same kinds as --data) instead of on a share of --data."""
    validation_fraction: float = 0.02
    """Share of the documents of --data kept for validation, chosen by a hash of their text."""
    suffixes: tuple[str, ...] = (".txt", ".md", ".py", ".jsonl", ".jsonl.xz")
    """Which files of a folder are read."""
    text_field: str = "text"
    """Field of a JSON line or a dataset row that holds the text."""
    tokenizer: str | None = None
    """Folder or Hugging Face name of a tokenizer; none: train a byte-level BPE on the training documents."""
    vocab_size: int = 8192
    """Entries of a tokenizer that is trained here."""
    context: int = 1024
    """Tokens in a sequence."""
    packing: Packing = "stream"
    """stream: documents joined end to end, then cut; document: sequences that lie inside one document."""
    cache: Path = field(default_factory=lambda: Path.home() / ".cache" / "loglinear")
    """Folder for tokenized data and trained tokenizers."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1): got {self.validation_fraction}")
        if self.context < 2:
            raise ValueError(f"context must be at least 2 tokens, to predict one: got {self.context}")

    @property
    def has_validation(self) -> bool:
        return self.validation_data is not None or self.validation_fraction > 0
