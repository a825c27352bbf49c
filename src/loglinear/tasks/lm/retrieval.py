"""Exact retrieval from real files: a definition is asked for again after a given number of tokens.

    #define BITMASK_SIZE 32 ... the file goes on for `distance` tokens ... #define BITMASK_SIZE| 32

Question and answer are the exact tokens of the definition. The text in between comes from the rest of the file, and then from
the files after it. The same sequence without the definition ("without") shows how much a model guesses.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from loglinear.tasks.lm.evaluation import column_logits, share_error, to_device
from loglinear.tasks.style import canvas, colors_of, label_ends, save, styled, token_axis

LEAD = 256  # tokens of the file kept before the definition
BATCH_TOKENS = 65536  # of a forward pass
PADDING = 256  # sequences are padded to a multiple of this, because every new length sets up kernels and scratch again
PER_FILE = 4  # questions from one file at most, so that no file with a table of constants decides the score
# `#define NAME value` of C, `NAME = value` of Python. A value of one character is too easily guessed.
DEFINITION = re.compile(
    r"^[ \t]*(?:#[ \t]*define[ \t]+(?P<c>[A-Za-z_]\w{3,})[ \t]+|(?P<py>[A-Z_][A-Z0-9_]{3,})[ \t]*=[ \t]*)"
    r"(?P<value>[-\w.\"'()]{2,24})[ \t]*(?:(?:/[/*]|#).*)?$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Question:
    """One sequence: int64 ``ids``. The model is asked for ``ids[answer:]``. ``distance`` counts tokens from answer to answer.

    ``own``: share of the tokens in between that are of the file itself.
    """

    ids: np.ndarray
    answer: int
    distance: int
    own: float
    name: str
    value: str

    def without(self, lead: int, length: int) -> Question:
        """The same question without the definition, which is the ``length`` tokens from ``lead`` on."""
        ids = np.concatenate([self.ids[:lead], self.ids[lead + length :]])
        return Question(ids, self.answer - length, self.distance, self.own, self.name, self.value)


@dataclass(frozen=True)
class Definition:
    """Tokens ``start .. stop`` of a file are ``head`` and value of a definition; the value begins at token ``value_at``."""

    start: int
    value_at: int
    stop: int
    name: str
    value: str


@dataclass
class _File:
    """Tokens of a file and of those after it, the definitions to ask for, and where a later file defines a name again."""

    ids: list[int]
    definitions: list[Definition]
    own: int
    redefined: dict[str, int]

    def extend(self, ids: list[int], names: Iterable[str]) -> None:
        for name in names:
            self.redefined.setdefault(name, len(self.ids))
        self.ids.extend(ids)


def definitions(
    text: str, offsets: Sequence[tuple[int, int]], pattern: re.Pattern[str] = DEFINITION
) -> tuple[list[Definition], Counter[str]]:
    """Definitions of ``text``, tokenized with these character ``offsets``, and how often each name is defined.

    pattern: of a definition; its group "value" is the value, and the first other group that matches is the name.
    A name is left out if it is defined twice, or if its definition does not begin and end at borders of tokens.
    """
    groups = [group for group in pattern.groupindex if group != "value"]
    matches = [(match, next(group for group in groups if match[group])) for match in pattern.finditer(text)]
    names = Counter(match[group] for match, group in matches)
    starts, stops = np.array(offsets).reshape(-1, 2).T
    found = []
    for match, group in matches:
        line = text.rfind("\n", 0, match.start(group)) + 1
        start = int(np.searchsorted(stops, line, side="right"))
        value_at = int(np.searchsorted(stops, match.start("value"), side="right"))
        stop = int(np.searchsorted(starts, match.end("value"), side="left"))
        whole = (
            start < value_at < stop and starts[value_at] >= match.end(group) and stops[stop - 1] == match.end("value")
        )
        if whole and names[match[group]] == 1:
            found.append(Definition(start, value_at, stop, match[group], match["value"]))
    return found, names


def questions(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    distances: Sequence[int],
    samples: int,
    seed: int = 0,
    pattern: re.Pattern[str] = DEFINITION,
) -> Iterator[tuple[Question, Question]]:
    """Questions about ``samples`` definitions at each distance, every one with and without its definition in sight.

    A file is used with the files after it, as far as they are needed. A distance at which a later file has defined the
    name again is left out.
    """
    rng = np.random.default_rng(seed)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    waiting: deque[_File] = deque()
    left = samples
    for text in documents:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = encoded["input_ids"]
        found, names = definitions(text, encoded["offset_mapping"], pattern)
        for file in waiting:
            file.extend(ids, names)
        if found:
            chosen = [found[i] for i in sorted(rng.permutation(len(found))[:PER_FILE])]
            waiting.append(_File(list(ids), chosen, len(ids), {}))
        while waiting and len(waiting[0].ids) >= waiting[0].definitions[-1].value_at + max(distances):
            file = waiting.popleft()
            for definition in file.definitions[:left]:
                for distance in distances:
                    if file.redefined.get(definition.name, len(file.ids)) >= definition.value_at + distance:
                        yield _ask(file, definition, distance, newline)
            left = max(0, left - len(file.definitions))
        if not left:
            return


def _ask(file: _File, definition: Definition, distance: int, newline: list[int]) -> tuple[Question, Question]:
    head = file.ids[definition.start : definition.value_at]
    value = file.ids[definition.value_at : definition.stop]
    start = max(0, definition.start - LEAD)
    end = definition.value_at + distance - len(newline) - len(head)
    if end <= definition.stop:
        raise ValueError(f"distances must leave room for definition and question: got {distance}")
    ids = np.array([*file.ids[start:end], *newline, *head, *value], np.int64)
    own = (min(file.own, end) - definition.stop) / (end - definition.stop)
    question = Question(ids, len(ids) - len(value), distance, own, definition.name, definition.value)
    return question, question.without(definition.start - start, definition.stop - definition.start)


@torch.inference_mode()
def retrieve(
    model: PreTrainedModel,
    pairs: Iterable[tuple[Question, Question]],
    dtype: torch.dtype = torch.float32,
    on_question: Callable[[int], None] | None = None,
) -> list[dict]:
    """Ask every question once with and once without its definition. Questions of one distance run side by side.

    Each distance has a row. ``exact`` and ``without`` are shares, with standard errors, of questions with and without the
    definition: the likeliest token is right at every place of the value, so greedy decoding would write the value. The
    losses of the value are in nats per token. ``own`` is the share of the text in between that is of the same file.
    ``right`` has a number for each question with its definition, in order: 1 if it was answered exactly, otherwise 0.
    ``on_question`` is called with the number of questions asked.
    """
    model.eval()
    waiting: dict[int, list[Question]] = {}
    answers: dict[int, list[Tensor]] = {}
    own: dict[int, list[float]] = {}
    for number, pair in enumerate(pairs, start=1):
        distance = pair[0].distance
        queue = waiting.setdefault(distance, [])
        queue.extend(pair)
        own.setdefault(distance, []).append(pair[0].own)
        if len(queue) * _padded(queue) >= BATCH_TOKENS:
            answers.setdefault(distance, []).extend(_answer_all(model, queue, dtype))
            queue.clear()
        if on_question is not None:
            on_question(number)
    for distance, queue in waiting.items():
        answers.setdefault(distance, []).extend(_answer_all(model, queue, dtype))
    if not own:
        raise ValueError(
            "measures: retrieval found no definition (#define NAME value, NAME = value) with enough text after it; "
            "give more text or shorter distances"
        )
    return [_row(distance, torch.cat(answers[distance]).cpu().numpy(), own[distance]) for distance in sorted(own)]


def value_logits(model: PreTrainedModel, asked: Sequence[Question], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """float32 ``[n, vocabulary]`` logits of all tokens of the values, these tokens ``[n]`` and their questions ``[n]``.

    length: to which questions are padded. Padding stands behind the values, where no token of a causal model sees it.
    """
    device = next(model.parameters()).device
    ids = torch.zeros(len(asked), length, dtype=torch.long)
    for row, question in zip(ids, asked):
        row[: len(question.ids)] = torch.from_numpy(question.ids)
    row_of, place = np.array(
        [(row, place) for row, question in enumerate(asked) for place in range(question.answer, len(question.ids))]
    ).T
    ids, rows, places = (to_device(x, device) for x in (ids, torch.from_numpy(row_of), torch.from_numpy(place)))
    columns, column_of = torch.unique(places - 1, return_inverse=True)
    return column_logits(model, ids, columns)[rows, column_of].float(), ids[rows, places], rows


def _row(distance: int, answers: np.ndarray, own: list[float]) -> dict:
    """``answers [2 · questions, 2]``: exact and loss, of each question with its definition and then without."""
    (exact, loss), (guessed, guess_loss) = (answers[start::2].T.astype(np.float64) for start in (0, 1))
    values = {"exact": exact, "without": guessed, "loss": loss, "loss_without": guess_loss, "own": np.array(own)}
    means = {name: float(value.mean()) for name, value in values.items()}
    errors = {f"{name}_standard_error": share_error(means[name], len(own)) for name in ("exact", "without")}
    right = "".join("01"[int(hit)] for hit in exact)
    return {"distance": distance, "questions": len(own), **means, **errors, "right": right}


def _padded(asked: Sequence[Question]) -> int:
    """Tokens of the longest question, up to a multiple of ``PADDING``."""
    return -(-max(len(question.ids) for question in asked) // PADDING) * PADDING


def _answer_all(model: PreTrainedModel, asked: Sequence[Question], dtype: torch.dtype) -> Iterator[Tensor]:
    """``[questions, 2]`` for each forward pass: 1 where the whole value is right, and its loss. They stay on the device."""
    if not asked:
        return
    length = _padded(asked)
    device = next(model.parameters()).device
    size = max(1, BATCH_TOKENS // length)
    for start in range(0, len(asked), size):
        batch = asked[start : start + size]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits, targets, rows = value_logits(model, batch, length)
        losses = cross_entropy(logits, targets, reduction="none")
        by_place = torch.stack([(logits.argmax(-1) != targets).float(), losses, torch.ones_like(losses)])
        wrong, loss, count = by_place @ one_hot(rows, len(batch)).float()
        yield torch.stack([(wrong == 0).float(), loss / count], dim=1)


@styled
def draw_retrieval(results: dict[str, list[dict]], path: Path) -> list[Path]:
    """Save PNG and SVG of the share of exact values by distance; dashed, what a model guesses without the definition."""
    name, rows = next(iter(results.items()))
    parts = [f"{row['exact']:.0%} of values at {row['distance']:,} tokens" for row in (rows[0], rows[-1])]
    figure, panels = canvas(f"{name} gives back {' and '.join(dict.fromkeys(parts))}", size=(5.0, 3.0), right=2.8)
    panel, colors, ends = panels[0, 0], colors_of(results), []
    for name, rows in results.items():
        distance = np.array([row["distance"] for row in rows])
        for field, style, label in (("exact", "-", name), ("without", "--", f"{name}, no definition")):
            share = np.array([row[field] for row in rows])
            error = np.array([row[f"{field}_standard_error"] for row in rows])
            panel.plot(distance, share, style, color=colors[name], marker=".")
            panel.fill_between(distance, share - error, share + error, alpha=0.2, color=colors[name], linewidth=0)
            ends.append((share[-1], label, colors[name]))
    share_axes(panel, [row["distance"] for rows in results.values() for row in rows])
    label_ends(panel, ends)
    return save(figure, path)


def share_axes(panel, distances: Sequence[int]) -> None:
    """Axes of shares of exact values by distance; the upper end is 100% unless all shares are small."""
    token_axis(panel, distances)
    top = 1.0 if panel.get_ylim()[1] > 0.2 else 0.2
    panel.set_ylim(-0.02 * top, 1.02 * top)
    panel.set_yticks([0, top / 2, top], ["0%", f"{top / 2:.0%}", f"{top:.0%}"])
    panel.set_xlabel("tokens since the definition")
    panel.set_ylabel("exact values")
