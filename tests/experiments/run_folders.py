"""Run folders with made-up numbers, written by the functions that write the real ones."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from loglinear.tasks.lm.evaluation import share_error, summary
from loglinear.tasks.lm.repeats import by_distance
from loglinear.tasks.mqar.config import MODELS, Cell, Recipe

SEQUENCES = 6
BLOCK = 6000  # each sequence says its first tokens twice, at this distance
MIXERS = ("attention", "mamba2", "log_linear_mamba2", "gated_deltanet", "log_linear_gated_deltanet")
LABELS = {mixer: label for label, mixer in MODELS.items()}
RECIPE = Recipe(10, 4, 16, layers=2, mlp=0, warmup=0.1, weight_decay=0.1, held_out=6)


def sequences(context: int) -> np.ndarray:
    ids = np.random.default_rng(context).integers(0, 16384, (SEQUENCES, context))
    ids[:, BLOCK : 2 * BLOCK] = ids[:, :BLOCK]
    return ids


def token_losses(context: int, name: str, level: float, far: float, repeats: float) -> np.ndarray:
    """Losses whose sequences differ by 0.3, models by ``level`` everywhere, ``far`` past 8K and ``repeats`` on repeats."""
    shared = np.random.default_rng(0).normal(1.5, 0.3, (SEQUENCES, 1))
    own = np.random.default_rng(list(name.encode())).normal(0, 0.001, (SEQUENCES, 1))
    losses = np.broadcast_to(shared + own + level, (SEQUENCES, context - 1)).astype(np.float32)
    losses[:, 8192:] += far
    losses[:, BLOCK + 3 : 2 * BLOCK - 1] = (own + repeats).astype(np.float32)
    return losses


@lru_cache(maxsize=16)
def evaluated(context: int, name: str, level: float, far: float, repeats: float) -> tuple[dict, list[dict]]:
    """The summary and the repeats of a model: the same for the same arguments, and most tests share two models."""
    losses = token_losses(context, name, level, far, repeats)
    return summary(losses), by_distance(sequences(context), losses)


def write_run(
    out: Path,
    name: str,
    level: float = 0.0,
    far: float = 0.0,
    repeats: float = 1.0,
    retrieved: str = "0000000000",
    found: float = 0.5,
) -> None:
    """A finished run: its record, evaluations at 16K and 64K, recall, and needles after a fine-tune."""
    mixer, _, seed = name.rpartition("-s")
    folder = out / name
    history = [
        {"step": s, "loss": 9 - s / 50, "tokens_per_second": 1e5, "memory_gib": 30.5} for s in range(10, 301, 10)
    ]
    history[0]["tokens_per_second"] = 10.0
    arguments = {"mixer": [mixer], "seed": int(seed), "context": 16384, "packing": "stream", "steps": 300}
    arguments |= {"batch_size": 4, "accumulate": 2, "processes": 1, "learning_rate": 1e-3, "data": "/data/files.jsonl"}
    record = {
        "status": "complete",
        "arguments": arguments | {"num_hidden_layers": 12, "hidden_size": 512},
        "data": {"hash": "0123456789abcdef"},
        "versions": {"torch": "2.11", "triton": "3.6", "device": "GPU"},
        "model": {"parameters": 50_000_000 if "log_linear" not in mixer else 51_000_000},
        "metrics": {"validation_loss": 1.5 + level, "validation_perplexity": float(np.exp(1.5 + level))},
        "history": [*history, {"step": 300, "eval_loss": 1.5 + level}],
    }
    write(folder / "record.json", record)
    head = {"data": "files", "hash": "abc", "side": "validation"}
    for part, context, packing in (("evaluation", 16384, "stream"), ("recall", 65536, "document")):
        losses, rows = evaluated(context, name, level, far, repeats)
        write(folder / part / "loss_by_position.json", {**head, "context": context, "packing": packing, **losses})
        write(folder / part / "repeats.json", {"rows": rows})
    write(folder / "recall" / "retrieval.json", {"rows": [retrieval_row(d, retrieved) for d in (1024, 65536)]})
    if mixer.startswith("log_linear"):
        heads = [[0.5 + 0.1 * level for level in range(6)], [0.7 + 0.1 * level for level in range(6)]]
        write(
            folder / "recall" / "levels.json",
            {"rows": [{"layer": f"model.layers.{i}", "heads": heads} for i in range(2)]},
        )
    niah = {
        "contexts": [1024, 16384],
        "steps": 300,
        "batch_tokens": 32768,
        "accumulate": 1,
        "learning_rate": 3e-4,
        "seed": 0,
    }
    log = [{"step": 300, "loss": 1.0, "exact": 0.1, "tokens_per_second": 1.0}]
    write(folder / "tuned" / "record.json", {"niah": {**niah, "history": log}})
    write(
        folder / "niah" / "niah.json", {"cells": [needle(c, d, found) for c in (1024, 65536) for d in (0.0, 0.5, 1.0)]}
    )


def write_tune(folder: Path, steps: int, seed: int, exact: float) -> None:
    """A further fine-tune of the run in ``folder``, and its test."""
    record = json.loads((folder / "tuned" / "record.json").read_text())
    niah = record["niah"] | {"steps": steps, "seed": seed, "history": [{"step": steps, "loss": 0.25, "exact": exact}]}
    write(folder / f"tuned-{steps}-{seed}" / "record.json", {"niah": niah})
    cells = [needle(context, depth, exact) for context in (1024, 16384) for depth in (0.0, 1.0)]
    write(folder / f"niah-{steps}-{seed}" / "niah.json", {"cells": cells})


def retrieval_row(distance: int, right: str) -> dict:
    exact = right.count("1") / len(right)
    values = {"exact": exact, "without": 0.0, "loss": 1.0, "loss_without": 2.0, "own": 0.5}
    error = {"exact_standard_error": share_error(exact, len(right)), "without_standard_error": 0.0}
    return {"distance": distance, "questions": len(right), **values, **error, "right": right}


def needle(context: int, depth: float, exact: float) -> dict:
    shares = {"exact": exact, "standard_error": share_error(exact, 20), "at_depth": exact, "loss": 1.0}
    right = "".join("01"[(i + round(4 * depth)) % 20 < round(20 * exact)] for i in range(20))
    return {"kind": "number", "context": context, "depth": depth, "samples": 20, **shares, "right": right}


def recall_row(mixer: str, seed: int, accuracy: dict[str, float], state_size: int = 16, rate: float = 0.01) -> dict:
    """A row of associative recall at width 16 and length 256."""
    cell = Cell(LABELS[mixer], 16, state_size, 256, tuple(map(int, accuracy)), rate, seed, RECIPE)
    row = {
        "parameters": 1000,
        "state_floats": cell.state_floats,
        "final_loss": 1.0,
        "validation": accuracy,
        "test": accuracy,
    }
    return {"cell": cell.identity(), **row, "graph": True, "device": "GPU", "torch": "2.11", "seconds": 1.0}


def write_recall(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
