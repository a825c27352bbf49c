"""Streams of Hugging Face datasets: read once, in order, no further than asked for, and equal to the dataset itself."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from loglinear.tasks.lm.config import DataConfig
from loglinear.tasks.lm.data import load_data
from loglinear.tasks.lm.documents import Source

TEXTS = [f"Document {i}: " + "ä token and another. " * (i + 1) for i in range(40)]


@pytest.fixture(autouse=True)
def arrow_cache(tmp_path, monkeypatch) -> Path:
    """The cache of `datasets`, of this test alone."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    return tmp_path / "arrow"


@pytest.fixture
def parquet(tmp_path) -> str:
    """A folder with a dataset of two files."""
    (tmp_path / "named").mkdir()
    for i, rows in enumerate((TEXTS[:25], TEXTS[25:])):
        columns = {"text": rows, "number": [3] * len(rows)}
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "named" / f"train-{i}.parquet")
    return str(tmp_path / "named")


@pytest.fixture
def endless(monkeypatch) -> list[int]:
    """A dataset "owner/endless" of rows without end; the list tells which were read."""
    read: list[int] = []

    def rows():
        for i in itertools.count():
            read.append(i)
            yield {"text": f"text {i}" if i % 3 else ""}

    def builder(path, config):
        assert (path, config) == ("owner/endless", None)
        stream = datasets.IterableDataset.from_generator(rows)
        return SimpleNamespace(config_id="default", hash="1", as_streaming_dataset=lambda split: stream)

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    return read


def copies(cache: Path) -> list[Path]:
    return sorted(cache.glob("stream-*"))


def test_a_stream_gives_the_documents_of_the_dataset_and_no_arrow_copy(parquet, tmp_path, arrow_cache):
    stream = Source(parquet, stream_to=tmp_path / "cache")
    assert list(stream.documents()) == TEXTS
    assert not list(arrow_cache.rglob("*.arrow"))
    whole = Source(parquet)
    assert (stream.hash, list(stream.documents("validation"))) == (whole.hash, list(whole.documents("validation")))
    assert list(arrow_cache.rglob("*.arrow")), "which the dataset as a whole does leave"


def test_a_stream_is_read_once_and_no_further_than_asked_for(endless, tmp_path):
    for _ in range(2):
        source = Source("owner/endless", max_documents=5, validation_fraction=0.4, stream_to=tmp_path)
        assert list(source.documents()) == [f"text {i}" for i in (1, 2, 4, 5, 7)]
        assert len(list(source.documents("validation"))) == 2
    assert endless == list(range(8))
    assert len(copies(tmp_path)) == 1


def test_changed_files_are_streamed_again(parquet, tmp_path):
    before = list(Source(parquet, max_documents=2, stream_to=tmp_path / "cache").documents())
    path = Path(parquet) / "train-0.parquet"
    datasets.Dataset.from_dict({"text": ["another text"], "number": [3]}).to_parquet(path)
    assert before == TEXTS[:2]
    assert list(Source(parquet, max_documents=2, stream_to=tmp_path / "cache").documents()) == [
        "another text",
        TEXTS[25],
    ]


def test_a_run_on_a_stream_has_the_hash_and_the_split_of_what_it_read(parquet, tmp_path):
    options = {"vocab_size": 300, "context": 16, "validation_fraction": 0.2, "cache": tmp_path / "cache"}
    streamed = load_data(DataConfig(parquet, streaming=True, max_documents=10, **options))
    (tmp_path / "ten.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:10]))
    assert streamed.describe() == load_data(DataConfig(str(tmp_path / "ten.jsonl"), **options)).describe()
    assert streamed.describe()["validation"]["documents"] == 2


def test_validation_texts_in_a_file_beside_a_stream(parquet, tmp_path):
    (tmp_path / "valid.txt").write_text(TEXTS[0] * 10)
    config = DataConfig(
        parquet, str(tmp_path / "valid.txt"), True, vocab_size=300, context=16, cache=tmp_path / "cache"
    )
    assert load_data(config).describe()["validation"]["documents"] == 1


def test_streaming_of_what_is_no_dataset_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    with pytest.raises(
        ValueError, match=r"streaming: must be off, for data is no Hugging Face dataset: got '.*a\.txt'"
    ):
        load_data(DataConfig(str(tmp_path / "a.txt"), streaming=True, cache=tmp_path))
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"streaming: '.*saved' was written by save_to_disk"):
        load_data(DataConfig(str(tmp_path / "saved"), streaming=True, cache=tmp_path))


@pytest.mark.parametrize("stream", [True, False])
def test_columns_and_rows_that_hold_no_text_are_named(stream, tmp_path):
    (tmp_path / "named").mkdir()
    datasets.Dataset.from_dict({"text": ["one", None]}).to_parquet(tmp_path / "named" / "train.parquet")
    folder, stream_to = str(tmp_path / "named"), tmp_path / "cache" if stream else None
    with pytest.raises(ValueError, match=r"data: '.*named', row 1: 'text' must hold a string, not NoneType"):
        list(Source(folder, stream_to=stream_to).documents())
    with pytest.raises(ValueError, match=r"text_field: '.*named' has no column 'body', only \['text'\]"):
        list(Source(folder, text_field="body", stream_to=stream_to).documents())
    assert not list((tmp_path / "cache").glob("*")), "no part of a copy"


@pytest.mark.parametrize("stream", [True, False])
def test_damaged_files_are_one_line(stream, parquet, tmp_path):
    path = Path(parquet) / "train-1.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:50] + bytes(len(content) - 250) + content[-200:])
    with pytest.raises(ValueError, match=r"^data: '.*named' is (no file or folder and|not readable)[^\n]*$"):
        list(Source(parquet, stream_to=tmp_path / "cache" if stream else None).documents())


def test_documents_must_be_at_least_one():
    with pytest.raises(ValueError, match="max_documents must be at least 1: got 0"):
        DataConfig(max_documents=0)
