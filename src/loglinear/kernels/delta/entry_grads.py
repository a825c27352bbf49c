"""ENTRY GRADIENTS: the gradient ``[dA | dS]`` of every entry that lies within a group, from the chunks that read it.

Entry e is read by its *window*, the ``lowbit(e)`` chunks from chunk e on, here at most half a group. A chunk's queries Q, as
they meet the entry, are seen from its end, so nothing decays: the gradient is the sum over the window of
``Qᵀ [dQ' | λ ∘ dO]``. The entries of whole groups are in wide_entry_grads.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.delta.path_queries import inner_start
from loglinear.kernels.delta.tiles import load_part, store_part
from loglinear.kernels.tree.place import GROUP, locate, log2_of_power, lowbit, set_bits
from loglinear.kernels.tree.tiles import load_tile


@triton.jit
def weighted_values(do, scales, n, length, first, stride_do, stride_s, factor, C: tl.constexpr, V: tl.constexpr,
                    BN: tl.constexpr):  # fmt: skip
    """Tile ``[C, BN]`` of ``λ ∘ dO`` of chunk n, in dO's dtype. do and scales (at a level) point at the sequence's token 0."""
    in_chunk = tl.arange(0, C)
    valid = in_chunk < length - n * C
    origin = (n * C).to(tl.int64)
    tile = load_tile(do + origin * stride_do, stride_do, valid, C, V, BN, first)
    scale = tl.load(scales + origin * stride_s + in_chunk * stride_s, mask=valid, other=0.0)
    return (tile.to(tl.float32) * (scale.to(tl.float32) * factor)[:, None]).to(tile.dtype)


@triton.jit
def window_sum(inner_queries, inner_grads, do, scales, e, count, slot, length, h, first_k, first_n, stride_do, stride_s,
               factor, STATE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
               BK: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Tile ``[BK, BN]`` of dS (STATE) or dA, over ``count`` chunks from chunk e on, whose paths start at ``slot``."""
    own = set_bits(e % GROUP)
    total = tl.zeros([BK, BN], tl.float32)
    for i in range(count):
        above = set_bits(i)
        place = ((slot + above).to(tl.int64) * H + h) * (C * K)
        slot += above + own
        queries = load_part(inner_queries + place, 0, first_k, K, C, K, C, BK)
        if STATE:
            right = weighted_values(do, scales, e + i, length, first_n, stride_do, stride_s, factor, C, V, BN)
        else:
            right = load_part(inner_grads + place, 0, first_n, K, C, K, C, BN)
        total = tl.dot(tl.trans(queries), right, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["T", "N", "NG", "L"])
def entry_grads_kernel(
    do,
    level_scales,
    inner_queries,
    inner_grads,
    grads,  # [rows + …, H, K, K+V] by entry
    row_sequence,
    sequences,
    T,
    N,
    NG,
    stride_do,
    stride_s,
    factor,
    L,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LOG_C: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: rows x H x tiles, tiles fastest. float32: accumulator, weights. Programs of whole groups return at once."""
    TILES_A: tl.constexpr = (K + BN - 1) // BN
    TILES_N: tl.constexpr = TILES_A + (V + BN - 1) // BN
    TILES: tl.constexpr = (K + BK - 1) // BK * TILES_N
    pid = tl.program_id(0)
    tile_n = pid % TILES_N
    first_k = pid % TILES // TILES_N * BK
    h = pid // TILES % H
    row = pid // (TILES * H)
    start, length, row0, _, _, _ = locate(row, row_sequence, sequences, T, N, NG, N, PACKED)
    e = row - row0 + 1
    if (length < 0) | (e % GROUP == 0):
        return
    span = lowbit(e)
    count = tl.minimum(span, (length + C - 1) // C - e)
    scale_level = tl.minimum(log2_of_power(span) + LOG_C + 1, L - 1)
    slot = inner_start(e, row0)
    head = grads + (row.to(tl.int64) * H + h) * (K * (K + V))
    origin = start.to(tl.int64)
    scales = level_scales + origin * stride_s + h * L + scale_level
    values = do + origin * stride_do + h * V
    if tile_n < TILES_A:
        # An entry that begins at the first chunk is the last of every path.
        reads = tl.where(e == span, 0, count)
        total = window_sum(inner_queries, inner_grads, values, scales, e, reads, slot, length, h, first_k, tile_n * BN,
                           stride_do, stride_s, factor, False, H, K, V, C, BK, BN, PRECISION)  # fmt: skip
        store_part(head, total, first_k, tile_n * BN, K, K, K + V, BK, BN)
    else:
        first_n = (tile_n - TILES_A) * BN
        total = window_sum(inner_queries, inner_grads, values, scales, e, count, slot, length, h, first_k, first_n,
                           stride_do, stride_s, factor, True, H, K, V, C, BK, BN, PRECISION)  # fmt: skip
        store_part(head + K, total, first_k, first_n, V, K, K + V, BK, BN)
