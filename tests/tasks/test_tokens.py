"""Tokenizer, cache and packing: no token is lost without being counted, and nothing is computed twice."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from loglinear.tasks.lm.config import DataConfig
from loglinear.tasks.lm.data import load_data
from loglinear.tasks.lm.documents import Source
from loglinear.tasks.lm.tokenizer import END_OF_TEXT, cached_tokenizer, load_tokenizer, train_tokenizer
from loglinear.tasks.lm.tokens import Tokens, Windows, tokenize

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
