"""Tokenizer, cache and packing: no token is lost without being counted, and nothing is computed twice."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loglinear.models import LogLinearConfig
from loglinear.tasks.lm.config import DataConfig
from loglinear.tasks.lm.data import load_data
from loglinear.tasks.lm.documents import Source
from loglinear.tasks.lm.tokenizer import (
    END_OF_TEXT,
    cached_tokenizer,
    check_fits,
    load_tokenizer,
    num_ids,
    tokenizer_hash,
    train_tokenizer,
)
from loglinear.tasks.lm.tokens import Tokens, Windows, tokenize
from loglinear.training.config import ModelConfig
from loglinear.training.model import build_model

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "watch"]
TEXTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(20 + 15 * i)) for i in range(12)]


@pytest.fixture
def jsonl(tmp_path) -> str:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def test_the_tokenizer_spells_every_text(tokenizer):
    text = "Ünïcödé 日本語 🙂\t\r\n  def f(x):\n    return x\x00"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_training_the_tokenizer_again_gives_the_same(tokenizer):
    again = train_tokenizer(iter(TEXTS), 300)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(again) == 300


def test_a_saved_tokenizer_loads_with_auto_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXTS[3])["input_ids"] == tokenizer(TEXTS[3])["input_ids"]
    assert loaded.eos_token == END_OF_TEXT


def test_the_cached_tokenizer_is_not_trained_again(tmp_path):
    first = cached_tokenizer(TEXTS, "hash", 280, tmp_path)
    second = cached_tokenizer(iter(()), "hash", 280, tmp_path)
    assert second.get_vocab() == first.get_vocab()


def test_tokenizers_that_cannot_be_used_are_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size must be at least 258.*got 257"):
        train_tokenizer(TEXTS, 257)
    with pytest.raises(ValueError, match=r"tokenizer: .* holds no tokenizer that loads"):
        load_tokenizer(str(tmp_path))


def with_special_tokens(tokenizer, **tokens):
    """A copy whose special tokens are others: names to words of the vocabulary."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=END_OF_TEXT, **tokens)


def test_a_tokenizer_fits_the_model_that_was_made_for_it_and_a_larger_embedding(tokenizer):
    assert num_ids(tokenizer) == 300
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    check_fits(tokenizer, LogLinearConfig(vocab_size=300, **ids), tokenizer_hash(tokenizer))
    check_fits(tokenizer, LogLinearConfig(vocab_size=320, bos_token_id=310, eos_token_id=[5, tokenizer.eos_token_id]))
    check_fits(with_special_tokens(tokenizer, pad_token=END_OF_TEXT), LogLinearConfig(vocab_size=300, eos_token_id=0))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"vocab_size": 299}, "must fit the 299 entries of the model's embedding: got ids up to 299"),
        ({"eos_token_id": 7}, "tokenizer: its eos_token_id must be that of the model, 7: got 0"),
        ({"eos_token_id": [7, 8]}, r"tokenizer: its eos_token_id must be that of the model, \[7, 8\]: got 0"),
        ({"pad_token_id": 0}, "tokenizer: its pad_token_id must be that of the model, 0: got 1"),
        ({"eos_token_id": 300}, "eos_token_id of the model must be 0 to 299, an entry of its embedding: got 300"),
        ({"bos_token_id": 1000}, "bos_token_id of the model must be 0 to 299, an entry of its embedding: got 1000"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_named_with_both_numbers(model, message, tokenizer):
    config = SimpleNamespace(
        **{
            "model_type": "loglinear",
            "vocab_size": 300,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **model,
        }
    )
    config.get_text_config = lambda: config
    with pytest.raises(ValueError, match=message):
        check_fits(tokenizer, config)


def test_another_tokenizer_of_the_same_size_is_named(tokenizer):
    other = train_tokenizer([text.upper() for text in TEXTS], 300)
    assert num_ids(other) == num_ids(tokenizer)
    with pytest.raises(
        ValueError, match=f"trained with .hash {tokenizer_hash(tokenizer)}.: got another .hash {tokenizer_hash(other)}"
    ):
        check_fits(other, LogLinearConfig(vocab_size=300), tokenizer_hash(tokenizer))


def test_truncation_and_padding_are_no_part_of_the_hash(tokenizer, tmp_path):
    """Tokenizing turns them off, and the tokenizer is saved afterwards."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(16)
    backend.enable_padding(pad_token="<|pad|>", pad_id=1)
    assert tokenizer_hash(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)) == tokenizer_hash(
        tokenizer
    )


def test_ids_with_gaps_are_stored_whole_and_have_an_embedding(jsonl, tokenizer, tmp_path):
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"][0]["id"] = content["model"]["vocab"][END_OF_TEXT] = 70_000
    sparse = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token=END_OF_TEXT)
    assert (len(sparse), num_ids(sparse)) == (300, 70_001)
    tokens = tokenize(Source(jsonl), "all", sparse, tmp_path)
    assert tokens.values[tokens.offsets[1] - 1] == 70_000
    sizes = ModelConfig(hidden_size=8, num_hidden_layers=1, mamba_head_dim=8, mamba_state_size=8)
    check_fits(sparse, build_model(sizes, sparse, 16).config)


def test_tokens_are_the_documents_with_an_end_after_each(jsonl, tokenizer, tmp_path):
    tokens = tokenize(Source(jsonl), "all", tokenizer, tmp_path)
    assert tokens.values.dtype == np.uint16
    assert isinstance(tokens.values, np.memmap)
    for text, (start, stop) in zip(TEXTS, pairwise(tokens.offsets), strict=True):
        assert tokenizer.decode(tokens.values[start : stop - 1]) == text
        assert tokens.values[stop - 1] == tokenizer.eos_token_id


def test_tokens_are_written_once_for_the_same_text(jsonl, tokenizer, tmp_path):
    tokenize(Source(jsonl), "train", tokenizer, tmp_path)
    (folder,) = tmp_path.glob("tokens-*")
    written = (folder / "values.bin").stat().st_mtime_ns
    tokenize(Source(jsonl), "train", tokenizer, tmp_path)
    assert (folder / "values.bin").stat().st_mtime_ns == written
    Path(jsonl).write_text(Path(jsonl).read_text().replace("fox", "cat"))
    tokenize(Source(jsonl), "train", tokenizer, tmp_path)
    assert len(list(tmp_path.glob("tokens-*"))) == 2


def test_stream_packing_is_the_stream_cut_into_equal_sequences():
    tokens = Tokens(np.arange(103, dtype=np.uint16), np.array([0, 40, 41, 103]))
    windows = Windows(tokens, 10, "stream")
    joined = np.concatenate([windows[i]["input_ids"].numpy() for i in range(len(windows))])
    np.testing.assert_array_equal(joined, np.arange(100))
    assert windows.describe() == {"documents": 3, "tokens": 103, "sequences": 10, "tail_tokens": 3}


def test_document_packing_never_crosses_a_border():
    tokens = Tokens(np.arange(103, dtype=np.uint16), np.array([0, 40, 49, 49, 103]))
    windows = Windows(tokens, 25, "document")
    assert windows.starts.tolist() == [0, 49, 74]
    assert windows[2]["input_ids"].tolist() == list(range(74, 99))
    assert windows.tail == 103 - 75


def test_thinning_spreads_evenly():
    windows = Windows(Tokens(np.arange(100, dtype=np.uint16), np.array([0, 100])), 10)
    windows.thin(4)
    assert windows.starts.tolist() == [0, 30, 60, 90]


@pytest.mark.parametrize(
    ("packing", "limit"), [("stream", "103, the tokens of the data"), ("document", "62, .*document")]
)
def test_a_context_longer_than_the_text_is_named(packing, limit):
    tokens = Tokens(np.arange(103, dtype=np.uint16), np.array([0, 40, 41, 103]))
    with pytest.raises(ValueError, match=f"context must be at most {limit}: got 104"):
        Windows(tokens, 104, packing)


def test_load_data_trains_the_tokenizer_on_training_documents_only(tmp_path):
    secret = "xylophone " * 50
    for name in ("seen", "unseen"):
        (tmp_path / name).mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "seen" / f"{i}.txt").write_text(text)
    (tmp_path / "unseen" / "a.txt").write_text(secret)
    config = DataConfig(
        str(tmp_path / "seen"), str(tmp_path / "unseen"), vocab_size=300, context=16, cache=tmp_path / "cache"
    )
    data = load_data(config)
    assert data.train.tokens.num_documents == len(TEXTS)
    assert data.validation.tokens.num_documents == 1
    assert not any("xylo" in token for token in data.tokenizer.get_vocab())
    assert data.describe()["validation"]["tokens"] == len(data.tokenizer(secret)["input_ids"]) + 1


def test_load_data_names_the_side_that_is_too_short(tmp_path, jsonl):
    config = DataConfig(jsonl, vocab_size=300, context=400, validation_fraction=0.1, cache=tmp_path)
    with pytest.raises(ValueError, match=r"validation data: context must be at most .*larger validation_fraction"):
        load_data(config)


def test_load_data_uses_the_tokenizer_it_is_given(tmp_path, jsonl, tokenizer):
    tokenizer.save_pretrained(tmp_path / "mine")
    config = DataConfig(jsonl, tokenizer=str(tmp_path / "mine"), vocab_size=999, context=16, cache=tmp_path / "cache")
    data = load_data(config)
    assert data.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert not list((tmp_path / "cache").glob("tokenizer-*"))
    first = tokenizer(TEXTS[0])["input_ids"]
    streams = [windows.tokens.values.tolist() for windows in (data.train, data.validation)]
    assert any(stream[: len(first)] == first for stream in streams)
