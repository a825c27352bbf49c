"""Models of bacterial chromosomes, one nucleotide a token, and what they remember: ``python experiments/genome.py DATA OUT``.

DATA holds train.fna.gz and held_out.fna.gz (``experiments/genomes.py``); the second is a species that no model was trained on.
Mamba-2, Gated DeltaNet, their log-linear forms and a convolution model of long filters, of about 10M parameters, see the same
sequences in the same order. After the training each has its loss by position and by the distance of the last repeat, on both
strands, at several contexts. The jobs lie in one queue; a job that is stopped leaves a checkpoint and goes on the next time.
Rows go to OUT/genome.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.tasks.lm.config import DataConfig
from loglinear.tasks.lm.data import load_data
from loglinear.tasks.lm.evaluation import position_losses, summary
from loglinear.tasks.lm.tokens import Windows
from loglinear.tasks.mqar.run import read_rows
from long_filter import long_filter_model
from strands import by_strand

MIXERS = ("mamba2", "log_linear_mamba2", "gated_deltanet", "log_linear_gated_deltanet", "long_filter")
LAYERS = {"long_filter": 5}  # for as many parameters; the others have 6
CONTEXTS = (1024, 8192, 32768, 131072)
CLIP = 1.0


@dataclass(frozen=True)
class Run:
    """One model: its mixer, seed and sizes."""

    mixer: str
    seed: int = 0
    context: int = 131_072
    steps: int = 1000
    batch: int = 2
    rate: float = 2e-3
    width: int = 384

    @property
    def name(self) -> str:
        return f"{self.mixer}-s{self.seed}-{self.context}-{self.steps}"

    def model(self) -> LogLinearForCausalLM:
        torch.manual_seed(self.seed)
        config = LogLinearConfig(
            mixer="mamba2" if self.mixer == "long_filter" else self.mixer,
            vocab_size=8,
            hidden_size=self.width,
            num_hidden_layers=LAYERS.get(self.mixer, 6),
            intermediate_size=2 * self.width,
            max_position_embeddings=self.context,
            level_scale_start="one",
            level_scale_std=0.006,
            mamba_state_size=64,
            mamba_head_dim=64,
            delta_num_heads=4,
            use_cache=False,
        )
        return long_filter_model(config) if self.mixer == "long_filter" else LogLinearForCausalLM(config)

    def rate_at(self, step: int) -> float:
        """Linear warm-up in a twentieth of the steps, then a cosine to zero."""
        warmup = max(1, self.steps // 20)
        if step < warmup:
            return self.rate * (step + 1) / warmup
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))


def windows(data: Path, cache: Path, context: int) -> tuple[Windows, Windows]:
    """Sequences of the training species and of the one held out, each within a chromosome."""
    config = DataConfig(
        data=str(data / "train.fna.gz"),
        validation_data=str(data / "held_out.fna.gz"),
        tokenizer="nucleotides",
        context=context,
        packing="document",
        cache=cache,
    )
    loaded = load_data(config)
    assert loaded.validation is not None
    return loaded.train, loaded.validation


def batches(train: Windows, run: Run, start: int) -> Iterator[Tensor]:
    """ids ``[batch, context]`` of each step from ``start`` on, by the seed and the step alone.

    Sequences begin anywhere in a chromosome. Half of them are read on the other strand.
    """
    offsets, values = train.tokens.offsets, train.tokens.values
    room = np.maximum(np.diff(offsets) - run.context - 1, 0)
    for step in range(start, run.steps):
        rng = np.random.default_rng((run.seed, step))
        rows = []
        for _ in range(run.batch):
            chromosome = rng.choice(len(room), p=room / room.sum())
            first = offsets[chromosome] + rng.integers(room[chromosome])
            ids = values[first : first + run.context].astype(np.int64)
            rows.append(ids if rng.random() < 0.5 else np.where(ids < 4, 3 - ids, ids)[::-1].copy())
        yield torch.from_numpy(np.stack(rows))


def train(run: Run, sequences: Windows, folder: Path, device: str, until: float) -> LogLinearForCausalLM | None:
    """The trained model; None if the time was over first, with a checkpoint in ``folder``."""
    model = run.model().to(device).train()  # type: ignore[arg-type]
    decaying = [p for p in model.parameters() if p.ndim > 1 and not getattr(p, "_no_weight_decay", False)]
    others = [p for p in model.parameters() if p.ndim <= 1 or getattr(p, "_no_weight_decay", False)]
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=run.rate, betas=(0.9, 0.95), fused=device == "cuda")
    path, done = folder / f"{run.name}.pt", 0
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
    for ids in batches(sequences, run, done):
        if time.monotonic() > until:
            break
        for group in optimizer.param_groups:
            group["lr"] = run.rate_at(done)
        ids = ids.to(device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        done += 1
        if done % 50 == 0:
            print(f"{run.name}: step {done}, loss {float(loss.detach()):.4f}", flush=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": done}
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
    return model if done == run.steps else None


def evaluate(model: LogLinearForCausalLM, data: Path, cache: Path, context: int, tokens: int, device: str) -> dict:
    """Losses on the species held out: by position, and by the distance of the last repeat on both strands."""
    _, held_out = windows(data, cache, context)
    held_out.thin(max(1, tokens // context))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    losses = position_losses(model, held_out, max(1, 131_072 // context), dtype)
    ids = np.stack([held_out[i]["input_ids"].numpy() for i in range(len(held_out))])
    found = summary(losses)
    return found | {"context": context, "repeats": by_strand(ids, losses)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--mixers", nargs="*", default=MIXERS, choices=MIXERS)
    parser.add_argument("--context", type=int, default=Run.context)
    parser.add_argument("--contexts", type=int, nargs="*", default=CONTEXTS, help="of the evaluation")
    parser.add_argument("--steps", type=int, default=Run.steps)
    parser.add_argument("--width", type=int, default=Run.width)
    parser.add_argument("--batch", type=int, default=Run.batch)
    parser.add_argument("--tokens", type=int, default=4_194_304, help="that each evaluation reads")
    options = parser.parse_args()
    until = time.monotonic() + options.seconds - 10  # to write a checkpoint
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.out.mkdir(parents=True, exist_ok=True)
    cache, rows = options.out / "cache", options.out / "genome.jsonl"
    done = {(row["run"]["mixer"], row["run"]["seed"]) for row in read_rows(rows)}
    sequences = windows(options.data, cache, options.context)[0]
    for seed in options.seeds:
        for mixer in options.mixers:
            if (mixer, seed) in done:
                continue
            run = Run(mixer, seed, options.context, options.steps, options.batch, width=options.width)
            model = train(run, sequences, options.out, device, until)
            if model is None:
                return
            # Sequences beyond the trained context read untrained levels as the last trained one.
            found = [
                evaluate(model, options.data, cache, context, options.tokens, device) for context in options.contexts
            ]
            row = {"run": asdict(run), "parameters": model.num_parameters(), "evaluations": found}
            with rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            losses = ", ".join(f"{one['context']:,}: {one['loss']:.4f}" for one in found)
            print(f"{run.name}: {row['parameters']:,} parameters, held-out loss by context {losses}", flush=True)


if __name__ == "__main__":
    main()
