"""The figures of ``loglinear masks``: the masks of six sequence models side by side, and the buckets that one token sees.

The figures draw what ``loglinear.reference.masks`` and ``loglinear.fenwick`` compute, and nothing by hand, so a figure cannot
disagree with the code.
"""

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle

from loglinear import fenwick
from loglinear.reference.dense import level_matrix
from loglinear.reference.masks import TABLE, Inputs, dyadic_blocks
from loglinear.tasks.style import FAINT, INK, styled

DARK, PAPER = "#22313f", "#ffffff"  # numbers on filled boxes
LEVEL_COLORS = ("#f6bd3b", "#ef7f45", "#cf4a6a", "#7d4f9e", "#33659f", "#2c8c8c")  # near to far; reused beyond 6 levels
MASK_COLORS = ("#4a9ae01a", "#1a6fd8ff")  # from 0, hardly seen on any background, to 1


def example_inputs(tokens: int, seed: int) -> Inputs:
    """Inputs that show each mask's structure: open gates but for two, a damped filter, λ uniform in [0.25, 1]."""
    gen = torch.Generator().manual_seed(seed)
    levels = fenwick.num_levels(tokens)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=gen, dtype=torch.float64)

    step = torch.arange(tokens, dtype=torch.float64)
    unit = torch.ones(tokens, 1, dtype=torch.float64)
    g = -0.04 * uniform(tokens)
    g[[tokens * 3 // 8, tokens * 3 // 4]] = -0.8  # two tokens that forget
    return Inputs(
        q=unit,
        k=unit,
        v=unit,
        beta=unit[:, 0],
        g=g,
        gamma=torch.tensor(1 - 2.5 / tokens, dtype=torch.float64),
        taps=(-step / (0.35 * tokens)).exp() * (0.55 + 0.45 * (step * 16 / tokens).cos()),
        level_scales=0.25 + 0.75 * uniform(tokens, levels),
    )


# ------------------------------------------------------------------------------------------------------------- masks


@styled
def draw_masks(tokens: int, seed: int) -> Figure:
    """Six panels, one per row of the table: M as a heat map over (t, s), its formula and its structure below it."""
    figure = Figure(figsize=(11, 8.0))
    title = "Six sequence models differ in the mask M of O = (A ∘ M) V"
    figure.text(0.045, 0.985, title, va="top", fontsize=12, fontweight="bold")
    grid = figure.subplots(2, 3, gridspec_kw={"wspace": 0.08, "hspace": 0.42})
    figure.subplots_adjust(left=0.045, right=0.93, top=0.89, bottom=0.1)
    colors = LinearSegmentedColormap.from_list(
        "mask", list(MASK_COLORS)
    )  # matplotlib 3.8 reads a tuple of two as one color and its alpha
    x = example_inputs(tokens, seed)
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1).numpy()
    for axes, row in zip(grid.flat, TABLE):
        values = row.mask(x).numpy()
        values[future] = float("nan")
        image = axes.imshow(values, cmap=colors, vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(row.name, fontsize=12, fontweight="bold", loc="center", pad=8)
        caption = f"$M_{{ts}}$ = {row.formula}\n{row.structure}   {row.cost}"
        axes.text(0.5, -0.05, caption, transform=axes.transAxes, ha="center", va="top", linespacing=1.6, color=INK)
        _bare(axes)
    _outline_blocks(grid.flat[-1], tokens)
    grid[0, 0].set_ylabel("query t", color=INK)
    grid[0, 0].text(-0.5, tokens, "key s", va="top")
    bar = figure.colorbar(image, ax=grid, fraction=0.02, pad=0.025, shrink=0.5, ticks=[0, 0.5, 1])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    return figure


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _outline_blocks(axes: Axes, tokens: int) -> None:
    """A line around every rank-one block of more than one pair."""
    for level, rows, columns in dyadic_blocks(tokens):
        if level > 1:
            corner = (columns.start - 0.5, rows.start - 0.5)
            axes.add_patch(Rectangle(corner, len(columns), len(rows), fill=False, edgecolor="#e4572e", linewidth=1.1))


# ----------------------------------------------------------------------------------------------------------- buckets


@styled
def draw_buckets(query: int) -> Figure:
    """Left: the tokens that ``query`` sees, their buckets, and the sum that reads them. Right: every level of 16 tokens."""
    figure = Figure(figsize=(11, 4.4))
    left = figure.add_axes((0.01, 0.0, 0.615, 1.0))
    right = figure.add_axes((0.665, 0.08, 0.325, 0.8))
    _draw_sum(left, query, tokens=16)
    _draw_levels(right, query, tokens=16)
    return figure


def _color(level: int) -> str:
    return LEVEL_COLORS[level % len(LEVEL_COLORS)]


def _ink(level: int) -> str:
    """A colour that can be read on ``_color(level)``."""
    return DARK if _color(level) == LEVEL_COLORS[0] else PAPER


def _box(axes: Axes, x: float, y: float, width: float, height: float, color: str, alpha: float = 1.0) -> None:
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor="none", alpha=alpha)
    )


def _draw_sum(axes: Axes, query: int, tokens: int) -> None:
    axes.set(xlim=(-0.6, tokens + 0.1), ylim=(-7.4, 3.3), aspect="equal")
    _bare(axes)
    axes.text(
        0.06,
        2.55,
        f"Token {query} sees {query + 1} tokens in {query.bit_count() + 1} buckets",
        fontsize=13,
        fontweight="bold",
        va="center",
    )
    bits = f"{query} = {query:b}$_2$: one bucket per set bit, and the token itself"
    axes.text(0.06, 1.7, bits, va="center")
    for s in range(tokens):
        seen = s <= query
        color = _color(fenwick.level(query, s)) if seen else FAINT
        ink = _ink(fenwick.level(query, s)) if seen else INK
        _box(axes, s + 0.06, 0, 0.88, 0.88, color, alpha=1.0 if seen else 0.2)
        axes.text(s + 0.5, 0.44, str(s), ha="center", va="center", color=ink)
    groups = [range(query, query + 1), *(fenwick.bucket(e) for e in fenwick.query_path(query))][::-1]
    first, spacing = 0.9, (tokens - 0.9) / len(groups)
    for i, group in enumerate(groups):
        level = fenwick.level(query, group.start)
        center = first + (i + 0.5) * spacing
        funnel = [(group.start + 0.06, -0.1), (group.stop - 0.06, -0.1), (center + 0.55, -2.2), (center - 0.55, -2.2)]
        axes.add_patch(Polygon(funnel, closed=True, facecolor=_color(level), alpha=0.22, edgecolor="none"))
        _box(axes, center - 0.55, -3.3, 1.1, 1.1, _color(level))
        axes.text(center, -2.77, f"$S_{{{level}}}$", ha="center", va="center", color=_ink(level), fontsize=13)
        size = "1 token" if len(group) == 1 else f"{len(group)} tokens"
        axes.text(center, -3.8, f"level {level}: {size}", ha="center", va="center", fontsize=9)
        term = f"$\\lambda_{{{query}}}[{level}]\\;\\, q_{{{query}}}^\\top S_{{{level}}}$"
        axes.text(center, -5.3, term, ha="center", va="center", fontsize=12)
        if i:
            axes.text(first + i * spacing, -5.3, "+", ha="center", va="center", fontsize=12)
    axes.text(-0.4, -5.3, f"$o_{{{query}}}$ =", ha="left", va="center", fontsize=12)
    note = "each bucket is one state of a fixed size; λ says how much this token wants of it"
    axes.text(tokens / 2, -6.6, note, ha="center", va="center", fontsize=9, color=INK)


def _draw_levels(axes: Axes, query: int, tokens: int) -> None:
    levels = level_matrix(tokens).tolist()
    for t in range(tokens):
        for s in range(t + 1):
            axes.add_patch(
                Rectangle((s + 0.04, t + 0.04), 0.92, 0.92, facecolor=_color(levels[t][s]), edgecolor="none")
            )
            axes.text(
                s + 0.5, t + 0.53, str(levels[t][s]), ha="center", va="center", color=_ink(levels[t][s]), fontsize=6.5
            )
    axes.add_patch(Rectangle((-0.08, query - 0.08), query + 1.16, 1.16, fill=False, edgecolor=INK, linewidth=1.6))
    axes.text(query + 1.4, query + 0.5, f"t = {query}", va="center", fontsize=9)
    axes.set(xlim=(-0.3, tokens + 0.3), ylim=(tokens + 0.3, -0.3), aspect="equal")
    _bare(axes)
    axes.set_title("level(t, s)", fontsize=13, fontweight="bold", loc="left", pad=10)
    axes.set_ylabel("query t", color=INK)
    axes.set_xlabel("key s", color=INK, loc="left")
