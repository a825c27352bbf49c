"""The figure of whole models that decode: time of a token and memory of the state against context, a curve for each model.

python experiments/decoding_figure.py --figure docs/figures/decoding.png    # from rows of benchmarks/model_decoding.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from loglinear.tasks.style import (
    COLORS,
    FAINT,
    byte_ticks,
    canvas,
    decades,
    in_bytes,
    label_ends,
    name_of,
    plain_axis,
    save,
    styled,
    token_axis,
    tokens,
)
from reporting.rows import read

UNMASKED = "attention without mask"
LINEAR = ("mamba2", "gated_deltanet")
OURS, SOFTMAX = "log_linear_mamba2", "attention"


@styled
def draw_decoding(curves: dict[str, list[dict]], note: str, path: Path) -> list[Path]:
    """``curves``: rows of each model by context. ``note``: sizes and machine. Saves PNG and SVG."""
    figure, panels = canvas(_title(curves), (1, 2), (3.6, 3.0), right=2.1, gaps=(2.5, 0.5), note=note)
    left, right = panels[0]
    times, sizes = [], []
    for name, curve in curves.items():
        unmasked = name == UNMASKED
        shown = "Transformer without mask" if unmasked else name_of(name)
        color = COLORS[name_of(SOFTMAX if unmasked else name)]
        style = {"color": color, "marker": "o", "linestyle": "--" if unmasked or name in LINEAR else "-"}
        contexts = [row["context"] for row in curve]
        left.plot(contexts, [row["ms"] for row in curve], **style)
        left.fill_between(
            contexts,
            *([row[key] for row in curve] for key in ("ms_low", "ms_high")),
            color=color,
            alpha=0.2,
            linewidth=0,
        )
        times.append((curve[-1]["ms"], shown, color))
        if not unmasked:  # its state is that of "attention"
            right.plot(contexts, [row["state_bytes"] for row in curve], **style)
            sizes.append((curve[-1]["state_bytes"], shown, color))
    rows = [row for curve in curves.values() for row in curve]
    weights = next(iter(curves.values()))[-1]["weight_bytes"]
    right.axhline(weights, color=FAINT, linestyle=":", linewidth=1)
    for panel in (left, right):
        token_axis(panel, [row["context"] for row in rows])
        panel.set_yscale("log")
        panel.set_xlabel("context (tokens)")
    plain_axis(left.yaxis, decades([row["ms"] for row in rows]))
    plain_axis(right.yaxis, byte_ticks([row["state_bytes"] for row in rows]), in_bytes)
    left.set_title("milliseconds per token")
    right.set_title("memory of the state")
    label_ends(left, times)
    label_ends(right, [*sizes, (weights, "(weights)", FAINT)])
    return save(figure, path)


def _title(curves: dict[str, list[dict]]) -> str:
    """The time of a token at the longest context that Log-Linear Mamba-2 and softmax attention both have."""
    one, other = ({row["context"]: row["ms"] for row in curves.get(name, ())} for name in (OURS, SOFTMAX))
    if not one.keys() & other.keys():
        return "Time of a token and memory of the state, by context"
    longest = max(one.keys() & other.keys())
    ours, theirs = f"{one[longest]:.1f} ms with Log-Linear Mamba-2", f"{other[longest]:.1f} ms with a Transformer"
    return f"At a context of {tokens(longest)} tokens the next token takes {ours} and {theirs}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, required=True, help="PNG; an SVG stands beside it")
    parser.add_argument("--results", type=Path, help="folder of the rows; none: the committed ones")
    parser.add_argument("--models", nargs="+", default=[OURS, "mamba2", SOFTMAX, UNMASKED])
    parser.add_argument("--kv-heads", type=int, help="of softmax attention; default: any")
    sizes = {
        "B": 1,
        "hidden_size": 1536,
        "layers": 21,
        "vocab_size": 32_000,
        "dtype": "bfloat16",
        "entries": "bfloat16",
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args()
    rows = [row for row in read("model_decoding", args.results) if "ms" in row]
    rows = [row for row in rows if all(row[key] == getattr(args, key) for key in sizes)]
    rows = [row for row in rows if row["model"] in args.models and args.kv_heads in (None, row["kv_heads"])]
    if not rows:
        raise SystemExit("no rows of these sizes: python benchmarks/model_decoding.py writes them")
    device = rows[-1].get("gpu") or rows[-1]["cpu"]
    newest = {(row["model"], row["context"]): row for row in rows if device in (row.get("gpu"), row.get("cpu"))}
    commits = ", ".join(dict.fromkeys(row["commit"] for row in newest.values()))
    width = f"{args.layers} layers of width {args.hidden_size}, batch of {args.B}, {args.dtype}"
    curves = {
        name: sorted((row for (model, _), row in newest.items() if model == name), key=lambda row: row["context"])
        for name in args.models
    }
    curves = {name: curve for name, curve in curves.items() if curve}
    for path in draw_decoding(curves, f"{width}; {device}; commit {commits}", args.figure):
        print(path)


if __name__ == "__main__":
    main()
