"""Needles for a stack of language models: a fine-tune that ends its fall, and a test at lengths to eight times the trained one.

A row of the fine-tune holds samples of the lengths of ``Tune``, one behind the other, with 1, 4, 16 or 64 keys or four values
of one key, and the loss is that of the answers. All copies and models see the same rows. The test asks each kind at each
length, and reads levels that no training sequence has in two ways: as the last trained one ("shared"), and as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from loglinear.fenwick import num_levels
from loglinear.tasks.lm.tokens import Tokens
from loglinear.tasks.niah.config import Kind, TaskConfig
from loglinear.tasks.niah.data import Haystack, Sample, Samples, Side
from stack_training import Steps
from stacked import Stack, hidden_states
from text_tokens import END

TESTED = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
# Name in rows: kind and needles.
KINDS: dict[str, tuple[Kind, int]] = {
    "1 key": ("number", 4),
    "4 keys": ("multi-key", 4),
    "16 keys": ("multi-key", 16),
    "64 keys": ("multi-key", 64),
    "4 values": ("multi-value", 4),
}
SHORTEST = {"16 keys": 2048, "64 keys": 4096}  # lengths that have room
BATCH, WARMUP = 4, 0.1
TESTS = 32  # samples of each kind and length
ROOM = 64  # tokens behind the first of the longest answer


@dataclass(frozen=True)
class Tune:
    """A fine-tune. lengths: of samples, in tokens; a row is as long as the longest. rate: the highest."""

    steps: int = 700
    rate: float = 2e-3
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)


class Needles:
    """Samples of both sides, and the rows of the fine-tune, which another process makes in advance."""

    def __init__(self, data: Path, tune: Tune) -> None:
        self.sides: dict[Side, dict[str, Samples]] = {}
        files: dict[Side, str] = {"train": "train", "test": "valid"}
        for side, file in files.items():
            haystack = Haystack(Tokens(np.load(data / f"{file}.npy"), np.load(data / f"{file}_offsets.npy")), 0)
            self.sides[side] = {
                name: Samples(haystack, tokenizer(data), side, TaskConfig(kinds=(kind,), needles=count))
                for name, (kind, count) in KINDS.items()
            }
        self.data, self.tune = data, tune

    def begin(self) -> Future:
        """Start to make ``rows``."""
        return ProcessPoolExecutor(1, get_context("spawn")).submit(rows_of, self.data, self.tune)

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids, int16 ``[steps, BATCH, longest + 1]``, and whether a token is of an answer."""
        longest = max(self.tune.lengths)
        ids = np.zeros((self.tune.steps, BATCH, longest + 1), np.int16)
        answers = np.zeros(ids.shape, bool)
        for step in range(self.tune.steps):
            rng = np.random.default_rng((0, step))
            for row in range(BATCH):
                length = int(rng.choice(self.tune.lengths))
                for start in range(0, longest, length):
                    names = [name for name in KINDS if SHORTEST.get(name, 0) <= length]
                    name = names[rng.integers(len(names))]
                    sample = self.sides["train"][name].make(KINDS[name][0], length, float(rng.uniform()), rng)
                    ids[step, row, start + 1 : start + 1 + length] = sample.ids
                    answers[step, row, start + 1 + sample.answer_start : start + 1 + length] = True
        return ids, answers

    def tests(self) -> Iterator[tuple[str, int, list[Sample]]]:
        for context in TESTED:
            for number, (name, (kind, _)) in enumerate(KINDS.items()):
                if SHORTEST.get(name, 0) <= context:
                    rngs = [np.random.default_rng((1, context, number, i)) for i in range(TESTS)]
                    made = [
                        self.sides["test"][name].make(kind, context, (i + 0.5) / TESTS, r) for i, r in enumerate(rngs)
                    ]
                    yield name, context, made


def tokenizer(data: Path) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_file(str(data / "tokenizer.json"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=backend.id_to_token(END))


def rows_of(data: Path, tune: Tune) -> tuple[np.ndarray, np.ndarray]:
    return Needles(data, tune).rows()


def answer_losses(h: Tensor, table: Tensor, targets: Tensor, answers: Tensor) -> Tensor:
    """float32 ``[S]``: mean loss of the tokens of answers. targets, answers: ``[B, T]``, the same for all copies."""
    logits = (h.flatten(1, 2).to(torch.bfloat16) @ table.to(torch.bfloat16).mT).float()
    wanted = targets.flatten().expand(len(h), -1)
    losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
    weights = answers.flatten().float()
    return (losses * weights).sum(1) / weights.sum().clamp(min=1)


class Tuning:
    """The fine-tune of a stack; its optimizer begins again."""

    def __init__(self, stack: Stack, rate: float, ids: np.ndarray, answers: np.ndarray) -> None:
        self.stack, steps, device = stack, len(ids), stack.rates.device
        warmup, place = max(1, round(WARMUP * steps)), torch.arange(steps, dtype=torch.float32, device=device)
        down = 0.5 * (1 + torch.cos(torch.pi * (place - warmup) / max(1, steps - warmup)))
        stack.rates = (
            (rate * torch.where(place < warmup, (place + 1) / warmup, down)).unsqueeze(1).expand(-1, stack.copies)
        )
        for moment in (stack.adam.first, stack.adam.second):
            moment.zero_()
        self.ids, self.answers = (torch.from_numpy(x).to(device) for x in (ids, answers))
        self.losses = stack.wrap(answer_losses)

    def step(self, place: Tensor) -> Tensor:
        ids, answers = (x.index_select(0, place)[0] for x in (self.ids, self.answers))
        ids = ids.long()
        each = ids.expand(self.stack.copies, -1, -1).contiguous()  # strides as in the training, whose code is compiled
        h = self.stack.hidden(each[..., :-1])
        found = self.losses(h, self.stack.table, ids[:, 1:], answers[:, 1:])
        self.stack.update(found, place)
        return found.detach()


def tune_and_test(
    stack: Stack,
    needles: Needles,
    rows: tuple[np.ndarray, np.ndarray],
    stream: torch.cuda.Stream | None,
    trained: int,
    unfinished: Path | None = None,
) -> list[dict]:
    """Of each copy: the loss along the fine-tune, and the share of exact answers by kind and length.

    unfinished: the file of a fine-tune that was stopped (``Steps.through``).
    """
    steps = Steps(Tuning(stack, needles.tune.rate, *rows).step, stack, stream)
    losses = steps.through(needles.tune.steps, unfinished)
    curve = torch.stack([part.mean(0) for part in losses.chunk(8)], 1).tolist()
    found: dict[str, list[float]] = {}
    apart = stack.shape.offset is not None
    for name, context, samples in needles.tests():
        found[f"{name} {context}"] = exact(stack, samples, num_levels(trained))
        if apart and context > trained:
            found[f"{name} {context} as they are"] = exact(stack, samples, None)
    how = asdict(needles.tune)
    return [
        {"tune": curve[i], "tuned": how, "needles": {key: x[i] for key, x in found.items()}}
        for i in range(stack.copies)
    ]


@torch.no_grad()
def exact(stack: Stack, samples: list[Sample], levels: int | None) -> list[float]:
    """Share of samples of one length whose whole answer is the likeliest, for each copy. levels: how many λ are read."""
    shape, device = replace(stack.shape, levels=levels), stack.rates.device
    right = torch.zeros(stack.copies, device=device)
    length = len(samples[0].ids)
    at_once = max(1, 65_536 // length)
    for start in range(0, len(samples), at_once):
        batch = samples[start : start + at_once]
        ids = torch.from_numpy(np.stack([sample.ids for sample in batch])).to(device)
        first = torch.tensor([sample.answer_start for sample in batch], device=device)
        room = length - int(first.min())
        h = hidden_states(stack.weights, ids.expand(stack.copies, -1, -1), shape)[:, :, length - room - 1 : length - 1]
        likeliest = (h.flatten(1, 2) @ stack.table.mT).argmax(-1).view(stack.copies, len(batch), room)
        question = torch.arange(length - room, length, device=device) < first.unsqueeze(1)
        right += ((likeliest == ids[:, -room:]) | question).all(-1).sum(1)
    return (right / len(samples)).tolist()
