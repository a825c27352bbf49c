"""The figure of loss by position: one curve per model, and how far the first stands from each other one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from loglinear.tasks.lm.evaluation import by_position


def draw_losses(
    losses: dict[str, np.ndarray], path: Path, buckets: int = 32, trained_context: int | None = None
) -> None:
    """Save a PNG of the loss by position of each model, from its ``position_losses`` on the same sequences.

    With several models a lower panel shows each one minus the first, sequence by sequence, so that what makes a
    sequence hard for both cancels. Bands are one standard error. A line stands at the end of ``trained_context`` tokens if
    the sequences are longer.
    """
    first_name, *other_names = losses
    figure = Figure(figsize=(7, 6 if other_names else 4), layout="constrained")
    panels = figure.subplots(2 if other_names else 1, sharex=True, squeeze=False)[:, 0]
    for name, values in losses.items():
        _draw(panels[0], values, buckets, name)
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].legend()
    for color, name in enumerate(other_names, start=1):
        _draw(panels[1], losses[name] - losses[first_name], buckets, f"{name} − {first_name}", f"C{color}")
    if other_names:
        panels[1].axhline(0, color="grey", linewidth=0.8)
        panels[1].set_ylabel("difference (nats per token)")
        panels[1].legend()
    if trained_context is not None and trained_context <= losses[first_name].shape[1]:
        for panel in panels:
            panel.axvline(trained_context, color="grey", linestyle=":", linewidth=1)
    panels[-1].set_xlabel("position in the sequence (tokens)")
    figure.savefig(path, dpi=150)


def _draw(panel, losses: np.ndarray, buckets: int, label: str, color: str | None = None) -> None:
    rows = by_position(losses, buckets)
    middle = np.array([(row["first"] + row["last"]) / 2 for row in rows])
    mean = np.array([row["loss"] for row in rows])
    error = np.array([row["standard_error"] for row in rows])
    (line,) = panel.plot(middle, mean, label=label, color=color)
    panel.fill_between(middle, mean - error, mean + error, alpha=0.2, color=line.get_color(), linewidth=0)
