"""Samples: needles hidden in real text, and the question at its end.

    text ... \\nThe magic number of quiet-harbour is 4018263.\\n ... text \\nThe magic number of quiet-harbour is| 4018263

A sample is put together from token ids, not from text. The ids of a key and of a value are therefore the same in the needle and
in the question for every tokenizer, and every sample has exactly the requested length. Training and test draw from different
keys and values: a hash of the text decides the side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from loglinear.tasks.lm.tokens import Tokens
from loglinear.tasks.niah.config import KINDS, GridConfig, Kind, TaskConfig, TuneConfig
from loglinear.tasks.niah.words import ADJECTIVES, NOUNS

Side = Literal["train", "test"]


@dataclass(frozen=True)
class Sample:
    """One text with its question and answer.

    ids: int64 ``[context]``; the answer is its end. spans: ``[start, stop)`` of the tokens of each value of the answer.
    depth: share of the haystack before the needle that is asked for; for multi-value, before value number ``placed``.
    """

    ids: np.ndarray
    spans: tuple[tuple[int, int], ...]
    kind: Kind
    depth: float
    placed: int
    key: str
    values: tuple[str, ...]

    @property
    def answer_start(self) -> int:
        return self.spans[0][0]


class Haystack:
    """Running text of any length, from documents that are repeated if they are too few.

    The end-of-text tokens are left out, because a model may forget the past behind such a token.
    """

    def __init__(self, tokens: Tokens, end_of_text: int):
        if len(tokens.values) <= tokens.num_documents:
            raise ValueError("data: the haystack needs at least one token of text on each side of the split")
        self.values, self.end_of_text = tokens.values, end_of_text

    def cut(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """``length`` tokens of text from a random place on, int64."""
        start = int(rng.integers(len(self.values)))
        pieces: list[np.ndarray] = []
        while length:
            piece = np.asarray(self.values[start : start + length])
            start = (start + len(piece)) % len(self.values)
            piece = piece[piece != self.end_of_text]
            pieces.append(piece.astype(np.int64))
            length -= len(piece)
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def side_of(text: str) -> Side:
    """The side that a key or value belongs to: half of all are for training, the other half for the test."""
    return "test" if hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % 2 else "train"


def draw_number(side: Side, rng: np.random.Generator) -> str:
    """Seven digits, the first not 0."""
    while side_of(text := str(rng.integers(1_000_000, 10_000_000))) != side:
        pass
    return text


def draw_words(side: Side, rng: np.random.Generator) -> str:
    """An adjective and a noun: 4,096 pairs."""
    while side_of(text := f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}") != side:
        pass
    return text


class Samples:
    """Makes samples of one side from a haystack of that side."""

    def __init__(self, haystack: Haystack, tokenizer: PreTrainedTokenizerFast, side: Side, task: TaskConfig):
        self.haystack, self.tokenizer, self.side, self.task = haystack, tokenizer, side, task

    def make(self, kind: Kind, context: int, depth: float, rng: np.random.Generator) -> Sample:
        """A sample of ``context`` tokens with the needle asked for at ``depth`` in [0, 1].

        The other needles stand anywhere. Raises ValueError if needles and question do not fit into ``context``.
        """
        keys, values = self._draw(kind, rng)
        noun = "word" if kind == "word" else "number"
        starts = [self._encode(f"\nThe magic {noun} of {key} is") for key in keys]
        ends = [self._encode(f" {value}") for value in values]
        needles = [[*start, *end, *self._encode(".\n")] for start, end in zip(starts, ends)]
        # The first needle is the one at `depth`.
        depths = [depth, *rng.uniform(size=len(needles) - 1)]
        order = sorted(range(len(needles)), key=depths.__getitem__)
        if kind == "multi-value":
            question, asked = self._encode(f"\nThe magic numbers of {keys[0]} are"), order
        else:
            question, asked = starts[0], [0]
        tail, spans = list(question), []
        for number, i in enumerate(asked):
            tail += self._encode(",") if number else []
            spans.append((len(tail), len(tail) + len(ends[i])))
            tail += ends[i]

        room = context - len(tail) - sum(map(len, needles))
        if room < 1:
            raise ValueError(
                f"contexts must be at least {context - room + 1} tokens for {kind} with this tokenizer: got {context}"
            )
        text = self.haystack.cut(room, rng)
        pieces, last = [], 0
        for i in order:
            place = round(depths[i] * room)
            pieces += [text[last:place], needles[i]]
            last = place
        ids = np.concatenate([*pieces, text[last:], tail]).astype(np.int64)
        first = context - len(tail)
        return Sample(
            ids=ids,
            spans=tuple((first + start, first + stop) for start, stop in spans),
            kind=kind,
            depth=float(depth),
            placed=asked.index(0),
            key=keys[0],
            values=tuple(values[i] for i in asked),
        )

    def _draw(self, kind: Kind, rng: np.random.Generator) -> tuple[list[str], list[str]]:
        """Keys and values of all needles, different from each other; the first key is the one asked for."""
        count = self.task.needles if kind.startswith("multi") else 1
        draw_value = draw_words if kind == "word" else draw_number
        values = _distinct(draw_value, count, self.side, rng)
        keys = _distinct(draw_words, count if kind == "multi-key" else 1, self.side, rng)
        return (keys if kind == "multi-key" else keys * count), values

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _distinct(
    draw: Callable[[Side, np.random.Generator], str], count: int, side: Side, rng: np.random.Generator
) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(side, rng)] = None
    return list(found)


def grid_samples(samples: Samples, grid: GridConfig) -> Iterator[Sample]:
    """The samples of a test, shortest first. Each depends on the seed and its own place in the grid only."""
    depths = np.linspace(0, 1, grid.depths)
    for context in sorted(set(grid.contexts)):
        for kind in dict.fromkeys(samples.task.kinds):
            for row, depth in enumerate(depths):
                for i in range(grid.samples):
                    place = [samples.task.seed, 1, context, KINDS.index(kind), row, grid.depths, i]
                    yield samples.make(kind, context, float(depth), np.random.default_rng(place))


def training_batch(samples: Samples, tune: TuneConfig, forward_pass: int) -> list[Sample]:
    """The samples of one forward pass: one length, any kinds and depths. They depend on the seed and its number only."""
    rng = np.random.default_rng([samples.task.seed, 0, forward_pass])
    context = int(rng.choice(tune.contexts))
    kinds = samples.task.kinds
    return [
        samples.make(kinds[rng.integers(len(kinds))], context, float(rng.uniform()), rng)
        for _ in range(max(1, tune.batch_tokens // context))
    ]
