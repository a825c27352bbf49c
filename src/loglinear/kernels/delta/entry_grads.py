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
def weighted_values(do, scales, n, length, first, x, S: tl.constexpr):
    """Tile ``[C, BN]`` of ``λ ∘ dO`` of chunk n, in dO's dtype. do and scales (at a level) point at the sequence's token 0."""
    in_chunk = tl.arange(0, S.C)
    valid = in_chunk < length - n * S.C
    origin = (n * S.C).to(tl.int64)
    tile = load_tile(do + origin * x.stride_do, x.stride_do, valid, S.C, S.V, S.BN, first)
    scale = tl.load(scales + origin * x.stride_scales + in_chunk * x.stride_scales, mask=valid, other=0.0)
    return (tile.to(tl.float32) * (scale.to(tl.float32) * x.factor)[:, None]).to(tile.dtype)


@triton.jit
def window_sum(
    inner_queries,
    inner_grads,
    do,
    scales,
    e,
    count,
    slot,
    length,
    h,
    first_k,
    first_n,
    STATE: tl.constexpr,
    x,
    S: tl.constexpr,
):
    """Tile ``[BK, BN]`` of dS (STATE) or dA, over ``count`` chunks from chunk e on, whose paths start at ``slot``."""
    own = set_bits(e % GROUP)
    total = tl.zeros([S.BK, S.BN], tl.float32)
    for i in range(count):
        above = set_bits(i)
        place = ((slot + above).to(tl.int64) * S.H + h) * (S.C * S.K)
        slot += above + own
        queries = load_part(inner_queries + place, 0, first_k, S.K, S.C, S.K, S.C, S.BK)
        if STATE:
            right = weighted_values(do, scales, e + i, length, first_n, x, S)
        else:
            right = load_part(inner_grads + place, 0, first_n, S.K, S.C, S.K, S.C, S.BN)
        total = tl.dot(tl.trans(queries), right, total, input_precision=S.PRECISION)
    return total


@triton.jit(do_not_specialize=["T", "N", "NG", "L"])
def entry_grads_kernel(
    x,
    L,
    inner_queries,
    inner_grads,
    grads,  # [rows + …, H, K, K+V] by entry
    table,
    T,
    N,
    NG,
    S: tl.constexpr,
):
    """Grid: rows x H x tiles, tiles fastest. float32: accumulator, weights. Programs of whole groups return at once."""
    TILES_A: tl.constexpr = (S.K + S.BN - 1) // S.BN
    TILES_N: tl.constexpr = TILES_A + (S.V + S.BN - 1) // S.BN
    TILES: tl.constexpr = (S.K + S.BK - 1) // S.BK * TILES_N
    pid = tl.program_id(0)
    tile_n = pid % TILES_N
    first_k = pid % TILES // TILES_N * S.BK
    h = pid // TILES % S.H
    row = pid // (TILES * S.H)
    start, length, row0, _, _, _ = locate(row, table, T, N, NG, N, S.PACKED)
    e = row - row0 + 1
    if (length < 0) | (e % GROUP == 0):
        return
    span = lowbit(e)
    count = tl.minimum(span, (length + S.C - 1) // S.C - e)
    scale_level = tl.minimum(log2_of_power(span) + S.LOG_C + 1, L - 1)
    slot = inner_start(e, row0)
    head = grads + (row.to(tl.int64) * S.H + h) * (S.K * (S.K + S.V))
    origin = start.to(tl.int64)
    scales = x.scales + origin * x.stride_scales + h * L + scale_level
    values = x.do + origin * x.stride_do + h * S.V
    if tile_n < TILES_A:
        # An entry that begins at the first chunk is the last of every path.
        reads = tl.where(e == span, 0, count)
        total = window_sum(
            inner_queries, inner_grads, values, scales, e, reads, slot, length, h, first_k, tile_n * S.BN, False, x, S
        )
        store_part(head, total, first_k, tile_n * S.BN, S.K, S.K, S.K + S.V, S.BK, S.BN)
    else:
        first_n = (tile_n - TILES_A) * S.BN
        total = window_sum(
            inner_queries, inner_grads, values, scales, e, count, slot, length, h, first_k, first_n, True, x, S
        )
        store_part(head + S.K, total, first_k, first_n, S.V, S.K, S.K + S.V, S.BK, S.BN)
