"""Requests that fit on a GPU against their context, for the paper's Log-Linear Mamba-2 and its softmax twin (825M).

    python benchmarks/serving_memory.py --figure docs/figures/serving_memory.png

Nothing is measured: the sizes of vLLM's pages (``loglinear.layers.pages``) and of keys and values are divided into the memory
that the weights leave. Weights, activations, keys and values have 16 bits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from loglinear import LogLinearConfig
from loglinear.layers import MIXERS
from loglinear.layers.pages import PageLayout
from loglinear.models.sizes import count_parameters
from loglinear.tasks.style import canvas, label_ends, plain, plain_axis, save, styled, token_axis, tokens

CONTEXTS = [1 << power for power in range(10, 21)]
MEMORY = 72 << 30  # of a GPU of 80 GiB; vLLM leaves a tenth free
LINES = {
    "Log-Linear Mamba-2": ("log_linear_mamba2", torch.float32),
    "Log-Linear Mamba-2, bfloat16 entries": ("log_linear_mamba2", torch.bfloat16),
    "Transformer": ("attention", None),
}


def request_bytes(config: LogLinearConfig, context: int, entry_dtype: torch.dtype | None) -> int:
    """Bytes of a request in all layers, with room for ``context`` tokens."""
    if config.mixer == "attention":
        return config.num_hidden_layers * context * 2 * config.num_key_value_heads * config.head_dim * 2
    assert entry_dtype is not None
    with torch.device("meta"):
        mixer = MIXERS[config.layer_mixers[0]].build(config).to(torch.bfloat16)
    page = PageLayout.of(mixer, config.hidden_size, torch.bfloat16, context, entry_dtype)
    return config.num_hidden_layers * page.nbytes


def requests(mixer: str, entry_dtype: torch.dtype | None, context: int) -> float:
    """Requests that fit beside the weights."""
    config = LogLinearConfig(mixer=mixer, max_position_embeddings=context)
    return (MEMORY - 2 * count_parameters(config)) / request_bytes(config, context, entry_dtype)


@styled
def draw(rows: dict[str, list[float]], path: Path) -> None:
    title = (
        "At a context of 1M, a GPU of 80 GiB holds {:.0f} requests of Log-Linear Mamba-2 and {:.1f} of its softmax twin"
    )
    title = title.format(rows["Log-Linear Mamba-2"][-1], rows["Transformer"][-1])
    figure, panels = canvas(title, size=(4.6, 3.0), right=2.6)
    panel, colors = panels[0, 0], ("#1a6fd8", "#4a9ae0", "#00936b")
    for counts, color in zip(rows.values(), colors):
        panel.plot(CONTEXTS, counts, color=color)
    panel.set_yscale("log")
    token_axis(panel, CONTEXTS)
    plain_axis(panel.yaxis, [1, 10, 100, 1000], plain)
    panel.set_xlabel("tokens that a request may have")
    panel.set_ylabel("requests on one GPU")
    panel.set_xlim(CONTEXTS[0], CONTEXTS[-1])
    label_ends(panel, [(counts[-1], name, color) for (name, counts), color in zip(rows.items(), colors)])
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path, help="where to draw, as .png and .svg")
    arguments = parser.parse_args()
    rows = {name: [requests(*line, context) for context in CONTEXTS] for name, line in LINES.items()}
    print(f"{'context':>8}" + "".join(f"{name:>40}" for name in rows))
    for i, context in enumerate(CONTEXTS):
        print(f"{tokens(context):>8}" + "".join(f"{counts[i]:>40,.1f}" for counts in rows.values()))
    if arguments.figure:
        draw(rows, arguments.figure)


if __name__ == "__main__":
    main()
