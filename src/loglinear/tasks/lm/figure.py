"""The figure of loss by position: one curve per model, and how far the first stands from each other one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from loglinear.tasks.lm.evaluation import by_position
from loglinear.tasks.style import FAINT, canvas, colors_of, label_ends, save, signed, styled, tokens


@styled
def draw_losses(
    losses: dict[str, np.ndarray], path: Path, buckets: int = 32, trained_context: int | None = None
) -> list[Path]:
    """Save PNG and SVG of the loss by position of each model, from its ``position_losses`` on the same sequences.

    With several models a lower panel shows each model minus the first, sequence by sequence. A sequence that is hard for
    both models then does not blur the difference. Bands are one standard error. A line marks ``trained_context`` tokens if
    the sequences are longer.
    """
    first_name, *other_names = losses
    colors = colors_of(losses)
    rows = 2 if other_names else 1
    figure, made = canvas(_title(losses, buckets), (rows, 1), (5.0, 2.4), left=0.8, right=2.6, gaps=(0.3, 0.35))
    panels = made[:, 0]
    ends = [_draw(panels[0], values, buckets, name, colors[name]) for name, values in losses.items()]
    panels[0].set_ylabel("loss (nats per token)")
    label_ends(panels[0], ends)
    if other_names:
        ends = [
            _draw(panels[1], losses[name] - losses[first_name], buckets, f"{name} − {first_name}", colors[name])
            for name in other_names
        ]
        panels[1].axhline(0, color=FAINT, linewidth=0.8)
        panels[1].set_ylabel("difference (nats)")
        label_ends(panels[1], ends)
        panels[0].tick_params(labelbottom=False)
    length = losses[first_name].shape[1] + 1
    for panel in panels:
        position_axis(panel, length)
        if trained_context is not None and trained_context < length:
            panel.axvline(trained_context, color=FAINT, linestyle=":", linewidth=1)
    panels[-1].set_xlabel("position in the sequence (tokens)")
    return save(figure, path)


def position_axis(panel, length: int) -> None:
    """Ticks at quarters of a sequence that has whole ones, as 4K, 8K, 12K."""
    quarters = [length * i // 4 for i in range(5)]
    panel.set_xlim(0, length)
    panel.set_xticks(quarters, [tokens(quarter) for quarter in quarters])


def _title(losses: dict[str, np.ndarray], buckets: int) -> str:
    (name, values), *others = losses.items()
    rows = by_position(values, buckets)
    if not others:
        ends = f"{rows[0]['loss']:.2f} nats at the start of a sequence and {rows[-1]['loss']:.2f} at its end"
        return f"Loss of {name}: {ends}"
    apart = [f"{other} {signed(float(np.mean(more - values)))}" for other, more in others]
    return f"Mean loss beside {name}, in nats per token: {', '.join(apart)}"


def _draw(panel, losses: np.ndarray, buckets: int, label: str, color: str) -> tuple[float, str, str]:
    """Draws a curve with its band and returns where it ends, with its label and colour."""
    rows = by_position(losses, buckets)
    middle = np.array([(row["first"] + row["last"]) / 2 for row in rows])
    mean = np.array([row["loss"] for row in rows])
    error = np.array([row["standard_error"] for row in rows])
    panel.plot(middle, mean, color=color)
    panel.fill_between(middle, mean - error, mean + error, alpha=0.2, color=color, linewidth=0)
    return float(mean[-1]), label, color
