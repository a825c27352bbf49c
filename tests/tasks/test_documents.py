"""Every kind of input gives the same documents, and the split looks at nothing but their text."""

from __future__ import annotations

import json
import lzma
import sysconfig
from pathlib import Path

import pytest

from loglinear.tasks.lm.documents import Source

TEXTS = [f"Document {i}: " + "ä token and another. " * (i + 1) for i in range(40)]


def write_folder(folder: Path) -> str:
    for i, text in enumerate(TEXTS):
        path = folder / f"part{i // 10}" / f"{i:02}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "ignored.bin").write_bytes(b"\x00\xff")
    (folder / "empty.txt").touch()
    return str(folder)


def write_jsonl(folder: Path) -> str:
    lines = "".join(json.dumps({"text": text, "other": 1}) + "\n" for text in TEXTS)
    (folder / "all.jsonl").write_text(lines)
    return str(folder / "all.jsonl")


def write_jsonl_xz(folder: Path) -> str:
    path = Path(write_jsonl(folder))
    (folder / "all.jsonl.xz").write_bytes(lzma.compress(path.read_bytes()))
    return str(folder / "all.jsonl.xz")


def write_saved_dataset(folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(folder / "saved")
    return str(folder / "saved")


def write_parquet_dataset(folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    (folder / "named").mkdir()
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(folder / "named" / "train.parquet")
    return str(folder / "named")


@pytest.mark.parametrize(
    "write", [write_folder, write_jsonl, write_jsonl_xz, write_saved_dataset, write_parquet_dataset]
)
def test_every_kind_of_input_gives_the_same_documents(write, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert list(Source(write(tmp_path)).documents()) == TEXTS


def test_one_text_file_is_one_document(tmp_path):
    (tmp_path / "book.txt").write_bytes(b"caf\xc3\xa9 \xff end")
    assert list(Source(str(tmp_path / "book.txt")).documents()) == ["café \ufffd end"]


def test_stdlib_is_the_sources_of_this_python_and_nothing_installed():
    documents = set(Source("stdlib").documents())
    assert (Path(sysconfig.get_path("stdlib")) / "json" / "decoder.py").read_text(encoding="utf-8") in documents
    assert Path(pytest.__file__).read_text(encoding="utf-8") not in documents


def test_the_sides_partition_the_documents(tmp_path):
    source = Source(write_folder(tmp_path), validation_fraction=0.1)
    train, validation = list(source.documents("train")), list(source.documents("validation"))
    assert len(validation) == 4
    assert sorted(train + validation) == sorted(TEXTS)


def test_the_split_ignores_order_and_keeps_copies_on_one_side(tmp_path):
    before = Source(write_folder(tmp_path), validation_fraction=0.1)
    held_out = set(before.documents("validation"))
    lines = [json.dumps({"body": text}) + "\n" for text in [*reversed(TEXTS), *TEXTS]]
    (tmp_path / "twice.jsonl").write_text("".join(lines))
    after = Source(str(tmp_path / "twice.jsonl"), text_field="body", validation_fraction=0.1)
    assert set(after.documents("validation")) == held_out
    assert len(list(after.documents("validation"))) == 2 * len(held_out)
    assert after.hash != before.hash


def test_a_lone_document_gives_its_end_to_validation(tmp_path):
    (tmp_path / "book.txt").write_text("0123456789" * 10)
    source = Source(str(tmp_path / "book.txt"), validation_fraction=0.05)
    assert list(source.documents("train")) == ["0123456789" * 9 + "01234"]
    assert list(source.documents("validation")) == ["56789"]


def test_the_hash_follows_every_character(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = Source(str(path)).hash
    assert Source(str(path)).hash == first
    path.write_text("onf")
    assert Source(str(path)).hash != first


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("./missing.txt", FileNotFoundError, "data: no file or folder './missing.txt'"),
        ("far/away/folder", FileNotFoundError, "data: no file or folder 'far/away/folder'"),
        ("EMPTY", ValueError, "data: no text found in"),
        ("BAD_JSON", ValueError, r"bad\.jsonl, line 2 is not a JSON object with a string field 'text'"),
        ("CUT_OFF", ValueError, r"data: .*cut\.jsonl\.xz is not a whole \.xz file"),
        ("NOT_XZ", ValueError, r"data: .*not\.txt\.xz is not a whole \.xz file"),
        ("NO_FIELD", ValueError, r"none\.jsonl, line 1 is not a JSON object with a string field 'text'"),
    ],
)
def test_unusable_input_is_named(data, error, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    (tmp_path / "none.jsonl").write_text('{"content": "elsewhere"}\n')
    whole = lzma.compress(b'{"text": "fine"}\n' * 1000)
    (tmp_path / "cut.jsonl.xz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "not.txt.xz").write_bytes(b"text")
    named = {"CUT_OFF": tmp_path / "cut.jsonl.xz", "NOT_XZ": tmp_path / "not.txt.xz"}
    paths = named | {
        "EMPTY": tmp_path / "empty",
        "BAD_JSON": tmp_path / "bad.jsonl",
        "NO_FIELD": tmp_path / "none.jsonl",
    }
    with pytest.raises(error, match=message):
        _ = Source(str(paths.get(data, data))).hash


def test_a_dataset_without_the_field_says_which_it_has(tmp_path):
    path = write_saved_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"text_field: .* has no column 'body', only \['text'\]"):
        _ = Source(path, text_field="body").hash
