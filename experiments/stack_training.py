"""Training of a stack of cells, one turn at a time, as ``loglinear.tasks.mqar.train.training`` does for one cell."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bucket_weights import see_buckets
from loglinear.models import LogLinearForCausalLM
from loglinear.tasks.mqar.config import VALUE_DIM, Cell
from loglinear.tasks.mqar.data import Recall, draw_batches, fingerprints
from loglinear.tasks.mqar.kinds import KINDS, asked
from loglinear.tasks.mqar.train import (
    BATCHES_AT_ONCE,
    EAGER_STEPS,
    FINAL_LOSSES,
    SEED_STRIDE,
    accuracy,
    answer_shares,
    build_model,
    count_by_level,
    held_out,
    learning_rate,
)
from stacked import Stack, hidden_states

ROWS_AT_ONCE = 64  # of each copy, in the test
SAVE_EVERY = 60.0  # seconds between the states of an unfinished training
Turns = Generator["torch.cuda.Event | None", None, list[dict]]


def stack_training(
    cells: Sequence[Cell],
    device: str = "cpu",
    compiled: bool = False,
    unfinished: Path | None = None,
) -> Turns:
    """Train and evaluate cells that differ in seed and rate alone. The last turn returns a row for each.

    A training leaves its state in the file ``unfinished`` each minute and when it is closed. The next one goes on from there.
    """
    started = saved = time.perf_counter()
    stream = torch.cuda.Stream() if device == "cuda" else None
    with torch.cuda.stream(stream):
        recall = RecallStack(cells, device, compiled)
        stack = recall.stack
        validation, test = held_out(cells[0], device)
        apart = torch.cat([fingerprints(part.tokens.flatten(0, 1)) for part in (validation, test)])
        steps = Steps(recall.step, stack, stream)
        losses: list[Tensor] = []
        if unfinished is not None and unfinished.exists():
            before_stop = torch.load(unfinished, map_location=device, weights_only=True)
            steps.load(before_stop["steps"])
            losses.append(before_stop["losses"])

    def keep() -> None:
        if unfinished is not None and losses:
            with torch.cuda.stream(stream):
                _save({"steps": steps.state(), "losses": torch.cat(losses)[-FINAL_LOSSES:]}, unfinished)

    before = None
    try:
        for block in blocks(cells, device, apart, stream, steps.done):
            with torch.cuda.stream(stream):
                losses.append(steps(*block))
                now = stream.record_event() if stream else None
            if time.perf_counter() - saved > SAVE_EVERY:
                keep()
                saved = time.perf_counter()
            yield before  # the device computes one block, and one more waits
            before = now
    except GeneratorExit:
        keep()
        raise
    yield before
    with torch.cuda.stream(stream):
        right = [right_answers(cells[0], stack, part) for part in (validation, test)]
        final = torch.cat(losses)[-FINAL_LOSSES:].mean(0).tolist()
        found = [[torch.stack([x[i].sum() for x in part]) for part in right] for i in range(len(cells))]
        levels = [count_by_level(cell, test, [x[i] for x in right[1]]) for i, cell in enumerate(cells)]
        return [
            {
                "parameters": stack.parameters,
                "state_floats": cell.state_floats,
                "final_loss": final[i],
                "validation": accuracy(cell, found[i][0]),
                "test": accuracy(cell, found[i][1]),
                "test_by_level": dict(zip(map(str, cell.pairs), levels[i].tolist())),
                "graph": steps.replay is not None,
                "device": torch.cuda.get_device_name() if stream else "CPU",
                "torch": torch.__version__,
                "stacked": len(cells),
                "seconds": round(time.perf_counter() - started, 2),
            }
            for i, cell in enumerate(cells)
        ]


class RecallStack:
    """A stack of recall models. cells: they differ in seed and rate alone."""

    def __init__(self, cells: Sequence[Cell], device: str, compiled: bool) -> None:
        recipe = cells[0].recipe
        rates = torch.tensor(
            [[learning_rate(cell, step) for cell in cells] for step in range(recipe.steps)], device=device
        )
        low = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
        self.stack = Stack([built(cell) for cell in cells], rates, recipe.weight_decay, low, compiled)
        self.shares, self.losses = answer_shares(cells[0]).to(device), self.stack.wrap(recall_losses)

    def step(self, tokens: Tensor, queries: Tensor, answers: Tensor, place: Tensor) -> Tensor:
        """``[S]`` losses before the step. tokens: ``[S, B, T]``. place: int64 ``[1]``, steps done."""
        found = self.losses(self.stack.hidden(tokens), self.stack.table, queries, answers, self.shares)
        self.stack.update(found, place)
        return found.detach()


def built(cell: Cell) -> LogLinearForCausalLM:
    """The cell's model; its name may end in a rule of ``bucket_weights``, as in "Log-Linear Mamba-2, probe"."""
    name, _, rule = cell.model.partition(", ")
    model = build_model(replace(cell, model=name))
    return see_buckets(model, rule, VALUE_DIM) if rule else model  # type: ignore[arg-type]


def recall_losses(h: Tensor, table: Tensor, queries: Tensor, answers: Tensor, shares: Tensor) -> Tensor:
    """float32 ``[S]`` of hidden states ``[S, B, T, width]``, queries and answers ``[S, asked]``, shares ``[asked]``."""
    h = h.flatten(1, 2)
    logits = h.gather(1, queries.unsqueeze(-1).expand(-1, -1, h.shape[-1])) @ table.mT
    each_one = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none").view_as(answers)
    return (each_one * shares).sum(1)


def blocks(
    cells: Sequence[Cell], device: str, apart_from: Tensor, stream: torch.cuda.Stream | None, done: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens ``[steps, S, B, T]``, queries and answers ``[steps, S, asked]`` of each block of steps after ``done``.

    Cells of one seed have the same sequences. These follow from the first seed and the number of seeds, so stacks of the same
    seeds have the same.
    """
    cell = cells[0]
    seeds = list(dict.fromkeys(one.seed for one in cells))
    copies = torch.tensor([seeds.index(one.seed) for one in cells], device=device)
    sizes = (cell.batch_size, cell.length, cell.pairs, cell.recipe.vocab_size)
    drawing = torch.cuda.Stream(priority=-1) if stream else None
    if drawing and stream:
        drawing.wait_stream(stream)
    for start in range(done, cell.recipe.steps, BATCHES_AT_ONCE):
        count = min(BATCHES_AT_ONCE, cell.recipe.steps - start)
        with torch.cuda.stream(drawing):
            generator = torch.Generator(device).manual_seed((seeds[0] + 1) * SEED_STRIDE + start)
            drawn = draw_batches(count * len(seeds), *sizes, generator, apart_from, KINDS[cell.kind])
            block = [x.unflatten(0, (count, -1)).index_select(1, copies) for x in drawn.parts()[:3]]
        if drawing and stream:
            stream.wait_stream(drawing)
            for x in block:
                x.record_stream(stream)
        yield block[0], block[1], block[2]


class Steps:
    """The steps of a stack, a block a call. On CUDA a step is a graph that finds its batch by the steps done."""

    def __init__(self, step: Callable[..., Tensor], stack: Stack, stream: torch.cuda.Stream | None) -> None:
        self.step, self.stack, self.stream = step, stack, stream
        device, copies = stack.rates.device, stack.copies
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.losses = torch.zeros(BATCHES_AT_ONCE, copies, device=device)
        self.inputs: list[Tensor] = []
        self.done = self.launched = 0
        self.replay: Callable[[], None] | None = None

    def __call__(self, *block: Tensor) -> Tensor:
        """float32 ``[steps, S]``: the losses before each step."""
        self.inputs = self.inputs or [torch.empty_like(x) for x in block]
        for buffer, new in zip(self.inputs, block):
            buffer[: len(new)].copy_(new)
        return self.run(len(block[0]))

    def run(self, count: int) -> Tensor:
        """``count`` steps, at most ``BATCHES_AT_ONCE``."""
        for _ in range(count):
            if self.stream and self.replay is None and self.launched >= EAGER_STEPS:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                    self._step()
                self.replay = graph.replay
            (self.replay or self._step)()
            self.launched += 1
        self.done += count
        return self.losses[:count].clone()

    def _step(self) -> None:
        batch = self.place % BATCHES_AT_ONCE
        found = self.step(*(x.index_select(0, batch)[0] for x in self.inputs), self.place)
        self.losses.index_copy_(0, batch, found.unsqueeze(0))
        self.place += 1

    def through(self, total: int, unfinished: Path | None = None) -> Tensor:
        """float32 ``[total, S]``: all losses until ``total`` steps are done.

        The state goes to the file ``unfinished`` each minute and at the end, and the next training goes on from there.
        """
        losses: list[Tensor] = []
        if unfinished is not None and unfinished.exists():
            before_stop = torch.load(unfinished, map_location=self.place.device, weights_only=True)
            self.load(before_stop["steps"])
            losses.append(before_stop["losses"])
        saved = time.perf_counter()
        while self.done < total:
            losses.append(self.run(min(BATCHES_AT_ONCE, total - self.done)))
            if self.stream:
                self.stream.synchronize()
            if unfinished is not None and (self.done == total or time.perf_counter() - saved > SAVE_EVERY):
                _save({"steps": self.state(), "losses": torch.cat(losses)}, unfinished)
                saved = time.perf_counter()
        return torch.cat(losses)

    def state(self) -> dict:
        adam = self.stack.adam
        return {"done": self.done, "flat": adam.flat, "first": adam.first, "second": adam.second}

    def load(self, state: dict) -> None:
        """Go on from a ``state``, before the first call."""
        self.done = state["done"]
        self.place.fill_(self.done)
        with torch.no_grad():
            for name in ("flat", "first", "second"):
                getattr(self.stack.adam, name).copy_(state[name])


@torch.no_grad()
def right_answers(cell: Cell, stack: Stack, recall: Recall) -> list[Tensor]:
    """bool ``[S, answers]`` for each number of pairs: whether the likeliest token is the right one."""
    result, held = [], cell.recipe.held_out
    counts = [asked(cell.kind, cell.length, pairs) for pairs in cell.pairs]
    sizes = [held * count for count in counts]
    parts = recall.tokens[0].split(held), recall.queries[0].split(sizes), recall.answers[0].split(sizes)
    for i, (count, tokens, queries, answers) in enumerate(zip(counts, *parts)):
        local, right = queries - i * held * cell.length, []
        for start in range(0, held, ROWS_AT_ONCE):
            end = min(start + ROWS_AT_ONCE, held)
            here = slice(start * count, end * count)
            h = hidden_states(stack.weights, tokens[start:end].expand(stack.copies, -1, -1), stack.shape)
            asking = h.flatten(1, 2)[:, local[here] - start * cell.length]
            right.append((asking @ stack.table.mT).argmax(-1) == answers[here])
        result.append(torch.cat(right, 1))
    return result


def _save(value: dict, path: Path) -> None:
    whole = path.with_name(f"{path.name}.tmp")
    torch.save(value, whole)
    os.replace(whole, path)
