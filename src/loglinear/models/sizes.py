"""The parameters of log-linear attention, counted on the models themselves. Run: ``python -m loglinear.models.sizes``.

Models are built on the meta device, so the paper's 800M-parameter sizes are counted in a second and without memory.
"""

from __future__ import annotations

import torch

from loglinear.layers.table import LIFTED, MIXERS
from loglinear.models.causal import LogLinearForCausalLM
from loglinear.models.configuration import LogLinearConfig


def paper_config(mixer: str) -> LogLinearConfig:
    """The paper's size (Guo et al. 2025, section 4): hidden 1536, 21 layers, vocabulary 32,000, contexts of 16,384.

    Mamba-2: 48 heads of 64, state 128, one group. Gated DeltaNet: 6 heads of key 192 and value 384, that model's own
    proportions (keys together 3/4, values 3/2 of the hidden size; Yang et al. 2024). Transformer: 16 heads of 96.
    """
    return LogLinearConfig(mixer=mixer, num_attention_heads=16)


def count_parameters(config: LogLinearConfig) -> int:
    """Parameters of the causal language model, embeddings included."""
    with torch.device("meta"):
        return LogLinearForCausalLM(config).num_parameters()


def parameter_table() -> str:
    """A Markdown table: parameters of each model of the paper, and the parameters that the log-linear form adds."""
    rows = ["| model | parameters | log-linear adds |", "|---|---|---|"]
    rows.append(f"| Transformer | {count_parameters(paper_config('attention')):,} | |")
    for linear, log_linear in LIFTED.items():
        base, more = count_parameters(paper_config(linear)), count_parameters(paper_config(log_linear))
        rows.append(f"| {MIXERS[linear].title} | {base:,} | |")
        rows.append(f"| {MIXERS[log_linear].title} | {more:,} | {more - base:,} ({(more - base) / base:.2%}) |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(parameter_table())
