"""What rows of the training benchmark say together: the required ratios, and tokens per second against context as a figure."""

from __future__ import annotations

import argparse
from pathlib import Path

from reporting.rows import read

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
STYLES = ("-", "--", ":", "-.")  # of the models of one colour: log-linear, its linear twin, the twin on other kernels
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


def report(rows: list[dict]) -> str:
    """The figures that rows of one process give, a line each, with what is required."""
    return "\n".join(f"{what}: {figure}" for what, figure in figures(rows).items())


def figures(rows: list[dict]) -> dict[str, str]:
    """What the rows of one process say, and the figure with what is required."""
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


def draw(args: argparse.Namespace) -> None:
    """The figure: tokens a second against context, a curve for each model that has rows of these sizes at ``--commits``, or at
    the newest commit.
    """
    from matplotlib.figure import Figure

    path: Path = args.results / f"{NAME}.jsonl"
    rows = read(NAME, args.results)
    same = ("hidden_size", "vocab_size", "tokens", "residual")
    rows = [row for row in rows if not row["longest"] and all(row[key] == getattr(args, key) for key in same)]
    rows = [row for row in rows if args.models is None or row["model"] in args.models]
    if not rows:
        raise SystemExit(f"no rows of these sizes in {path}: run this command without --figure")
    device, commits = rows[-1].get("gpu") or rows[-1]["cpu"], args.commits or [rows[-1]["commit"]]
    rows = [row for row in rows if device in (row.get("gpu"), row.get("cpu")) and row["commit"] in commits]
    newest = {(row["model"], row["T"]): row for row in rows}
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    panel = figure.subplots()
    drawn: dict[str, int] = {}
    for name in (name for name in SHOWN if any(name == model for model, _ in newest)):
        curve = sorted((row for (model, _), row in newest.items() if model == name), key=lambda row: row["T"])
        contexts, rates = ([row[key] for row in curve] for key in ("T", "tokens_per_s"))
        family = name.removeprefix("log_linear_").split(",")[0]
        nth = drawn[family] = drawn.get(family, -1) + 1
        style = {"color": f"C{list(drawn).index(family)}", "linestyle": STYLES[nth], "marker": "os^v"[nth]}
        panel.plot(contexts, rates, markersize=4, label=SHOWN[name], **style)
        hollow = [(row["T"], row["tokens_per_s"]) for row in curve if row["checkpointing"]]
        panel.plot(*zip(*hollow), "o", markersize=8, mfc="none", color=style["color"]) if hollow else None
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("context (tokens); rings: activations are checkpointed")
    panel.set_ylabel("tokens/s, whole training step")
    panel.grid(alpha=0.3, which="both")
    panel.legend(fontsize=8)
    figure.suptitle(f"width {args.hidden_size}, {args.tokens:,} tokens a step or one row: {device}", fontsize=10)
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.figure, dpi=150)
