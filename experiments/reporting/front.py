"""The chart of the README: five measured comparisons of Log-Linear Mamba-2 with Mamba-2 and a Transformer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from loglinear.tasks.style import NAMES, bars, canvas, in_bytes, save, styled, tokens
from reporting.rows import seeds_of
from reporting.training import FLASH

OURS, LINEAR, SOFTMAX = "log_linear_mamba2", "mamba2", "attention"
CONTEXT = 1 << 20
SSD = "mamba2, ssd"


def newest(rows: Sequence[dict], names: Sequence[str], name: str = "model") -> dict[str, dict]:
    """Rows of ``names`` at the newest commit that has them all; nothing if there is none."""
    found: dict[str, dict] = {}
    for commit in dict.fromkeys(row["commit"] for row in rows):
        some = {row[name]: row for row in rows if row["commit"] == commit and row[name] in names}
        found = {key: some[key] for key in names} if len(some) == len(names) else found
    return found


@styled
def draw_front(rows: dict[str, list[dict]], path: Path) -> list[Path]:
    """Save PNG and SVG. Raises ValueError where one of the five comparisons has no rows."""
    steps = [row for row in rows["training"] if "gpu" in row and not row["longest"] and not row["checkpointing"]]
    steps = [row for row in steps if row["residual"] == "float32"]
    short, long = (
        newest([row for row in steps if row["T"] == length], names)
        for length, names in ((1 << 12, (OURS, FLASH)), (1 << 14, (OURS, SSD, FLASH)))
    )
    at = [row for row in rows["model_decoding"] if row["context"] == CONTEXT and row["B"] == 1 and "ms" in row]
    decoded = newest(at, (OURS, LINEAR, SOFTMAX))
    trained = {mixer: group for mixer, group in seeds_of(rows["lm"]).items() if mixer in (OURS, LINEAR, SOFTMAX)}
    if not (short and long and decoded and len(trained) == 3):
        raise ValueError("rows: the chart needs training at 4K and 16K, decoding at 1M, and three language models")
    perplexity = {m: fmean(r["validation_perplexity"] for r in trained[m].values()) for m in (OURS, LINEAR, SOFTMAX)}
    train = long[OURS]["tokens_per_s"] / long[FLASH]["tokens_per_s"]
    decode = decoded[SOFTMAX]["ms"] / decoded[OURS]["ms"]
    title = (
        f"Log-Linear Mamba-2 trains {train:.2f} times as fast as a Transformer at 16K tokens "
        f"and decodes {decode:.0f} times as fast at a context of {tokens(CONTEXT)}"
    )
    size = f"{long[OURS]['parameters'] / 1e6:.0f}M parameters"
    note = f"{decoded[OURS]['gpu']}. Training and decoding: width 1,536, {size} in Log-Linear Mamba-2."
    figure, panels = canvas(title, (3, 2), (1.9, 0.62), left=0.25, right=2.2, gaps=(2.2, 0.45), bottom=0.2, note=note)
    rate, shown = (lambda value: f"{value / 1e3:.1f}K"), [panel for line in panels for panel in line]
    charts = [
        ("training at 4K, tokens/s (more is better)", {m: r["tokens_per_s"] for m, r in short.items()}, rate),
        ("training at 16K, tokens/s (more is better)", {m: r["tokens_per_s"] for m, r in long.items()}, rate),
        (
            "a token at a context of 1M (less is better)",
            {m: r["ms"] for m, r in decoded.items()},
            lambda v: f"{v:.2f} ms",
        ),
        ("its state in memory (less is better)", {m: r["state_bytes"] for m, r in decoded.items()}, in_bytes),
        ("perplexity, 40M parameters, mean over seeds (less is better)", perplexity, lambda value: f"{value:.2f}"),
    ]
    for panel, (text, values, write) in zip(shown, charts):
        bars(panel, {_name(model): value for model, value in values.items()}, write)
        panel.set_title(text, fontsize=9)
        panel.set_ylim(-2.6, 0.6)
    shown[-1].set_axis_off()
    return save(figure, path)


def _name(model: str) -> str:
    """Names without the kernels: the page has them."""
    base = model.split(",")[0]
    return "Transformer" if base == "transformer" else NAMES[base]
