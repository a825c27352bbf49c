"""Tokens: documents tokenized once into a memory-mapped file, and that file cut into sequences.

A document is its tokens followed by the end-of-text token. Log-linear attention's levels depend on the position in the
sequence, so the cut decides what a model can learn:

* ``stream``: documents are joined end to end and cut every ``context`` tokens. Every sequence is full and is one tree:
  position 0 is where the sequence starts, wherever that falls in a document, and a sequence may hold several documents.
  Left over are the last tokens of the stream, fewer than ``context``.
* ``document``: the same cut inside each document, so a sequence never crosses a border and every position has its own
  document as its past. Left over are the documents shorter than ``context`` and the ends of the others.

The number of tokens left over is kept as ``Windows.tail`` and reported; nothing else is dropped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from loglinear.tasks.lm.atomic import atomic_folder, write_atomically
from loglinear.tasks.lm.config import Packing
from loglinear.tasks.lm.documents import Side, Source
from loglinear.tasks.lm.tokenizer import num_ids, tokenizer_hash

DOCUMENTS_PER_CALL = 256  # enough to keep all cores of the tokenizer busy


@dataclass(frozen=True)
class Tokens:
    """All tokens of one side of a source.

    values: ``[num_tokens]`` uint16 or uint32, memory-mapped. offsets: ``[num_documents + 1]`` int64; document ``i`` is
    ``values[offsets[i]:offsets[i + 1]]``.
    """

    values: np.ndarray
    offsets: np.ndarray

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1


def tokenize(source: Source, side: Side, tokenizer: PreTrainedTokenizerFast, cache: Path) -> Tokens:
    """The tokens of one side of ``source``, written to ``cache`` the first time and mapped from there afterwards."""
    share = "" if side == "all" else f"-{source.validation_fraction}"
    folder = cache / f"tokens-{source.hash}-{tokenizer_hash(tokenizer)}-{side}{share}"
    if not folder.exists():
        with atomic_folder(folder) as unfinished:
            _write_tokens(source, side, tokenizer, unfinished)
    dtype = json.loads((folder / "format.json").read_text(encoding="utf-8"))["dtype"]
    offsets = np.load(folder / "offsets.npy")
    # An empty file cannot be mapped.
    values = np.memmap(folder / "values.bin", dtype, mode="r") if offsets[-1] else np.empty(0, dtype)
    return Tokens(values, offsets)


def _write_tokens(source: Source, side: Side, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    dtype = np.uint16 if num_ids(tokenizer) <= 2**16 else np.uint32
    lengths = []
    documents = source.documents(side)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    table = _ascii_table(tokenizer)
    with (folder / "values.bin").open("wb") as file:
        while batch := list(islice(documents, DOCUMENTS_PER_CALL)):
            if table is not None and all(map(str.isascii, batch)):
                for text in batch:
                    file.write(table[np.frombuffer(text.encode("ascii"), np.uint8)].astype(dtype).tobytes())
                    file.write(np.asarray([tokenizer.eos_token_id], dtype).tobytes())
                    lengths.append(len(text) + 1)
                continue
            # The ordinary call also computes offsets of characters and takes twice as long.
            for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
                file.write(np.asarray([*encoding.ids, tokenizer.eos_token_id], dtype).tobytes())
                lengths.append(len(encoding.ids) + 1)
    np.save(folder / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    write_atomically(folder / "format.json", json.dumps({"dtype": np.dtype(dtype).name}))


def _ascii_table(tokenizer: PreTrainedTokenizerFast) -> np.ndarray | None:
    """The id of each ASCII character, ``[128]``, of a tokenizer that has no longer tokens; otherwise None.

    A chromosome is one word of millions of characters, for which the tokenizer needs a hundred bytes a character.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE" or model["merges"]:
        return None
    ids = [tokenizer.backend_tokenizer.encode(chr(code), add_special_tokens=False).ids for code in range(128)]
    return np.array(ids).squeeze(1) if all(len(one) == 1 for one in ids) else None


class Windows(Dataset):
    """Sequences of exactly ``context`` tokens; the module's docstring says how ``packing`` cuts them.

    Item ``i`` is ``{"input_ids", "labels"}``, both int64 ``[context]`` and equal: the model shifts, so a sequence holds
    ``context - 1`` predictions. ``tail`` is the number of tokens in no sequence. Raises ValueError if none fits.
    """

    def __init__(self, tokens: Tokens, context: int, packing: Packing = "stream"):
        borders = tokens.offsets if packing == "document" else tokens.offsets[[0, -1]]
        lengths = np.diff(borders)
        counts = lengths // context
        if not counts.sum():
            longest, unit = lengths.max(initial=0), "longest document" if packing == "document" else "data"
            raise ValueError(f"context must be at most {longest}, the tokens of the {unit}: got {context}")
        first = np.cumsum(counts) - counts  # index of the first sequence of each piece
        index = np.arange(counts.sum())
        self.starts = np.repeat(borders[:-1], counts) + (index - np.repeat(first, counts)) * context
        self.tokens = tokens
        self.context = context
        self.tail = int(lengths.sum() - counts.sum() * context)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = self.starts[index]
        ids = torch.from_numpy(self.tokens.values[start : start + self.context].astype(np.int64))
        return {"input_ids": ids, "labels": ids}

    def thin(self, count: int) -> None:
        """Keep at most ``count`` sequences, evenly spread."""
        kept = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        self.starts = self.starts[kept]

    def describe(self) -> dict[str, int]:
        """Counts for records: documents, tokens, sequences, and the tokens left over."""
        return {
            "documents": self.tokens.num_documents,
            "tokens": len(self.tokens.values),
            "sequences": len(self),
            "tail_tokens": self.tail,
        }
