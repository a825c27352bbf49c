"""The levels that a model uses: the mean λ of every level and layer, over the tokens that have a bucket at that level."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from loglinear.layers.level_scale import LevelScale
from loglinear.tasks.lm.evaluation import to_device
from loglinear.tasks.lm.tokens import Windows
from loglinear.tasks.style import INK, canvas, heat, save, styled


def level_counts(length: int, levels: int) -> Tensor:
    """``[length, levels]``: how many buckets of token t take λ number l. Levels beyond the last share its λ."""
    positions = torch.arange(length)
    counts = torch.zeros(length, levels, dtype=torch.long)
    counts[:, 0] = 1  # the token itself
    for bit in range(max(length - 1, 0).bit_length()):
        counts[:, min(bit + 1, levels - 1)] += positions >> bit & 1
    return counts


@torch.inference_mode()
def mean_level_scales(
    model: PreTrainedModel, windows: Windows, batch_size: int, dtype: torch.dtype = torch.float32
) -> list[dict]:
    """For each log-linear layer: its name, and λ averaged over sequences and tokens, ``[heads][levels]``.

    A token counts at a level only if it has a bucket there. The mean of a level without any bucket is None. Raises
    ValueError for a model without log-linear layers.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LevelScale)}
    if not layers:
        raise ValueError("measures: levels needs a model with a log-linear layer, and this one has none")
    sums: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    counts = {
        name: level_counts(windows.context, module.L.shape[1]).to(device, torch.float32)
        for name, module in layers.items()
    }

    def add(name: str, module: torch.nn.Module, inputs: tuple, scales: Tensor) -> None:
        # Under autocast einsum would be a matrix product, and would round the sums to bfloat16.
        weighted = (scales.float() * counts[name].unsqueeze(1)).sum((0, 1))
        sums[name] = sums.get(name, 0) + weighted.double()

    hooks = [module.register_forward_hook(partial(add, name)) for name, module in layers.items()]
    model.eval()
    try:
        for start in range(0, len(windows), batch_size):
            stop = min(start + batch_size, len(windows))
            ids = to_device(torch.stack([windows[index]["input_ids"] for index in range(start, stop)]), device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                # No mask, which would pack the sequences into one row, and no cache, which costs memory.
                model.base_model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        {
            "layer": name.removesuffix(".mixer.level_scale"),
            "heads": _means(sums[name], counts[name].double().sum(0) * len(windows)),
        }
        for name in layers
    ]


def _means(sums: Tensor, counts: Tensor) -> list[list[float | None]]:
    return [[float(s / n) if n else None for s, n in zip(row, counts)] for row in sums]


@styled
def draw_levels(layers: list[dict], path: Path) -> list[Path]:
    """Save PNG and SVG: mean λ over level and layer (left), and its spread over the heads of a layer (right)."""
    widest = max(len(layer["heads"][0]) for layer in layers)
    values = np.full((2, len(layers), widest), np.nan)
    for i, layer in enumerate(layers):
        heads = np.array(layer["heads"], dtype=float)  # None becomes nan
        values[0, i, : heads.shape[1]] = heads.mean(0)
        values[1, i, : heads.shape[1]] = heads.std(0)
    known = np.flatnonzero(np.isfinite(values[0]).any(0))
    means = np.nanmean(values[0][:, known], axis=0)
    (most, top), (least, low) = ((int(known[i]), means[i]) for i in (means.argmax(), means.argmin()))
    title = f"λ is largest at level {most} ({top:.2f}) and smallest at level {least} ({low:.2f}), mean over layers"
    names = [layer["layer"].removeprefix("model.").removeprefix("layers.") for layer in layers]
    size = (0.6 + 0.33 * widest, max(1.2, 0.24 * len(layers)))
    figure, panels = canvas(title, (1, 2), size, gaps=(0.6, 0.5))
    for panel, text, shown in zip(panels[0], ("mean λ", "standard deviation over heads"), values):
        draw_level_map(panel, shown, names)
        panel.set_title(text)
    panels[0, 0].set_ylabel("layer")
    return save(figure, path)


def draw_level_map(panel, values: np.ndarray, names: Sequence[str]) -> None:
    """A heat map of ``values [layers, levels]`` with each number in its cell."""
    low, high = np.nanmin(values), np.nanmax(values)
    colors, ink = heat(low, high)
    panel.imshow(values, aspect="auto", cmap=colors, vmin=low, vmax=high)
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            panel.text(j, i, f"{value:.2f}"[-4:], ha="center", va="center", fontsize=6.5, color=ink(value))
    panel.set_xlabel("level (0: the token itself, ℓ: 2^(ℓ−1) tokens)")
    panel.set_yticks(range(len(names)), names)
    panel.set_xticks(range(0, values.shape[1], 1 if values.shape[1] <= 12 else 2))
    panel.tick_params(length=0, colors=INK)
    panel.spines[:].set_visible(False)
