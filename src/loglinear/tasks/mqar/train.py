"""Training of one cell. On CUDA a step is one graph: tiny models wait for launches, not for arithmetic.

Special about this file: every step has the same shapes (the same numbers of queries, and a learning rate in a tensor), so
that it can be recorded. The steps that warm up are real steps of the run. Where recording fails, all steps are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.tasks.mqar.config import MODELS, VALUE_DIM, Cell
from loglinear.tasks.mqar.data import Recall, draw_batches, fingerprints

BATCHES_AT_ONCE = 32  # drawn ahead, on the device
HELD_OUT_SEED = 0
SEED_STRIDE = 1_000_000  # of training sequences, more than a run has steps; the CPU's generator reads 32 bits of a seed
EAGER_STEPS = 3  # before a graph is recorded: kernels compile, optimizer states come to be
CLIP = 1.0
# What a layer adds starts small beside the embeddings. Normalised layers drown them otherwise: Gated DeltaNet, trained from
# weights of full size, stays at chance (docs/lab-notes.md).
OUTPUT_SCALE = 0.1


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
        num_attention_heads=1,
        # 0.02 is for widths of thousands: at 32 the state would start at 1e-4 of the skip and less (measured, small preset).
        initializer_range=cell.width**-0.5,
        use_cache=False,
    )
    model = LogLinearForCausalLM(config)
    with torch.no_grad():
        for block in model.model.layers:
            block.mixer.out_proj.weight.mul_(OUTPUT_SCALE)
    return model


def train_cell(cell: Cell, device: str = "cpu") -> dict:
    """Train and evaluate; returns the row: accuracy by number of pairs on validation and test, and what it took."""
    started = time.perf_counter()
    model = build_model(cell).to(device)  # type: ignore[arg-type]
    validation, test = held_out(cell, device)
    apart = torch.cat([fingerprints(recall.tokens.flatten(0, 1)) for recall in (validation, test)])
    step = TrainingStep(model, cell)
    losses = [step(batch) for batch in training_batches(cell, device, apart)]
    row = {
        "parameters": model.num_parameters(),
        "state_floats": cell.state_floats,
        "final_loss": float(torch.stack(losses[-20:]).mean()),
        "validation": accuracy(model, cell, validation),
        "test": accuracy(model, cell, test),
        "graph": step.replay is not None,
        "device": torch.cuda.get_device_name() if step.on_cuda else "CPU",
        "torch": torch.__version__,
    }
    return {**row, "seconds": round(time.perf_counter() - started, 2)}


def held_out(cell: Cell, device: str) -> tuple[Recall, Recall]:
    """Validation and test sequences, in one batch for each number of pairs; the same for all cells of one length."""
    recipe = cell.recipe
    generator = torch.Generator(device).manual_seed(HELD_OUT_SEED)
    rows = recipe.held_out * len(cell.pairs)
    sizes = (rows, cell.length, cell.pairs, recipe.vocab_size, generator)
    validation = draw_batches(1, *sizes)
    return validation, draw_batches(1, *sizes, fingerprints(validation.tokens[0]))


def training_batches(cell: Cell, device: str, apart_from: Tensor) -> Iterator[Recall]:
    """A new batch for each step: the same ones for every model of one seed."""
    recipe = cell.recipe
    for start in range(0, recipe.steps, BATCHES_AT_ONCE):
        generator = torch.Generator(device).manual_seed((cell.seed + 1) * SEED_STRIDE + start)
        count = min(BATCHES_AT_ONCE, recipe.steps - start)
        sizes = (recipe.batch_size, cell.length, cell.pairs, recipe.vocab_size)
        block = draw_batches(count, *sizes, generator, apart_from)
        for i in range(count):
            yield Recall(block.tokens[i], block.queries[i], block.answers[i])


def answer_logits(model: LogLinearForCausalLM, tokens: Tensor, queries: Tensor) -> Tensor:
    """``[asked, vocab_size]``: logits where something is asked, for tokens ``[rows, T]``."""
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)
    return model.lm_head(hidden[queries])


class TrainingStep:
    """One optimizer step per call; returns the loss of its batch. Batches must all have the same shapes."""

    def __init__(self, model: LogLinearForCausalLM, cell: Cell) -> None:
        self.model, self.cell = model.train(), cell
        self.device = next(model.parameters()).device
        self.on_cuda = self.device.type == "cuda"
        rate = torch.zeros((), device=self.device) if self.on_cuda else 0.0
        decaying = [p for p in model.parameters() if p.ndim > 1 and not getattr(p, "_no_weight_decay", False)]
        others = [p for p in model.parameters() if p.ndim <= 1 or getattr(p, "_no_weight_decay", False)]
        groups = [
            {"params": decaying, "weight_decay": cell.recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), capturable=self.on_cuda)
        self.done = 0
        self.inputs: Recall | None = None  # where a graph reads
        self.loss: Tensor | None = None  # where it writes
        self.replay: Callable[[], None] | None = None
        self.records = self.on_cuda

    def __call__(self, batch: Recall) -> Tensor:
        self._set_rate(learning_rate(self.cell, self.done))
        self.done += 1
        if self.records and self.replay is None and self.done > EAGER_STEPS:
            self._record(batch)
        if self.replay is None:
            return self._side(batch) if self.records else self._step(batch)
        assert self.inputs is not None
        assert self.loss is not None
        for name in ("tokens", "queries", "answers"):
            getattr(self.inputs, name).copy_(getattr(batch, name))
        self.replay()
        return self.loss.clone()

    def _step(self, batch: Recall) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(answer_logits(self.model, batch.tokens, batch.queries), batch.answers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss.detach()

    def _side(self, batch: Recall) -> Tensor:
        """An eager step on another stream, as a recording needs them before it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self._step(batch)
        torch.cuda.current_stream().wait_stream(stream)
        return loss

    def _record(self, batch: Recall) -> None:
        """Record the step (nothing runs on the device); on failure all steps are eager from now on."""
        self.inputs = Recall(batch.tokens.clone(), batch.queries.clone(), batch.answers.clone())
        self.optimizer.zero_grad(set_to_none=True)  # the graph's own gradients are made in its memory
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.loss = self._step(self.inputs)
            self.replay = graph.replay
        except RuntimeError:  # something in the step waits for the device
            self.records = False
            torch.cuda.synchronize()

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if self.on_cuda:
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def learning_rate(cell: Cell, step: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    recipe = cell.recipe
    warmup = max(1, round(recipe.warmup * recipe.steps))
    if step < warmup:
        return cell.learning_rate * (step + 1) / warmup
    return cell.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, recipe.steps - warmup)))


@torch.inference_mode()
def accuracy(model: LogLinearForCausalLM, cell: Cell, recall: Recall) -> dict[str, float]:
    """Share of the values recalled (the likeliest token is the right one), by number of pairs."""
    model.eval()
    length, rows = cell.length, cell.recipe.held_out
    asked = [rows * pairs for pairs in cell.pairs]
    result = {}
    parts = zip(
        cell.pairs, recall.tokens[0].split(rows), recall.queries[0].split(asked), recall.answers[0].split(asked)
    )
    for i, (pairs, tokens, queries, answers) in enumerate(parts):
        local = queries - i * rows * length
        right, at_once = 0, max(1, cell.recipe.batch_size)
        for start in range(0, rows, at_once):
            count = min(at_once, rows - start)
            here = slice(start * pairs, (start + count) * pairs)
            logits = answer_logits(model, tokens[start : start + count], local[here] - start * length)
            right += int((logits.argmax(-1) == answers[here]).sum())
        result[str(pairs)] = right / len(answers)
    return result
