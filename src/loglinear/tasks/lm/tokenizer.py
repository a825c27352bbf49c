"""Tokenizers: one that exists, one of single bytes or nucleotides, or a byte-level BPE trained here and kept in the cache.

Byte-level means that every text has a spelling: there is no unknown token, so perplexities count every character.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from loglinear.models import LogLinearConfig
from loglinear.tasks.lm.atomic import atomic_folder
from loglinear.tasks.lm.fasta import NUCLEOTIDES

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"  # a token of its own, because the embedding of padding is not trained
BUILT_IN = ("bytes", "nucleotides")
TRAINING_CHARACTERS = 100_000_000  # more text hardly changes the merges, but takes more memory


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``vocab_size`` entries, learned from the first 100 million characters.

    Raises ValueError for a ``vocab_size`` that has no room for the 256 bytes and the two special tokens.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size must be at least 258, the bytes and two special tokens: got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_characters(documents, TRAINING_CHARACTERS), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PADDING)


def cached_tokenizer(documents: Iterable[str], data_hash: str, vocab_size: int, cache: Path) -> PreTrainedTokenizerFast:
    """The tokenizer trained on ``documents``, or read from ``cache`` if data with this hash gave one before."""
    folder = cache / f"tokenizer-{data_hash}-{vocab_size}"
    if not folder.exists():
        with atomic_folder(folder) as unfinished:
            train_tokenizer(documents, vocab_size).save_pretrained(unfinished)
    return load_tokenizer(str(folder))


def built_in(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of this name in ``BUILT_IN``: a token for each byte of UTF-8, or for each nucleotide."""
    if name == "nucleotides":
        return _nucleotides()
    return train_tokenizer([], 258)


def _nucleotides() -> PreTrainedTokenizerFast:
    """A, C, G, T, N and the two special tokens, in this order; every other character is N."""
    vocabulary = {letter: i for i, letter in enumerate(NUCLEOTIDES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="N"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_TEXT, PADDING])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PADDING)


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The built-in tokenizer of this name, or that in a folder, or of a Hugging Face name.

    Raises ValueError if it cannot be used here.
    """
    if name in BUILT_IN:
        return built_in(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer: {name!r} holds no tokenizer that loads: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer: {name!r} has no fast (tokenizers) form, which is needed")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer: {name!r} has no end-of-text token, which is needed between documents")
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Identity of what a tokenizer does to a text. Truncation and padding are left out: documents are tokenized whole."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    content = backend.to_str() + str(tokenizer.eos_token_id)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def num_ids(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id: the size of an embedding that has an entry for each id. Ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_fits(tokenizer: PreTrainedTokenizerFast, model: PreTrainedConfig, recorded_hash: str | None = None) -> None:
    """Raise ValueError if ``tokenizer`` is not one that a model with this configuration was made for.

    Its ids must lie in the embedding, which may be larger. Its special tokens must be those of the configuration where both
    name one and the model is of this package; folders of other packages often name others. ``recorded_hash`` is
    ``tokenizer_hash`` of the tokenizer that the model was trained with, if that is known.
    """
    foreign, model = model.model_type != LogLinearConfig.model_type, model.get_text_config()
    entries, needed = model.vocab_size, num_ids(tokenizer)
    if needed > entries:
        raise ValueError(
            f"tokenizer: must fit the {entries:,} entries of the model's embedding: got ids up to {needed - 1:,}"
        )
    for name in () if foreign else ("bos_token_id", "eos_token_id", "pad_token_id"):
        known, own = getattr(model, name), getattr(tokenizer, name)
        several = known if isinstance(known, list) else [] if known is None else [known]
        if not all(0 <= token < entries for token in several):
            raise ValueError(f"{name} of the model must be 0 to {entries - 1}, an entry of its embedding: got {known}")
        if several and own is not None and own not in several:
            raise ValueError(f"tokenizer: its {name} must be that of the model, {known}: got {own}")
    own_hash = tokenizer_hash(tokenizer)
    if recorded_hash is not None and own_hash != recorded_hash:
        raise ValueError(
            f"tokenizer: must be the one that the model was trained with (hash {recorded_hash}): got another (hash {own_hash})"
        )


def _first_characters(documents: Iterable[str], limit: int) -> Iterator[str]:
    for text in documents:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return
