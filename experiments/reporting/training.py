"""Rows of training steps: the required ratios, and a figure of tokens per second against context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loglinear.tasks.style import COLORS, bars, canvas, label_ends, plain_axis, save, styled, token_axis, tokens

NAME = "training"
FLASH = "transformer, flash attention 2"
SHOWN = {
    "log_linear_mamba2": "Log-Linear Mamba-2",
    "mamba2": "Mamba-2, our kernels",
    "mamba2, ssd": "Mamba-2, SSD",
    "log_linear_gated_deltanet": "Log-Linear Gated DeltaNet",
    "gated_deltanet": "Gated DeltaNet, our kernels",
    "gated_deltanet, fla 0.2.2": "Gated DeltaNet, flash-linear-attention 0.2.2",
    "transformer, flash attention 2": "Transformer, FlashAttention-2",
    "transformer, cudnn": "Transformer, cuDNN attention",
}
STYLES = {  # of curves: a linear twin is dashed, what runs on the kernels of others is dotted
    **{"mamba2": "s--", "mamba2, ssd": "^:", "gated_deltanet": "s--", "gated_deltanet, fla 0.2.2": "^:"},
    "transformer, cudnn": "s:",
}
RATIOS = (  # (what, (model, T), over (model, T), at least)
    (
        "Log-Linear Mamba-2 over the Transformer, FlashAttention-2, at 16K",
        ("log_linear_mamba2", 1 << 14),
        (FLASH, 1 << 14),
        1.1,
    ),
    (
        "Log-Linear Mamba-2 over the Transformer, FlashAttention-2, at 64K",
        ("log_linear_mamba2", 1 << 16),
        (FLASH, 1 << 16),
        3.0,
    ),
    ("Log-Linear Mamba-2 over Mamba-2 with SSD at 16K", ("log_linear_mamba2", 1 << 14), ("mamba2, ssd", 1 << 14), 0.95),
    (
        "Log-Linear Gated DeltaNet over Gated DeltaNet at 16K",
        ("log_linear_gated_deltanet", 1 << 14),
        ("gated_deltanet", 1 << 14),
        0.8,
    ),
    ("Log-Linear Mamba-2 at 131K over 16K", ("log_linear_mamba2", 1 << 17), ("log_linear_mamba2", 1 << 14), 0.75),
)
OUTSIDE = 0.35  # largest share of a step outside of matrix products and the op
LONGEST = 1 << 19  # tokens that a step must take
OVERTAKES = 1 << 13  # tokens, from which on
FASTER = "Log-Linear Mamba-2 is faster than the Transformer, FlashAttention-2"


def figures(rows: list[dict]) -> dict[str, str]:
    """The ratios of the rows of one process, as text: the figure and its requirement."""
    rate = {(row["model"], row["T"]): row for row in rows if not row["longest"]}
    found = {}
    for what, one, other, least in RATIOS:
        if one in rate and other in rate:
            ratio = rate[one]["tokens_per_s"] / rate[other]["tokens_per_s"]
            alike = rate[one]["checkpointing"] == rate[other]["checkpointing"]
            note = "" if alike else "; only one of them checkpoints activations"
            found[what] = f"{ratio:.2f}x (required {least}x{note})"
    if (context := overtakes(rows)) is not None:
        found[FASTER] = f"from {context:,} tokens on (required {OVERTAKES:,})"
    for row in rows:
        if row["model"].startswith("log_linear_") and "outside_share" in row and row["T"] == 1 << 14:
            what = f"{row['model']} outside of products and op at 16K"
            found[what] = f"{row['outside_share']:.1%} (required at most {OUTSIDE:.0%})"
    if longest := [row for row in rows if row["longest"]]:
        row = max(longest, key=lambda row: row["T"])
        memory = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 2**30:.1f} GiB"
        found["longest context in one step"] = f"{row['T']:,} tokens{memory} (required {LONGEST:,})"
    return found


def overtakes(rows: list[dict]) -> int | None:
    """The shortest of several measured lengths from which Log-Linear Mamba-2 stays ahead of the Transformer with
    FlashAttention-2.
    """
    rates = [
        {row["T"]: row["tokens_per_s"] for row in rows if row["model"] == name} for name in ("log_linear_mamba2", FLASH)
    ]
    ahead, lengths = None, rates[0].keys() & rates[1].keys()
    for length in sorted(lengths, reverse=True) if len(lengths) > 1 else ():
        if rates[0][length] < rates[1][length]:
            break
        ahead = length
    return ahead


def draw(rows: list[dict], commits: Sequence[str], path: Path) -> list[Path]:
    """The figure: tokens a second against context, a curve for each model.

    ``rows``: of steps of one size. The figure has the rows of ``commits``, or of the newest day, of one machine.
    """
    device, day = rows[-1].get("gpu") or rows[-1]["cpu"], max(row["date"][:10] for row in rows)
    rows = [row for row in rows if device in (row.get("gpu"), row.get("cpu"))]
    rows = [row for row in rows if (row["commit"] in commits if commits else row["date"][:10] == day)]
    newest = {(row["model"], row["T"]): row for row in rows}
    drawn = ", ".join(dict.fromkeys(row["commit"] for row in newest.values()))
    size = f"width {rows[-1]['hidden_size']}, {rows[-1]['tokens']:,} tokens a step or one sequence"
    return _draw(newest, f"{size}; {device}; commits {drawn}", path)


@styled
def _draw(newest: dict[tuple[str, int], dict], note: str, path: Path) -> list[Path]:
    """Above: curves of the models timed at several lengths. Below: all models at the length that most of them have."""
    figure, panels = canvas(_title(newest), (2, 1), (4.8, 2.5), right=3.5, gaps=(0.5, 0.85), note=note)
    (upper, lower), ends = panels[:, 0], []
    by_length = {length: [m for m in SHOWN if (m, length) in newest] for _, length in newest}
    for name in SHOWN:
        curve = [newest[name, length] for length in sorted(by_length) if (name, length) in newest]
        if len(curve) < 2 < len(newest):
            continue
        color = COLORS[SHOWN[name].split(",")[0]]
        upper.plot(*([row[key] for row in curve] for key in ("T", "tokens_per_s")), STYLES.get(name, "o-"), color=color)
        hollow = [(row["T"], row["tokens_per_s"]) for row in curve if row["checkpointing"]]
        upper.plot(*zip(*hollow), "o", markersize=9, mfc="none", color=color) if hollow else None
        ends.append((curve[-1]["tokens_per_s"], SHOWN[name], color))
    token_axis(upper, list(by_length))
    top = max(row["tokens_per_s"] for row in newest.values())
    upper.set_ylim(0, 1.05 * top)
    plain_axis(upper.yaxis, [tick for tick in upper.get_yticks() if tick <= 1.05 * top][::2])
    upper.set_xlabel("context (tokens); rings: activations are checkpointed")
    upper.set_title("tokens per second of training")
    label_ends(upper, ends)
    length = max(by_length, key=lambda length: (len(by_length[length]), length))
    rates = {name: newest[name, length]["tokens_per_s"] for name in by_length[length]}
    bars(lower, {SHOWN[name]: rate for name, rate in rates.items()}, lambda rate: f"{rate / 1e3:.3g}K")
    lower.set_title(f"tokens per second at {tokens(length)}")
    return save(figure, path)


def _title(newest: dict[tuple[str, int], dict]) -> str:
    """How fast Log-Linear Mamba-2 is beside the Transformer at the shortest and the longest length that both have."""
    both = sorted(length for model, length in newest if model == FLASH and ("log_linear_mamba2", length) in newest)
    ratios = {n: newest["log_linear_mamba2", n]["tokens_per_s"] / newest[FLASH, n]["tokens_per_s"] for n in both}
    if not both:
        return "Tokens per second of training, by context"
    text = f"Log-Linear Mamba-2 trains {ratios[both[0]]:.2f} times as fast as a Transformer at {tokens(both[0])} tokens"
    return text + f", {ratios[both[-1]]:.2f} times as fast at {tokens(both[-1])}" * (len(both) > 1)
