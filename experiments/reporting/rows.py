"""Rows of finished runs: compact JSON lines with one identity each, so that collecting twice replaces and never doubles."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from loglinear.tasks.mqar.config import FIRST_FIVE, MODELS

RESULTS = Path(__file__).parents[1] / "results"  # of trained models
TIMED = Path(__file__).parents[2] / "benchmarks" / "results"
LABELS = {MODELS[label]: label for label in FIRST_FIVE}  # mixer of a configuration to name in tables
PAIRS = (("mamba2", "log_linear_mamba2"), ("gated_deltanet", "log_linear_gated_deltanet"))
SOFTMAX = "attention"
IDENTITY = {
    "lm": ("name",),
    "lift": ("name",),
    "lift_needles": ("name", "steps", "tune_seed"),
    "niah": ("name", "kind", "context", "depth"),
    "tunes": ("name", "steps", "tune_seed"),
    "mqar": ("cell",),
    "recall": ("cell",),
    "text_stacks": ("copy",),
    "documents": ("checkpoint", "kind"),
    "genome": ("run",),
}
DIGITS = 6  # significant ones kept: a hundredth of any standard error here


def identity(name: str) -> Callable[[dict], str]:
    """The fields that two rows of ``results/<name>.jsonl`` have in common if they measure the same."""
    return lambda row: json.dumps([row[field] for field in IDENTITY[name]], sort_keys=True)


def read(name: str, folder: Path | None = None) -> list[dict]:
    """The rows of ``<folder>/<name>.jsonl``, none if there is no such file; by default those that are committed."""
    path = (folder or (RESULTS if name in IDENTITY else TIMED)) / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def merge(name: str, new: Iterable[dict], folder: Path = RESULTS) -> int:
    """Write ``new`` rows over those of the same identity and keep the others, sorted; returns how many there are now."""
    key = identity(name)
    rows = {key(row): row for row in [*read(name, folder), *map(short, new)]}
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(rows[k], ensure_ascii=False, separators=(",", ":")) + "\n" for k in sorted(rows)]
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(rows)


def short(value):
    """``value`` with every float at ``DIGITS`` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: short(item) for name, item in value.items()}
    return [short(item) for item in value] if isinstance(value, list) else value


def seeds_of(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """Rows of the comparison by mixer and seed, mixers in the order of the tables.

    These are called ``<mixer>-s<seed>``; other names are further runs of the same models.
    """
    found: dict[str, dict[int, dict]] = {mixer: {} for mixer in LABELS}
    for row in sorted(rows, key=lambda row: row["name"]):
        if row["name"] == f"{row['mixer']}-s{row['seed']}" and row["mixer"] in found:
            found[row["mixer"]][row["seed"]] = row
    return {mixer: rows for mixer, rows in found.items() if rows}
