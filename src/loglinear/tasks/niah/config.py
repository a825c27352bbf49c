"""The samples of a run, as dataclasses: needle, text and number. Nothing heavy is imported: the command line builds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from loglinear.tasks.lm.config import Data, DataConfig

Kind = Literal["number", "word", "multi-key", "multi-value"]
MOST_NEEDLES = 1000  # half of the keys that training or test can have; a key is a pair of words
KINDS: tuple[Kind, ...] = ("number", "word", "multi-key", "multi-value")


@dataclass(frozen=True)
class TaskConfig:
    """The needles and the haystack."""

    kinds: tuple[Kind, ...] = KINDS
    """number: one seven-digit number; word: one pair of words; multi-key: one number among the numbers of other keys;
    multi-value: all numbers of one key, in the order of the text."""
    needles: int = 4
    """Needles in a sample of multi-key and multi-value; the others have one."""
    data: Data | None = None
    """Text of the haystack, as for train; none: the data of the run, as its record tells."""
    streaming: bool = False
    """As for train, of --data."""
    max_documents: int | None = None
    """As for train, of --data."""
    suffixes: tuple[str, ...] | None = None
    """Which files of a folder are read; none: as in training."""
    text_field: str | None = None
    """Field of a JSON line or a dataset row that holds the text; none: as in training."""
    seed: int = 0
    """Of needles, depths and haystacks: the same seed and tokenizer give the same samples."""
    cache: Path = field(default_factory=lambda: DataConfig().cache)
    """Folder for tokenized data."""

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ValueError("kinds: needs at least one")
        if not 2 <= self.needles <= MOST_NEEDLES:
            raise ValueError(f"needles must be 2 to {MOST_NEEDLES:,}, as each has a key of its own: got {self.needles}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0: got {self.seed}")


@dataclass(frozen=True)
class GridConfig:
    """Which samples a test holds: ``samples`` of each kind for every length and depth."""

    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    """Lengths of the samples in tokens."""
    depths: int = 9
    """Depths of the needle, evenly spread from the start of the text (0) to its end (1)."""
    samples: int = 20
    """Samples of each kind, length and depth."""

    def __post_init__(self) -> None:
        _check_contexts(self.contexts)
        if self.depths < 2:
            raise ValueError(f"depths must be at least 2, the start and the end: got {self.depths}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1: got {self.samples}")


@dataclass(frozen=True)
class TuneConfig:
    """A short run on samples of several lengths. Models with the same settings and tokenizer see the same samples."""

    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    """Lengths in tokens; every step draws one of them."""
    steps: int = 300
    """Optimizer steps."""
    batch_tokens: int = 32768
    """Tokens of a forward pass: a step on short samples holds more of them."""
    accumulate: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float = 3e-4
    """Peak of AdamW's learning rate: a linear rise over the first tenth, then a cosine down to a tenth."""
    weight_decay: float = 0.1
    """Applied to matrices only."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    log_every: int = 10
    """Steps between two logged losses."""

    def __post_init__(self) -> None:
        _check_contexts(self.contexts)
        for name in ("steps", "batch_tokens", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1: got {getattr(self, name)}")
        if not self.clip > 0:
            raise ValueError(f"clip must be above 0, inf to leave gradients as they are: got {self.clip}")


def _check_contexts(contexts: tuple[int, ...]) -> None:
    if not contexts or min(contexts) < 1:
        raise ValueError(f"contexts: needs at least one length, and all above 0: got {contexts}")
