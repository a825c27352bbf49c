"""Every kind of input gives the same documents, and the split looks at nothing but their text."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import re
import sysconfig
from pathlib import Path

import pytest

from loglinear.tasks.lm.config import DataConfig
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


def write_jsonl_gz(folder: Path) -> str:
    path = Path(write_jsonl(folder))
    (folder / "all.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    return str(folder / "all.jsonl.gz")


def write_json_lines(folder: Path) -> str:
    return str(Path(write_jsonl(folder)).rename(folder / "all.json"))


def write_compressed_folder(folder: Path) -> str:
    for i, text in enumerate(TEXTS):
        compress, suffix = ((gzip.compress, "gz"), (lzma.compress, "xz"))[i % 2]
        (folder / f"{i:02}.txt.{suffix}").write_bytes(compress(text.encode()))
    return str(folder)


def write_pattern(folder: Path) -> str:
    return f"{write_folder(folder)}/**/[0-9]*.txt"


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
    "write",
    [
        write_folder,
        write_compressed_folder,
        write_pattern,
        write_jsonl,
        write_jsonl_gz,
        write_jsonl_xz,
        write_json_lines,
        write_saved_dataset,
        write_parquet_dataset,
    ],
)
def test_every_kind_of_input_gives_the_same_documents(write, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert list(Source(write(tmp_path)).documents()) == TEXTS


def test_one_text_file_is_one_document(tmp_path):
    (tmp_path / "book.txt").write_bytes(b"caf\xc3\xa9 \xef\xbf\xbd end")
    assert list(Source(str(tmp_path / "book.txt")).documents()) == ["café \ufffd end"]


def test_several_names_are_read_in_their_order_and_no_file_twice(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a.txt", "c/x.txt", "c/y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "lines.jsonl").write_text('{"text": "line 1"}\n{"text": "line 2"}\n')

    def read(*names: str) -> list[str]:
        return list(Source(tuple(f"{tmp_path}/{name}" for name in names)).documents())

    assert read("lines.jsonl", "b", "a.txt") == ["line 1", "line 2", "b/10.txt", "b/2.txt", "a.txt"]
    assert read("c/y.txt", "*", "c/?.txt") == ["c/y.txt", "a.txt", "b/10.txt", "b/2.txt", "c/x.txt", "line 1", "line 2"]
    assert read("a.txt", "b/../a.txt") == ["a.txt"]


def test_a_name_that_is_there_is_no_pattern(tmp_path):
    for name in ("a[1].txt", "a1.txt"):
        (tmp_path / name).write_text(name)
    assert list(Source(f"{tmp_path}/a[1].txt").documents()) == ["a[1].txt"]


def test_one_name_in_a_tuple_is_that_name(tmp_path):
    single = DataConfig("a.txt", "b.txt")
    assert DataConfig(("a.txt",), ("b.txt",), cache=single.cache) == single
    assert DataConfig(("a.txt", "c.txt")).data == ("a.txt", "c.txt")


def test_no_more_documents_than_asked_for_are_read(tmp_path):
    source = Source((write_jsonl(tmp_path), write_folder(tmp_path)), max_documents=43, validation_fraction=0.1)
    assert list(source.documents()) == [*TEXTS, *TEXTS[:3]]
    assert sorted([*source.documents("train"), *source.documents("validation")]) == sorted([*TEXTS, *TEXTS[:3]])
    assert source.hash != Source(source.data).hash


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
    ("data", "message"),
    [
        ("./missing.txt", "data: no file or folder './missing.txt'"),
        ("far/away/folder", "data: no file or folder 'far/away/folder'"),
        ("missing.txt.gz", "data: no file or folder 'missing.txt.gz'"),
        (("FOLDER/a.txt", "FOLDER/b.txt"), r"data: no file or folder '.*/b\.txt'"),
        (("FOLDER/a.txt", "FOLDER/**/*.md"), r"data: nothing matches '.*/\*\*/\*\.md'"),
        (("FOLDER/a.txt", "FOLDER/empty"), r"data: no text found in '.*/empty': no file ends in one of \.txt, "),
    ],
)
def test_what_is_not_there_is_named(data, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("a")
    names = [name.replace("FOLDER", str(tmp_path)) for name in ([data] if isinstance(data, str) else data)]
    with pytest.raises(FileNotFoundError, match=message):
        _ = Source(tuple(names)).hash


LINES = b"".join(b'{"text": "%d"}\n' % random.Random(i).getrandbits(200) for i in range(1000))
BAD_LINE = b'{"text": "fine"}\n{"text": "\xff"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", b"", "data: no text found in '.*none.txt'"),
        (
            "bad.jsonl",
            b'{"text": "fine"}\nnot json\n',
            "data: FILE, line 2 is not a JSON object with a string field 'text'",
        ),
        (
            "none.json",
            b'{"content": "elsewhere"}',
            "data: FILE, line 1 is not a JSON object with a string field 'text'",
        ),
        ("number.jsonl", b'{"text": 3}', "data: FILE, line 1: 'text' must hold a string, not int"),
        ("latin.txt", "café".encode("latin-1"), "data: FILE is not UTF-8 text: byte 3 is 0xe9$"),
        ("binary.txt", b"ab\0cd", "data: FILE is not UTF-8 text: byte 2 is 0x00$"),
        ("end.txt", "1 + €".encode()[:-1], "data: FILE is not UTF-8 text: byte 4 is 0xe2$"),
        ("wide.txt", "text".encode("utf-16"), "data: FILE is not UTF-8 text: byte 0 is 0xff$"),
        ("bad.jsonl", BAD_LINE, "data: FILE, line 2 is not UTF-8 text: byte 27 is 0xff$"),
        ("bad.jsonl.gz", gzip.compress(BAD_LINE, mtime=0), "data: FILE, line 2 is not UTF-8 text: byte 27 is 0xff$"),
        (
            "half.jsonl",
            rb'{"text": "a \ud83d"}',
            r"FILE, line 1: 'text' holds half of a surrogate pair \(U\+D83D\) at character 2",
        ),
        ("gz.txt", gzip.compress(LINES, mtime=0), r"FILE is not UTF-8 text: byte .* its name must end in \.gz"),
        ("xz.jsonl", lzma.compress(LINES), r"FILE, line 1 is not UTF-8 text: byte .* its name must end in \.xz"),
        ("cut.jsonl.xz", lzma.compress(LINES)[:-5000], r"data: FILE is not a whole \.xz file: "),
        ("cut.jsonl.gz", gzip.compress(LINES, mtime=0)[:-5000], r"data: FILE is not a whole \.gz file: "),
        (
            "damaged.txt.gz",
            gzip.compress(LINES, mtime=0)[:5000] + bytes(5000),
            r"data: FILE is not a whole \.gz file: ",
        ),
        ("not.txt.xz", b"text", r"data: FILE is not a whole \.xz file: "),
        ("not.txt.gz", b"text", r"data: FILE is not a whole \.gz file: "),
        ("empty.txt.gz", b"", r"data: FILE is not a whole \.gz file: it is empty"),
        ("called.txt.gz", lzma.compress(b"text"), r"data: FILE is not a whole \.gz file: "),
        ("called.txt.xz", gzip.compress(b"text", mtime=0), r"data: FILE is not a whole \.xz file: "),
    ],
)
@pytest.mark.parametrize("within", ["alone", "folder"])
def test_what_is_no_text_is_named_with_its_place(name, content, message, within, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    if within == "folder" and content:
        (tmp_path / "a.txt").write_text("fine")
    message = message.replace("FILE", re.escape(str(path)))
    source = Source(str(path) if within == "alone" or not content else str(tmp_path), (".txt", ".jsonl", ".json"))
    with pytest.raises(ValueError, match=message):
        _ = source.hash


def test_a_dataset_without_the_field_says_which_it_has(tmp_path):
    path = write_saved_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"text_field: .* has no column 'body', only \['text'\]"):
        _ = Source(path, text_field="body").hash
