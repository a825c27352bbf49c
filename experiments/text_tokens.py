"""Token ids for ``text_stacks.py`` from C files: ``python experiments/text_tokens.py FOLDER OUT [--tokens 16000000]``.

FOLDER holds linux-c-long.{train,valid}.jsonl.xz. A byte-level BPE of 2,048 words is trained on the first 80 training files.
Writes OUT/{train,valid}.npy, uint16 ids with token 0 behind each document, and OUT/{train,valid}_offsets.npy, where documents
begin.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

WORDS, LEARNED_FROM, END = 2048, 80, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=16_000_000, help="training tokens at least, in whole files")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = learned(islice(documents(options.folder, "train"), LEARNED_FROM))
    tokenizer.save(str(options.out / "tokenizer.json"))
    for side, tokens in (("train", options.tokens), ("valid", None)):
        ids, offsets = encoded(tokenizer, documents(options.folder, side), tokens)
        np.save(options.out / f"{side}.npy", ids)
        np.save(options.out / f"{side}_offsets.npy", offsets)
        print(f"{side}: {len(ids):,} tokens, {len(offsets) - 1:,} files")


def documents(folder: Path, side: str) -> Iterator[str]:
    with lzma.open(folder / f"linux-c-long.{side}.jsonl.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def learned(texts: Iterator[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encoded(tokenizer: Tokenizer, texts: Iterator[str], tokens: int | None) -> tuple[np.ndarray, np.ndarray]:
    """uint16 ids and int64 offsets of whole documents, until there are ``tokens``."""
    parts: list[np.ndarray] = []
    offsets = [0]
    for text in texts:
        parts.append(np.array([*tokenizer.encode(text).ids, END], np.uint16))
        offsets.append(offsets[-1] + len(parts[-1]))
        if tokens is not None and offsets[-1] >= tokens:
            break
    return np.concatenate(parts), np.array(offsets)


if __name__ == "__main__":
    main()
