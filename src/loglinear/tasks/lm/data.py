"""From a DataConfig to a tokenizer and two sets of sequences, through the cache."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from loglinear.tasks.lm.config import Data, DataConfig
from loglinear.tasks.lm.documents import Side, Source
from loglinear.tasks.lm.tokenizer import cached_tokenizer, load_tokenizer, tokenizer_hash
from loglinear.tasks.lm.tokens import Tokens, Windows, tokenize


@dataclass(frozen=True)
class TextData:
    """The tokens for training and validation. ``hashes`` identify the texts and the tokenizer."""

    tokenizer: PreTrainedTokenizerFast
    train: Windows
    validation: Windows | None
    hashes: dict[str, str]

    def describe(self) -> dict:
        """Hashes and counts, for the record."""
        validation = None if self.validation is None else self.validation.describe()
        return {**self.hashes, "train": self.train.describe(), "validation": validation}


def load_data(config: DataConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> TextData:
    """Read, split, tokenize and pack. ``validation`` is None if ``validation_fraction`` is 0 and no other data is given.

    ``tokenizer`` takes the place of the one that ``config`` names or that would be trained.

    Raises ValueError or FileNotFoundError naming the argument for text that is missing, empty or shorter than a context.
    """
    source = _source(config, config.data)
    if config.streaming and all(kind != "dataset" for _, kind in source.inputs()):
        raise ValueError(f"streaming: must be off, for data is no Hugging Face dataset: got {source.label!r}")
    other = None if config.validation_data is None else _source(config, config.validation_data)
    train_side: Side = "all" if other is not None or config.validation_fraction == 0 else "train"

    hashes = {"hash": source.hash}
    if tokenizer is None and config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    elif tokenizer is None:
        # The hash of the data does not say which of its documents the tokenizer may see.
        key = f"{source.hash}-{train_side}-{config.validation_fraction}"
        tokenizer = cached_tokenizer(source.documents(train_side), key, config.vocab_size, config.cache)
    hashes["tokenizer_hash"] = tokenizer_hash(tokenizer)

    train = _pack(tokenize(source, train_side, tokenizer, config.cache), config, "training")
    validation = None
    if other is not None:
        hashes["validation_hash"] = other.hash
        validation = _pack(tokenize(other, "all", tokenizer, config.cache), config, "validation")
    elif train_side == "train":
        validation = _pack(tokenize(source, "validation", tokenizer, config.cache), config, "validation")
    return TextData(tokenizer, train, validation, hashes)


def _source(config: DataConfig, data: Data) -> Source:
    stream_to = config.cache if config.streaming else None
    fields = config.suffixes, config.text_field, config.validation_fraction, config.max_documents
    return Source(data, *fields, stream_to)


def _pack(tokens: Tokens, config: DataConfig, name: str) -> Windows:
    try:
        return Windows(tokens, config.context, config.packing)
    except ValueError as error:
        hint = "; give more text, a larger validation_fraction or validation_data" if name == "validation" else ""
        raise ValueError(f"{name} data: {error}{hint}") from error
