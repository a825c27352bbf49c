"""The figure of ``model_decoding.py``: time of a token and memory of the state against context, a curve for each model."""

from __future__ import annotations

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
