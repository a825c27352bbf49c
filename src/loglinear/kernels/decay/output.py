"""OUTPUT: each chunk attends to itself under the λ mask, then walks the entries that cover everything before it.

If the first entry of the path is a single chunk, the queries attend to this chunk directly. One level covers it, so no mask
is needed. Half of all entries are therefore neither written nor read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.decays import to_end
from loglinear.kernels.tree.levels import column, local_mask, path_weights
from loglinear.kernels.tree.place import OCTET, chunk_of, log2_of_power, lowbit, path_length, row_of_program
from loglinear.kernels.tree.tiles import load_entry, load_tile, load_tokens, store_tokens


@triton.jit
def walk(acc, q_tile, weights, entries, at, n, h, first_v, S: tl.constexpr, TREE: tl.constexpr):
    """Add ``weight ∘ (Q S_e)`` for each entry e of two chunks or more on the query path of chunk n.

    weights ``[C, TREE]`` by tree level. Rows are scaled after the product, in float32: V multiplications a row, not K.
    """
    base = at.chunk0 - at.n0
    e = n & -2
    for _ in range(path_length(e, at.n0)):
        span = lowbit(e)
        site = (base + e - 1).to(tl.int64) * S.H + h
        state = load_entry(entries, site, 0, first_v, S)
        weight = column(weights, log2_of_power(span), TREE)
        acc += weight[:, None] * tl.dot(q_tile, state, input_precision=S.PRECISION)
        e -= span
    return acc


@triton.jit
def careful_product(weights, values, S: tl.constexpr):
    """``weights [C, C]`` times ``values`` where tokens (columns) that are not finite count for no earlier one (row).

    0 · NaN is NaN. So a row of values that is not finite becomes zero, and the weights of later tokens for it NaN.
    """
    t = tl.arange(0, S.C)
    finite = tl.sum(values.to(tl.float32) * 0.0, axis=1) == 0.0
    seen = tl.where(finite[None, :], weights, float("nan"))
    weights = tl.where(t[:, None] >= t[None, :], seen, 0.0).to(weights.dtype)
    return tl.dot(weights, tl.where(finite[:, None], values, 0.0).to(values.dtype), input_precision=S.PRECISION)


@triton.jit
def all_finite(checks, TILES: tl.constexpr):
    """Whether the tokens of an octet are, by the sums that ``chunk_states`` has left of its state."""
    total = 0.0
    for tile in range(TILES):
        total += tl.load(checks + tile)
    return tl.abs(total) < float("inf")


@triton.jit
def attend_to_previous(acc, q_tile, weight, k, v, sums, x, plane, first_v, S: tl.constexpr):
    """Add ``weight ∘ (Q Kᵀ decay) V`` of one whole chunk; k, v and sums point at its first token. weight: ``[C]``."""
    whole = tl.arange(0, S.C) < S.C
    k_tile = load_tile(k, x.stride_k, whole, S.C, S.K, S.BK, 0)
    v_tile = load_tile(v, x.stride_v, whole, S.C, S.V, S.BV, first_v)
    decay = to_end(sums, S.C, plane, S)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=S.PRECISION) * decay[None, :]
    return acc + weight[:, None] * tl.dot(scores.to(v_tile.dtype), v_tile, input_precision=S.PRECISION)


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "L"])
def output_kernel(
    x, L, states, o, table, T, N, NG, all_tokens, sums_stride, S: tl.constexpr, TREE: tl.constexpr, TILES: tl.constexpr
):
    """Grid: tiles of V x H x chunks, chunks fastest, so that running programs share the entries of few heads in L2.

    One head a program: sharing Q Kᵀ among heads costs more registers than the product is worth. float32: scores, mask,
    accumulator. TREE: levels of the tree, padded; TILES: of the checks of an octet.
    """
    at, chunk, block, _ = row_of_program(table, T, N, NG, S.H * ((S.V + S.BV - 1) // S.BV), S)
    h, first_v = block % S.H, block // S.H * S.BV
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    k_head = x.k + here.origin * x.stride_k + h // (S.H // S.G) * S.K
    v_head = x.v + here.origin * x.stride_v + h * S.V
    q_tile = load_tokens(x.q, x.stride_q, h // (S.H // S.G), here, S.C, S.K, S.BK, 0)
    k_tile = load_tile(k_head, x.stride_k, here.valid, S.C, S.K, S.BK, 0)
    v_tile = load_tile(v_head, x.stride_v, here.valid, S.C, S.V, S.BV, first_v)
    octet = (at.octet0 + here.n // OCTET - at.n0 // OCTET).to(tl.int64) * S.H + h
    sound = all_finite(states.checks + octet * TILES, TILES)
    head_sums = states.sums + h.to(tl.int64) * sums_stride + here.origin
    row_sums = tl.load(head_sums + tl.arange(0, S.C), mask=here.valid, other=0.0)
    weights = x.factor * path_weights(x, row_sums, states.entry_log, at, here, h, L, S, TREE)
    mask = local_mask(x, head_sums, here, h, all_tokens, L, S)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=S.PRECISION)
    weighted = (scores * tl.reshape(mask, [S.C, S.C])).to(v_tile.dtype)
    acc = tl.dot(weighted, v_tile, input_precision=S.PRECISION)
    if not sound:
        v_tile = load_tile(v_head, x.stride_v, here.valid, S.C, S.V, S.BV, first_v)
        acc = careful_product(weighted, v_tile, S)
    if (here.n % 2 == 1) & (here.local > 0):
        before_k, before_v = k_head - S.C * x.stride_k, v_head - S.C * x.stride_v
        weight = column(weights, 0, TREE)
        acc = attend_to_previous(acc, q_tile, weight, before_k, before_v, head_sums - S.C, x, all_tokens, first_v, S)
    acc = walk(acc, q_tile, weights, states.entries, at, here.n, h, first_v, S, TREE)
    store_tokens(o, S.H * S.V, h, here, acc, S.C, S.V, S.BV, first_v)
