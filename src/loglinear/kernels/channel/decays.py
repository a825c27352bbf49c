"""DECAYS of channels: their logs inside a chunk, as sums that begin at a block of the chunk. Logs are float32 in base 2.

Two tokens of neighbouring blocks of b tokens meet at the boundary: the decay between them is that of the key to the end of its
block, times that of the query from the start of its own. Both are sums of gates, so no difference is taken, and no factor
exceeds 1. Tokens of one block of ``SUB`` tokens are taken pair by pair.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.decays import GATE_FLOOR, LOG2_E
from loglinear.kernels.tree.levels import SUB


@triton.jit
def load_shifted(base, stride, here, shift, inside, first, S: tl.constexpr):
    """Columns ``[C, BK]`` from ``first`` on of the tokens ``shift`` after those of a chunk, 0 where not ``inside [C]``."""
    columns = first + tl.arange(0, S.BK)
    tokens = tl.arange(0, S.C) + shift
    kept = inside & (tokens >= 0) & (tokens < S.C) & (tokens < here.size)
    pointers = base + here.origin * stride + (tokens[:, None] * stride + columns[None, :])
    return tl.load(pointers, mask=kept[:, None] & (columns < S.K)[None, :], other=0.0)


@triton.jit
def load_gates(x, here, h, shift, inside, first, S: tl.constexpr):
    """The same of the log2-decays of head h, clamped; NaN for NaN and for an infinite growth."""
    raw = load_shifted(x.g + h * S.K, x.stride_g, here, shift, inside, first, S).to(tl.float32)
    return tl.where(raw < float("inf"), tl.maximum(raw, GATE_FLOOR), float("nan")) * LOG2_E


@triton.jit
def since_start(gates, BLOCK: tl.constexpr, S: tl.constexpr):
    """Log-decay ``[C, BK]`` from the start of a token's block of BLOCK tokens to the token, its own gate included."""
    blocks = tl.reshape(gates, [S.C // BLOCK, BLOCK, S.BK])
    return tl.reshape(tl.cumsum(blocks, axis=1), [S.C, S.BK])


@triton.jit
def until_end(next_gates, BLOCK: tl.constexpr, S: tl.constexpr):
    """Log-decay ``[C, BK]`` from a token to the end of its block, from the gates of the tokens after each."""
    last = tl.arange(0, S.C) % BLOCK == BLOCK - 1
    blocks = tl.reshape(tl.where(last[:, None], 0.0, next_gates), [S.C // BLOCK, BLOCK, S.BK])
    return tl.reshape(tl.cumsum(blocks, axis=1, reverse=True), [S.C, S.BK])


@triton.jit
def meets(BLOCK: tl.constexpr, C: tl.constexpr):
    """Pairs ``[C, C]`` (query, key) with the key in an even block of BLOCK tokens and the query in the odd one after it."""
    block = tl.arange(0, C) // BLOCK
    return (block[:, None] % 2 == 1) & (block[None, :] == block[:, None] - 1)


@triton.jit
def in_blocks(near, far, C: tl.constexpr):
    """``[C, C]``: ``near [C, SUB]`` for pairs in one block of SUB tokens, ``far [C, C]`` for the others."""
    own = (tl.arange(0, C) // SUB)[:, None] == tl.arange(0, C // SUB)[None, :]
    tiles = tl.where(own[:, :, None], near[:, None, :], tl.reshape(far, [C, C // SUB, SUB]))
    return tl.reshape(tiles, [C, C])


@triton.jit
def own_block(pairs, C: tl.constexpr):
    """``[C, SUB]``: of ``pairs [C, C]`` those in one block of SUB tokens."""
    own = (tl.arange(0, C) // SUB)[:, None] == tl.arange(0, C // SUB)[None, :]
    return tl.sum(tl.where(own[:, :, None], tl.reshape(pairs, [C, C // SUB, SUB]), 0.0), axis=1)


@triton.jit
def load_log(logs, unit, first, S: tl.constexpr):
    """Log-decay ``[BK]`` of a unit (int64) of ``logs [units, K]``."""
    columns = first + tl.arange(0, S.BK)
    return tl.load(logs + unit * S.K + columns, mask=columns < S.K, other=0.0)


@triton.jit
def store_log(logs, unit, value, first, S: tl.constexpr):
    """Write what ``load_log`` reads."""
    columns = first + tl.arange(0, S.BK)
    tl.store(logs + unit * S.K + columns, value, mask=columns < S.K)
