"""ENTRY GRADIENTS: the gradient ``[dA | dS]`` of every entry that lies within an octet, from the chunks that read it.

Entry e is read by its *window*, the ``lowbit(e)`` chunks from chunk e on, here at most half an octet. A chunk's queries Q, as
they meet the entry, are seen from its end, so nothing decays: the gradient is the sum over the window of
``Qᵀ [dQ' | λ ∘ dO]``. The entries of whole octets are in wide_entry_grads.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.delta.path_queries import inner_start
from loglinear.kernels.tree.place import OCTET, locate, log2_of_power, lowbit, set_bits
from loglinear.kernels.tree.tiles import load_part, load_tile, store_part


@triton.jit
def weighted_values(x, at, n, h, scale_level, first, L, S: tl.constexpr):
    """Tile ``[C, BN]`` of ``λ ∘ dO`` of chunk n of a sequence, in dO's dtype, λ of one level."""
    in_chunk = tl.arange(0, S.C)
    valid = in_chunk < at.length - n * S.C
    start, origin = at.start.to(tl.int64), (n * S.C).to(tl.int64)
    do = x.do + start * x.stride_do + h * S.V + origin * x.stride_do
    tile = load_tile(do, x.stride_do, valid, S.C, S.V, S.BN, first)
    scales = x.scales + start * x.stride_scales + h * L + scale_level + origin * x.stride_scales
    scale = tl.load(scales + in_chunk * x.stride_scales, mask=valid, other=0.0)
    return (tile.to(tl.float32) * (scale.to(tl.float32) * x.factor)[:, None]).to(tile.dtype)


@triton.jit
def window_sum(
    x, inner_queries, inner_grads, at, e, count, h, first_k, first_n, STATE: tl.constexpr, L, S: tl.constexpr
):
    """Tile ``[BK, BN]`` of dS (STATE) or dA of entry e of a sequence, over ``count`` chunks from chunk e on."""
    scale_level = tl.minimum(log2_of_power(lowbit(e)) + S.LOG_C + 1, L - 1)
    slot = inner_start(e, at.chunk0)
    own = set_bits(e % OCTET)
    total = tl.zeros([S.BK, S.BN], tl.float32)
    for i in range(count):
        above = set_bits(i)
        place = ((slot + above).to(tl.int64) * S.H + h) * (S.C * S.K)
        slot += above + own
        queries = load_part(inner_queries + place, S.K, 0, first_k, S.C, S.K, S.C, S.BK)
        if STATE:
            right = weighted_values(x, at, e + i, h, scale_level, first_n, L, S)
        else:
            right = load_part(inner_grads + place, S.K, 0, first_n, S.C, S.K, S.C, S.BN)
        total = tl.dot(tl.trans(queries), right, total, input_precision=S.PRECISION)
    return total


@triton.jit
def map_tile_of_program(S: tl.constexpr):
    """(first chunk, first column in A or in S, whether in S, head, the rest) of a program in a grid of … x H x tiles of [K,
    K+V].

    Tiles are fastest, those of A before those of S.
    """
    TILES_A: tl.constexpr = (S.K + S.BN - 1) // S.BN
    TILES_N: tl.constexpr = TILES_A + (S.V + S.BN - 1) // S.BN
    TILES: tl.constexpr = (S.K + S.BK - 1) // S.BK * TILES_N
    pid = tl.program_id(0)
    tile = pid % TILES_N
    in_state = tile >= TILES_A
    first_n = tl.where(in_state, tile - TILES_A, tile) * S.BN
    return pid % TILES // TILES_N * S.BK, first_n, in_state, pid // TILES % S.H, pid // (TILES * S.H)


@triton.jit(do_not_specialize=["T", "N", "NG", "L"])
def entry_grads_kernel(x, L, inner_queries, inner_grads, grads, table, T, N, NG, S: tl.constexpr):
    """``grads [chunks + …, H, K, K+V]`` by entry. Programs of whole octets return at once.

    Grid: chunks x H x tiles, tiles fastest. float32: accumulator, weights.
    """
    first_k, first_n, in_state, h, chunk = map_tile_of_program(S)
    at = locate(chunk, table, T, N, NG, N, S.PACKED)
    e = chunk - at.chunk0 + 1
    if (at.length < 0) | (e % OCTET == 0):
        return
    count = tl.minimum(lowbit(e), (at.length + S.C - 1) // S.C - e)
    head = grads + (chunk.to(tl.int64) * S.H + h) * (S.K * (S.K + S.V))
    if in_state:
        total = window_sum(x, inner_queries, inner_grads, at, e, count, h, first_k, first_n, True, L, S)
        store_part(head + S.K, S.K + S.V, total, first_k, first_n, S.K, S.V, S.BK, S.BN)
    else:
        # An entry that begins at the first chunk is the last of every path.
        reads = tl.where(e == lowbit(e), 0, count)
        total = window_sum(x, inner_queries, inner_grads, at, e, reads, h, first_k, first_n, False, L, S)
        store_part(head, S.K + S.V, total, first_k, first_n, S.K, S.K, S.BK, S.BN)
