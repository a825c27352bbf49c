"""Training of one cell, one turn at a time. On CUDA a step is the replay of one graph, on a stream of the cell's own.

Tiny models do not fill a GPU: they wait for launches, not for arithmetic. The host therefore only says "one more step".
Batches, learning rates and losses lie in buffers, and the recorded step indexes these buffers by its own count. The steps that
warm up are real steps of the run. If recording fails, each step launches its kernels one at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear.fenwick import num_levels
from loglinear.layers.level_scale import PROJECTION_STD
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.tasks.mqar.config import MODELS, VALUE_DIM, Cell
from loglinear.tasks.mqar.data import Recall, draw_batches, fingerprints
from loglinear.tasks.mqar.kinds import KINDS, asked

BATCHES_AT_ONCE = 32  # drawn ahead, on the device
HELD_OUT_SEED = 0
# Between seeds of training sequences: more than a run has steps; the CPU's generator reads 32 bits of a seed.
SEED_STRIDE = 1_000_000
EAGER_STEPS = 3  # before a graph is recorded: they compile kernels and make the optimizer's states
CLIP = 1.0
FINAL_LOSSES = 20  # steps whose mean loss is the final one
CONV_WIDTH = 4  # of all recurrent models, also of GLA, whose layer has no convolution of its own accord
GLA_NORMALIZER = 16.0  # of its decays as published
Training = Generator[torch.cuda.Event | None, None, dict]


def build_model(cell: Cell) -> LogLinearForCausalLM:
    """The cell's model, initialised from its seed.

    Recurrent models have width/16 heads with keys of ``state_size`` and values of 32, so that linear models of one size keep
    equally large states; the Transformer has one head.
    """
    torch.manual_seed(cell.seed)
    heads = cell.heads
    config = LogLinearConfig(
        mixer=MODELS[cell.model],
        vocab_size=cell.recipe.vocab_size,
        hidden_size=cell.width,
        num_hidden_layers=cell.recipe.layers,
        intermediate_size=cell.recipe.mlp * cell.width,
        max_position_embeddings=cell.length,
        mamba_head_dim=VALUE_DIM,
        mamba_num_heads=heads,
        mamba_state_size=cell.state_size,
        delta_num_heads=heads,
        delta_key_dim=cell.state_size,
        delta_value_dim=VALUE_DIM,
        kda_num_heads=heads,
        kda_key_dim=cell.state_size,
        kda_value_dim=VALUE_DIM,
        gla_num_heads=heads,
        gla_key_dim=cell.state_size,
        gla_value_dim=VALUE_DIM,
        gla_conv_size=CONV_WIDTH,
        gla_decay_normalizer=GLA_NORMALIZER / cell.recipe.initial_decay,
        num_attention_heads=1,
        # 0.02 is for widths of thousands: at 32 the state would start at 1e-4 of the skip and less (measured, small preset).
        initializer_range=cell.width**-0.5,
        use_cache=False,
        level_scale_start="one" if cell.level_scale_start == "one" else "paper",
        tie_word_embeddings=cell.recipe.tied,
    )
    model = LogLinearForCausalLM(config)
    with torch.no_grad():
        for block in model.model.layers:
            mixer = block.mixer
            mixer.out_proj.weight.mul_(cell.recipe.output_scale)
            if hasattr(mixer, "A_log"):
                mixer.A_log.add_(math.log(cell.recipe.initial_decay))
            if cell.level_scale_start != "noise":  # the same random numbers, made small
                mixer.level_scale.dl_proj.weight.mul_(PROJECTION_STD / config.initializer_range)
    return model


def training(cell: Cell, device: str = "cpu") -> Training:
    """Train and evaluate one turn at a time. The last turn returns the row: accuracy by number of pairs, seconds and versions.

    Between turns no stream is current and the host waits for nothing, so that other cells can take turns. A turn yields
    an event that has to happen before the next turn, or None. The row's seconds include the turns of other cells.
    """
    started = time.perf_counter()
    stream = torch.cuda.Stream() if device == "cuda" else None
    with _on(stream):
        model = build_model(cell).to(device)  # type: ignore[arg-type]
        validation, test = held_out(cell, device)
        apart = torch.cat([fingerprints(recall.tokens.flatten(0, 1)) for recall in (validation, test)])
        steps = TrainingSteps(model, cell, stream)
        losses: list[Tensor] = []
    before = None
    yield stream.record_event() if stream else None
    for block in training_blocks(cell, device, apart, stream):
        with _on(stream):
            losses.append(steps(block))
            now = stream.record_event() if stream else None
        yield before  # the device computes one block, and one more waits
        before = now
    with _on(stream):
        hits = [right_answers(model, cell, recall) for recall in (validation, test)]
        counts = [torch.stack([x.sum() for x in part]) for part in hits]
        levels = count_by_level(cell, test, hits[1])
        final_loss = torch.cat(losses)[-FINAL_LOSSES:].mean()
        now = stream.record_event() if stream else None
    yield now
    with _on(stream):
        row = {
            "parameters": model.num_parameters(),
            "state_floats": cell.state_floats,
            "final_loss": float(final_loss),
            "validation": accuracy(cell, counts[0]),
            "test": accuracy(cell, counts[1]),
            "test_by_level": dict(zip(map(str, cell.pairs), levels.tolist())),
            "graph": steps.replay is not None,
            "device": torch.cuda.get_device_name() if stream else "CPU",
            "torch": torch.__version__,
        }
    return {**row, "seconds": round(time.perf_counter() - started, 2)}


def train_cell(cell: Cell, device: str = "cpu") -> dict:
    """All turns of one cell alone; returns its row."""
    turns = training(cell, device)
    while True:
        try:
            event = next(turns)
        except StopIteration as end:
            return end.value
        if event is not None:
            event.synchronize()


def held_out(cell: Cell, device: str) -> tuple[Recall, Recall]:
    """Validation and test sequences, in one batch for each number of pairs; the same for all cells of one length."""
    recipe = cell.recipe
    generator = torch.Generator(device).manual_seed(HELD_OUT_SEED)
    rows = recipe.held_out * len(cell.pairs)
    sizes = (rows, cell.length, cell.pairs, recipe.vocab_size, generator)
    validation = draw_batches(1, *sizes, draw=KINDS[cell.kind])
    return validation, draw_batches(1, *sizes, fingerprints(validation.tokens[0]), KINDS[cell.kind])


def training_blocks(
    cell: Cell, device: str, apart_from: Tensor, stream: torch.cuda.Stream | None = None
) -> Iterator[Recall]:
    """A new batch for each step, ``[batches, ...]`` at a time: the same batches for every model of one seed.

    Drawing makes the host wait for the device. On a GPU it therefore has a stream of its own, with little work on it. The
    batches are for use on ``stream``.
    """
    recipe = cell.recipe
    sizes = (cell.batch_size, cell.length, cell.pairs, recipe.vocab_size)
    drawing = torch.cuda.Stream(priority=-1) if stream else None
    if drawing and stream:
        drawing.wait_stream(stream)  # once: ``apart_from`` is there
    for start in range(0, recipe.steps, BATCHES_AT_ONCE):
        with _on(drawing):
            generator = torch.Generator(device).manual_seed((cell.seed + 1) * SEED_STRIDE + start)
            block = draw_batches(
                min(BATCHES_AT_ONCE, recipe.steps - start), *sizes, generator, apart_from, KINDS[cell.kind]
            )
        if drawing and stream:
            stream.wait_stream(drawing)
            for x in block.parts():
                x.record_stream(stream)
        yield block


def answer_logits(model: LogLinearForCausalLM, cell: Cell, tokens: Tensor, queries: Tensor) -> Tensor:
    """float32 ``[asked, vocab_size]``: logits at the queries, for tokens ``[rows, T]``."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=cell.recipe.precision == "bfloat16"):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)
    return model.lm_head(hidden[queries].float())


class TrainingSteps:
    """The optimizer steps of one cell, a block of batches per call. On CUDA a step is a graph that finds its batch itself.

    All batches must have the same shapes, and no block may be larger than the first. On CUDA, make the calls on ``stream``.
    """

    def __init__(self, model: LogLinearForCausalLM, cell: Cell, stream: torch.cuda.Stream | None = None) -> None:
        self.model, self.cell, self.stream = model.train(), cell, stream
        device = next(model.parameters()).device
        self.rates = [learning_rate(cell, step) for step in range(cell.recipe.steps)]
        self.shares = answer_shares(cell).to(device) if cell.recipe.equal_shares else None
        decaying = [p for p in model.parameters() if p.ndim > 1 and not getattr(p, "_no_weight_decay", False)]
        others = [p for p in model.parameters() if p.ndim <= 1 or getattr(p, "_no_weight_decay", False)]
        groups = [
            {"params": decaying, "weight_decay": cell.recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        rate = torch.zeros((), device=device) if stream else 0.0
        options = {"capturable": True, "fused": True} if stream else {}
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), **options)
        self.done = self.launched = 0
        self.replay: Callable[[], None] | None = None
        if stream:
            self.records = True
            # Tensors that a graph reads and writes: a step finds its rate and batch by the number of steps done.
            self.place = torch.zeros(1, dtype=torch.int64, device=device)
            self.rate_table = torch.tensor(self.rates, device=device)
            self.losses = torch.zeros(BATCHES_AT_ONCE, device=device)
            self.inputs: Recall | None = None

    def __call__(self, block: Recall) -> Tensor:
        """float32 ``[batches]``: the loss of each batch before its step."""
        count = len(block.tokens)
        if self.stream is None:
            losses = torch.stack([self._at_rate(self.rates[self.done + i], *block.batch(i)) for i in range(count)])
            self.done += count
            return losses
        if self.inputs is None:
            self.inputs = Recall(*(torch.empty_like(x) for x in block.parts()))
        for buffer, new in zip(self.inputs.parts(), block.parts()):
            buffer[:count].copy_(new)
        for _ in range(count):
            if self.records and self.replay is None and self.launched >= EAGER_STEPS:
                self._record()
            (self.replay or self._on_device)()
            self.launched += 1
        self.done += count
        return self.losses[:count].clone()

    def _at_rate(self, rate: float, *batch: Tensor) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return self._step(*batch)

    def _on_device(self) -> None:
        """A step that finds its batch and its learning rate on the device. The host gives it no numbers."""
        assert self.inputs is not None
        rate, batch = self.rate_table.index_select(0, self.place), self.place % BATCHES_AT_ONCE
        for group in self.optimizer.param_groups:
            group["lr"].copy_(rate.squeeze(0))
        loss = self._step(*(x.index_select(0, batch).squeeze(0) for x in self.inputs.parts()[:3]))
        self.losses.index_copy_(0, batch, loss.unsqueeze(0))
        self.place += 1

    def _step(self, tokens: Tensor, queries: Tensor, answers: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        logits = answer_logits(self.model, self.cell, tokens, queries)
        if self.shares is None:
            loss = F.cross_entropy(logits, answers)
        else:
            loss = (F.cross_entropy(logits, answers, reduction="none") * self.shares).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss.detach()

    def _record(self) -> None:
        """Record the step without running it. If recording fails, all steps from now on are eager."""
        self.optimizer.zero_grad(set_to_none=True)  # the graph's own gradients are made in its memory
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self._on_device()
            self.replay = graph.replay
        except RuntimeError:  # something in the step waits for the device
            self.records = False
            torch.cuda.synchronize()


def answer_shares(cell: Cell) -> Tensor:
    """float32 ``[asked]`` with sum 1: the weight of each answer of a batch if all numbers of pairs have the same share."""
    counts = [asked(cell.kind, cell.length, pairs) for pairs in cell.pairs]
    answers = cell.batch_size // len(counts) * torch.tensor(counts)
    return (1 / (len(counts) * answers)).repeat_interleave(answers)


def learning_rate(cell: Cell, step: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    recipe = cell.recipe
    warmup = max(1, round(recipe.warmup * recipe.steps))
    if step < warmup:
        return cell.learning_rate * (step + 1) / warmup
    return cell.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, recipe.steps - warmup)))


@torch.inference_mode()
def right_answers(model: LogLinearForCausalLM, cell: Cell, recall: Recall) -> list[Tensor]:
    """bool ``[answers]`` for each number of pairs: whether the likeliest token is the right one, on the model's device."""
    model.eval()
    length, rows, at_once = cell.length, cell.recipe.held_out, max(1, cell.batch_size)
    result = []
    for i, (count, tokens, queries, answers) in enumerate(zip(*_by_pairs(cell, recall)[:4])):
        local = queries - i * rows * length
        right = []
        for start in range(0, rows, at_once):
            end = min(start + at_once, rows)
            here = slice(start * count, end * count)
            logits = answer_logits(model, cell, tokens[start:end], local[here] - start * length)
            right.append(logits.argmax(-1) == answers[here])
        result.append(torch.cat(right))
    return result


def count_by_level(cell: Cell, recall: Recall, right: list[Tensor]) -> Tensor:
    """int64 ``[numbers of pairs, L, 2]``: answers that ``right`` has and all answers, by the level of the pair's bucket."""
    levels = num_levels(cell.length)
    found = torch.zeros(len(right), levels, 2, dtype=torch.int64, device=recall.tokens.device)
    _, _, queries, _, sources = _by_pairs(cell, recall)
    for counts, hits, query, source in zip(found, right, queries, sources):
        apart = (query % cell.length) ^ (source % cell.length)
        level = torch.zeros_like(apart)
        for bit in range(levels - 1):
            level += apart >> bit > 0
        counts.index_add_(0, level, torch.stack([hits, torch.ones_like(hits)], dim=1).long())
    return found


def _by_pairs(cell: Cell, recall: Recall) -> tuple[list[int], tuple, tuple, tuple, tuple]:
    """Queries of a sequence, and the tokens, queries, answers and sources of one batch, each by number of pairs."""
    rows = cell.recipe.held_out
    counts = [asked(cell.kind, cell.length, pairs) for pairs in cell.pairs]
    sizes = [rows * count for count in counts]
    split = (x[0].split(sizes) for x in recall.parts()[1:])
    return counts, recall.tokens[0].split(rows), *split  # type: ignore[return-value]


def accuracy(cell: Cell, right: Tensor) -> dict[str, float]:
    """The share of the values that ``right`` counts, by number of pairs."""
    counts = [asked(cell.kind, cell.length, pairs) for pairs in cell.pairs]
    shares = (found / (cell.recipe.held_out * count) for found, count in zip(right.tolist(), counts))
    return dict(zip(map(str, cell.pairs), shares))


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager:
    return torch.cuda.stream(stream) if stream else nullcontext()
