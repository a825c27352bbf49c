"""Hugging Face datasets: texts of the ``train`` split, by NAME, NAME:CONFIG or from a folder that `datasets` wrote.

`datasets` copies a whole dataset into its own cache before it gives the first row. A stream is copied here, row by row and
compressed, up to a number of documents. The hash, the split and a new tokenizer need the texts more than once and read this
copy. The copy takes less room than the tokens made of it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from loglinear.tasks.lm.atomic import atomic_folder
from loglinear.tasks.lm.text_files import check_text, read_file


def is_dataset(folder: Path) -> bool:
    """Whether `datasets` wrote this folder: by ``save_to_disk``, or as Parquet files."""
    return _is_saved(folder) or any(folder.rglob("*.parquet"))


def read_dataset(name: str, text_field: str) -> Iterator[str]:
    """The texts of a dataset, in order, through the cache of `datasets`."""
    import datasets

    with _one_line(name, "no file or folder and no dataset that loads"):
        if _is_saved(Path(name)):
            loaded = datasets.load_from_disk(name)
            rows = loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(*_path_and_config(name), split="train")
    return _texts(rows, name, text_field)


def read_stream(name: str, text_field: str, most: int | None, cache: Path) -> Iterator[str]:
    """The first ``most`` texts of a dataset, from a copy in ``cache``. The copy is made unless these very files have one."""
    import datasets

    if _is_saved(Path(name)):
        raise ValueError(
            f"streaming: {name!r} was written by save_to_disk and is read where it is; leave streaming out"
        )
    with _one_line(name, "no file or folder and no dataset that loads"):
        builder = datasets.load_dataset_builder(*_path_and_config(name))
        stream = builder.as_streaming_dataset(split="train")
    # The hash of a builder identifies its files, by their commit on the hub or their times on this disk.
    identity = json.dumps([name, builder.config_id, builder.hash, text_field, most])
    folder = cache / f"stream-{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}"
    if not folder.exists():
        with atomic_folder(folder) as unfinished:
            texts = _texts(stream, name, text_field)
            with gzip.open(unfinished / "texts.jsonl.gz", "wt", compresslevel=3, encoding="utf-8") as file:
                file.writelines(
                    json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in islice(filter(None, texts), most)
                )
    return read_file(folder / "texts.jsonl.gz", "text")


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _path_and_config(name: str) -> tuple[str, str | None]:
    if Path(name).is_dir():
        return name, None
    path, _, config = name.partition(":")
    return path, config or None


@contextmanager
def _one_line(name: str, otherwise: str) -> Iterator[None]:
    """Errors of `datasets` in the block become a ValueError whose message is one line."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ValueError(f"data: {name!r} is {otherwise}: {reason}") from error


def _texts(rows: Any, name: str, text_field: str) -> Iterator[str]:
    columns = rows.column_names  # a stream may not know its columns before its first row
    if columns is not None:
        if text_field not in columns:
            raise ValueError(f"text_field: {name!r} has no column {text_field!r}, only {columns}")
        rows = rows.select_columns([text_field])  # the others need not be decoded
    for number, row in enumerate(_until_damaged(rows, name)):
        if text_field not in row:
            raise ValueError(f"text_field: {name!r} has no column {text_field!r}, only {list(row)}")
        yield check_text(row[text_field], f"data: {name!r}, row {number}", text_field)


def _until_damaged(rows: Any, name: str) -> Iterator[dict]:
    with _one_line(name, "not readable to its end"):
        yield from rows
