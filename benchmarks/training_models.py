"""The columns of the training benchmark: the paper's models and their peers, built alike, and the FLOPs of a step.

Model FLOPs do not depend on the implementation. A parameter of a matrix costs 6 FLOPs per token. Sequence mixing is counted in
the chunkwise form with chunks of 64 tokens, with causal products by their triangle, as three times its forward pass.
Recomputed work counts once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend

from loglinear.layers import LogLinearGatedDeltaNet, LogLinearMamba2, SoftmaxAttention
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from training_peers import FlaGatedDeltaNet, SSDMamba2

CHUNK = 64
OPTIMISER = "optimiser"
HEAD_DIM = 96  # of softmax attention: 16 heads at the paper's width
# The delta rule has values twice as wide as keys, and 9 heads at the paper's width. The paper's 6 heads of 192 and 384
# have as many parameters, except in gates and λ. The tiles of powers of two, the peer's and ours, would pad them to 256
# and 512.
KEY_DIM = 128


@dataclass(frozen=True)
class Column:
    """A model to time: a mixer of the config, the class that takes its place, the kernel that softmax attention must use."""

    mixer: str
    peer: type[nn.Module] | None = None
    backend: SDPBackend | None = None


COLUMNS = {
    "log_linear_mamba2": Column("log_linear_mamba2"),
    "mamba2": Column("mamba2"),
    "log_linear_gated_deltanet": Column("log_linear_gated_deltanet"),
    "gated_deltanet": Column("gated_deltanet"),
    "transformer, flash attention 2": Column("attention", backend=SDPBackend.FLASH_ATTENTION),
    "transformer, cudnn": Column("attention", backend=SDPBackend.CUDNN_ATTENTION),
    "mamba2, ssd": Column("mamba2", peer=SSDMamba2),
    "gated_deltanet, fla 0.2.2": Column("gated_deltanet", peer=FlaGatedDeltaNet),
}


@dataclass(frozen=True)
class Size:
    """Widths and depths; the defaults are the paper's."""

    hidden_size: int = 1536
    layers: int = 21
    attention_layers: int = 24
    vocab_size: int = 32_000
    context: int = 16_384

    def config(self, mixer: str, layers: int | None = None, **options) -> LogLinearConfig:
        """The configuration of ``mixer``, with a λ for every level of ``context``."""
        depth = self.attention_layers if mixer == "attention" else self.layers
        return LogLinearConfig(
            mixer=mixer,
            hidden_size=self.hidden_size,
            num_hidden_layers=layers or depth,
            num_attention_heads=max(1, self.hidden_size // HEAD_DIM),
            delta_num_heads=max(1, 3 * self.hidden_size // 4 // KEY_DIM),
            vocab_size=self.vocab_size,
            max_position_embeddings=self.context,
            **options,
        )


def build(config: LogLinearConfig, column: Column, device: str) -> LogLinearForCausalLM:
    """A fresh model in training mode with float32 weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LogLinearForCausalLM(config).train()
    if column.peer is not None:
        for block in model.model.layers:
            block.mixer.__class__ = column.peer
    return model


def checkpoint_activations(model: LogLinearForCausalLM, wanted: bool) -> None:
    """Switch activation checkpointing on or off; transformers renamed it during its version 5."""
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{prefix}_checkpointing_{'enable' if wanted else 'disable'}")()


def update(model: LogLinearForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    """The end of a training step, under a name for profilers: clip the gradient's norm, step, drop the gradient."""
    with torch.profiler.record_function(OPTIMISER):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def matrices(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers by name: all matrix products of a step that have a weight."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def model_flops(model: LogLinearForCausalLM, batch: int, length: int) -> int:
    """Floating-point operations that one step on ``[batch, length]`` tokens asks for."""
    weights = sum(module.weight.numel() for module in matrices(model).values())
    mixing = sum(mixing_flops(block.mixer, length) for block in model.model.layers)
    return batch * (6 * weights * length + 3 * mixing)


def mixing_flops(mixer: nn.Module, length: int) -> int:
    """FLOPs of one row in the forward pass, without projections, convolution and gates, which no share of the step shows."""
    if isinstance(mixer, SoftmaxAttention):
        width = mixer.out_proj.in_features
        return 2 * width * length * (length + 1)  # q kᵀ and p v, 2 each, for T (T + 1) / 2 pairs
    chunk = min(CHUNK, length)
    reads = entries_read(length) if mixer.level_scale is not None else length
    triangle = length * (chunk + 1)  # twice the pairs inside chunks: operations per unit of width
    H = mixer.num_heads
    if isinstance(mixer, LogLinearMamba2):
        inner, keys, _ = mixer.conv_widths  # H V, G K
        K = keys // mixer.num_groups
        inside = triangle * (keys + inner)  # scores, a group of heads at once; times values
        return inside + 2 * K * inner * (length + reads)  # states written, states read
    assert isinstance(mixer, LogLinearGatedDeltaNet)
    keys, _, values = mixer.conv_widths
    K, V = keys // mixer.num_key_heads, values // H
    inside = triangle * (
        2 * keys + values + H * (K + V)
    )  # q kᵀ and k kᵀ, times values; the inverse times keys and values
    if mixer.level_scale is None:
        return inside + 2 * H * K * V * (2 * length + reads)  # what is erased and what is added, what is read
    # Maps of K + V columns: those of chunks, their merges (one a chunk), and the entries that states and queries pass.
    merges = length // chunk - 1
    return inside + 2 * H * K * (K + V) * (length + K * merges + reads)


def entries_read(length: int) -> int:
    """Entries of the Fenwick array that the tokens of a row read: for each the bits set in the number of its chunk."""
    return sum(min(CHUNK, length - start) * (start // CHUNK).bit_count() for start in range(0, length, CHUNK))
