"""The tiles of each kernel: a table, not a search. Dtype and widths alone choose the tiles, never T or B.

Results must not depend on batch neighbours, and another chunk size is another order of summation. Nothing here may
therefore look at the number of tokens or sequences. A plan is filed under the identity of a configuration: a hash of all its
numbers would cost each call 3 µs. The chunks of kernels are parts of a state's chunk, ``CHUNK_SIZE``: a call
may then go on from a state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from loglinear.kernels.devices import AMPLE
from loglinear.state import CHUNK_SIZE

# Triton 3.6 reads past the end of shared memory on Hopper where a 16-bit tile narrower than 64 columns (128 bytes, a whole
# swizzle) enters one product as it is and another transposed: wrong results at some widths, a fault at others.
LEAST_TILE = 64  # of 16 bits


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel's shape: warps, software-pipelining depth, tile of V (or of K where a kernel tiles K), registers a thread.

    ``registers`` of None lets the compiler choose. ``block_k`` is the tile of K where a kernel tiles both, if not ``block_v``.
    """

    warps: int
    stages: int
    block_v: int = 64
    registers: int | None = None
    block_k: int | None = None

    @property
    def options(self) -> dict:
        """As Triton's launch options."""
        cap = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **cap}


Config = TypeVar("Config")


def uniform(kind: Callable[..., Config], launch: Launch, **sizes: int) -> Config:
    """A configuration of this kind and these sizes, whose kernels are all launched alike."""
    kernels = (field.name for field in dataclasses.fields(kind) if field.name not in sizes)  # type: ignore[arg-type]
    return kind(**sizes, **dict.fromkeys(kernels, launch))


def widths(q: Tensor, v: Tensor) -> tuple[int, int]:
    """(K, V) as numbers, by which a configuration is filed. A graph with symbolic widths is one of these widths then."""
    return int(q.shape[3]), int(v.shape[3])


@dataclass(frozen=True, eq=False)
class ScalarGateConfig:
    """Chunk size, heads that one program of the local, value, query and key kernels handles in turn, and all launches.

    ``heads`` is an upper bound: a program takes the largest divisor of heads per group that does not pass it. Their dq, dk
    and score gradients add up in registers, so more heads mean fewer partial sums in memory.
    ``segment`` is the largest number of groups whose entry gradient one program sums.
    ``least_tile`` is the width to which narrower tiles are padded.
    """

    chunk: int
    heads: int
    segment: int
    least_tile: int
    block_k: int
    states: Launch
    output: Launch
    windows: Launch
    chunk_grads: Launch
    local: Launch
    value: Launch
    query: Launch
    key: Launch

    def heads_per_program(self, heads_per_group: int) -> int:
        return max(n for n in range(1, min(self.heads, heads_per_group) + 1) if heads_per_group % n == 0)


@lru_cache
def scalar_gate_config(
    dtype: torch.dtype, key_width: int, value_width: int, shared_memory: int = AMPLE
) -> ScalarGateConfig:
    """The configuration for inputs of this dtype and these widths. Less memory means shallower pipelines, the same numbers."""
    if dtype == torch.float32:
        return float32_config(max(key_width, 16))
    if key_width > 128 or value_width > 128:
        warps = 8 if key_width > 128 else 4
        config = low_precision_config(CHUNK_SIZE, warps=warps)
        if value_width <= 128:
            return config
        # These kernels unroll their tiles of V: loaded ahead, these would not fit into shared memory (Triton 3.6).
        one_by_one = Launch(warps=warps, stages=1)
        return dataclasses.replace(config, local=one_by_one, value=one_by_one)
    # Depths measured one kernel at a time: H200, Triton 3.6, bf16, B=2, T=16,384, H=48, G=1, K=128, V=64, 2026-11-22.
    config = low_precision_config(CHUNK_SIZE, warps=4)
    if value_width > 64 and shared_memory < AMPLE:
        return config
    deep = Launch(warps=4, stages=3)
    output = Launch(warps=4, stages=1, registers=168)
    return dataclasses.replace(config, states=deep, output=output, windows=deep, value=deep, key=deep, chunk_grads=deep)


def low_precision_config(chunk: int, warps: int, block_k: int = 128, heads: int = 12) -> ScalarGateConfig:
    """16-bit inputs: tensor cores, accumulators of at most 64 registers a thread."""
    wide = Launch(warps=warps, stages=2)
    sizes = {"chunk": chunk, "heads": heads, "segment": 8, "least_tile": LEAST_TILE, "block_k": block_k}
    return uniform(ScalarGateConfig, wide, **sizes)


def float32_config(key_width: int) -> ScalarGateConfig:
    """Float32 inputs: IEEE products on the ordinary units, so tiles are small."""
    small = Launch(warps=4, stages=1, block_v=32)
    block_k = min(64, 1 << (key_width - 1).bit_length())
    return uniform(ScalarGateConfig, small, chunk=CHUNK_SIZE // 2, heads=4, segment=8, least_tile=16, block_k=block_k)


@dataclass(frozen=True, eq=False)
class ChannelConfig:
    """Chunk size and all launches. ``block_k`` of a launch is its tile of K where a kernel tiles K.

    ``least_tile`` is the width to which narrower tiles are padded.
    """

    chunk: int
    least_tile: int
    scores: Launch
    entries: Launch
    output: Launch
    local_grads: Launch
    query_grads: Launch
    key_grads: Launch
    gate_grads: Launch


@lru_cache
def channel_config(dtype: torch.dtype, key_width: int, value_width: int) -> ChannelConfig:
    """The configuration for inputs of this dtype and these widths."""
    if dtype == torch.float32:
        return uniform_channel_config(32, 16, Launch(warps=4, stages=1, block_v=32, block_k=32))
    config = uniform_channel_config(64, LEAST_TILE, Launch(warps=4, stages=2, block_v=64, block_k=64))
    # Measured one kernel at a time: H200, Triton 3.6, bf16, B=2, T=16,384, H=16, K=V=128, 2026-11-30.
    return dataclasses.replace(
        config,
        entries=Launch(warps=4, stages=3, block_v=64, block_k=64),
        output=Launch(warps=4, stages=2, block_v=128),
        gate_grads=Launch(warps=1, stages=1, block_v=64, block_k=32),
    )


def uniform_channel_config(chunk: int, least_tile: int, launch: Launch) -> ChannelConfig:
    """Every kernel launched alike."""
    return uniform(ChannelConfig, launch, chunk=chunk, least_tile=least_tile)


@dataclass(frozen=True, eq=False)
class DeltaRuleConfig:
    """Chunk size and all launches. ``block_v`` is a tile of the K + V columns of a map, or of V where a kernel tiles V.

    ``segment`` is the largest number of groups whose share of an entry's gradient one program sums: a power of two.
    ``scores`` and ``gate_grads`` are the kernels of a gate per channel.
    ``least_tile`` is the width to which narrower tiles are padded.
    """

    chunk: int
    segment: int
    least_tile: int
    chunk_maps: Launch
    octet_maps: Launch
    path_states: Launch
    output: Launch
    path_queries: Launch
    path_grads: Launch
    entry_grads: Launch
    path_state_grads: Launch
    transport_grads: Launch
    wide_entry_grads: Launch
    octet_grads: Launch
    unit_grads: Launch
    score_grads: Launch
    map_grads: Launch
    key_grads: Launch
    scores: Launch
    gate_grads: Launch


@lru_cache
def delta_rule_config(dtype: torch.dtype, key_width: int, value_width: int) -> DeltaRuleConfig:
    """The configuration for inputs of this dtype and these widths."""
    if dtype == torch.float32:
        return uniform_delta_config(CHUNK_SIZE // 2, Launch(warps=8 if key_width > 64 else 4, stages=1, block_v=32))
    if key_width > 128:
        return uniform_delta_config(CHUNK_SIZE, Launch(warps=8, stages=1, block_v=64), least_tile=LEAST_TILE)
    return NARROW_DELTA_RULE


def uniform_delta_config(chunk: int, launch: Launch, segment: int = 8, least_tile: int = 16) -> DeltaRuleConfig:
    """Every kernel launched alike."""
    return uniform(DeltaRuleConfig, launch, chunk=chunk, segment=segment, least_tile=least_tile)


# The best of each kernel, measured: H200, Triton 3.6, bf16, B=2, T=16,384, H=G=16, K=V=128, 2026-11-22.
NARROW_DELTA_RULE = DeltaRuleConfig(
    chunk=CHUNK_SIZE,
    segment=8,
    least_tile=LEAST_TILE,
    chunk_maps=Launch(warps=4, stages=2, block_v=64),
    octet_maps=Launch(warps=4, stages=2, block_v=64),
    path_states=Launch(warps=4, stages=2, block_v=64),
    output=Launch(warps=4, stages=3, block_v=64),
    path_queries=Launch(warps=4, stages=1, block_v=64),
    path_grads=Launch(warps=4, stages=1, block_v=128),
    entry_grads=Launch(warps=4, stages=2, block_v=64),
    path_state_grads=Launch(warps=4, stages=1, block_v=64),
    transport_grads=Launch(warps=4, stages=1, block_v=64),
    wide_entry_grads=Launch(warps=4, stages=1, block_v=64),
    octet_grads=Launch(warps=4, stages=2, block_v=64),
    unit_grads=Launch(warps=4, stages=1, block_v=64),
    score_grads=Launch(warps=4, stages=1, block_v=128),
    map_grads=Launch(warps=4, stages=2, block_v=64),
    key_grads=Launch(warps=4, stages=1, block_v=128),
    scores=Launch(warps=8, stages=1, block_v=64),
    gate_grads=Launch(warps=1, stages=1, block_v=64, block_k=32),
)
