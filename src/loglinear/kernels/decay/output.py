"""OUTPUT: each chunk attends to itself under the λ mask, then walks the entries that cover everything before it.

If the first entry of the path is a single chunk, the queries attend to this chunk directly. One level covers it, so no mask
is needed. Half of all entries are therefore neither written nor read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.decays import to_chunk_end
from loglinear.kernels.tree.levels import assemble_mask, column, local_decays, local_scales, path_weights
from loglinear.kernels.tree.place import GROUP, locate, log2_of_power, lowbit, path_length
from loglinear.kernels.tree.tiles import load_state, load_tile, store_tile


@triton.jit
def walk(acc, q_tile, weights, entries, rows, n, n0, h, first_v, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
         BK: tl.constexpr, BV: tl.constexpr, TREE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add ``weight ∘ (Q S_e)`` for each entry e of two chunks or more on the query path of chunk n.

    weights ``[C, TREE]`` by tree level. Rows are scaled after the product, in float32: V multiplications a row, not K.
    """
    e = n & -2
    for _ in range(path_length(e, n0)):
        span = lowbit(e)
        unit = (rows + e - 1).to(tl.int64) * H + h
        state = load_state(entries + unit * (K * V), 0, first_v, K, V, BK, BV)
        weight = column(weights, log2_of_power(span), TREE)
        acc += weight[:, None] * tl.dot(q_tile, state, input_precision=PRECISION)
        e -= span
    return acc


@triton.jit
def careful_product(weights, values, C: tl.constexpr, PRECISION: tl.constexpr):
    """``weights [C, C]`` times ``values`` where tokens (columns) that are not finite count for no earlier one (row).

    0 · NaN is NaN. So a row of values that is not finite becomes zero, and the weights of later tokens for it become NaN.
    """
    t = tl.arange(0, C)
    finite = tl.sum(values.to(tl.float32) * 0.0, axis=1) == 0.0
    seen = tl.where(finite[None, :], weights, float("nan"))
    weights = tl.where(t[:, None] >= t[None, :], seen, 0.0).to(weights.dtype)
    return tl.dot(weights, tl.where(finite[:, None], values, 0.0).to(values.dtype), input_precision=PRECISION)


@triton.jit
def all_finite(checks, TILES: tl.constexpr):
    """Whether the tokens of a group are finite, by the sums that ``chunk_states`` has left of its state."""
    total = 0.0
    for tile in range(TILES):
        total += tl.load(checks + tile)
    return tl.abs(total) < float("inf")


@triton.jit
def attend_to_previous(acc, q_tile, weight, k, v, sums, stride_k, stride_v, plane, first_v, C: tl.constexpr,
                       K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr,
                       PRECISION: tl.constexpr):  # fmt: skip
    """Add ``weight ∘ (Q Kᵀ decay) V`` of one whole chunk; k, v and sums point at its first token. weight: ``[C]``."""
    whole = tl.arange(0, C) < C
    k_tile = load_tile(k, stride_k, whole, C, K, BK, 0)
    v_tile = load_tile(v, stride_v, whole, C, V, BV, first_v)
    decay = to_chunk_end(sums, C, plane, C, EXACT)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * decay[None, :]
    return acc + weight[:, None] * tl.dot(scores.to(v_tile.dtype), v_tile, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "L"])
def output_kernel(
    q,
    k,
    v,
    level_scales,
    sums,
    entries,
    entry_log,
    checks,
    o,
    row_sequence,
    sequences,
    T,
    N,
    NG,
    all_tokens,
    sums_stride,
    stride_q,
    stride_k,
    stride_v,
    stride_s,
    factor,
    L,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LOG_C: tl.constexpr,
    TREE: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TILES: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: tiles of V x H x rows, rows fastest, so that running programs share the entries of few heads in L2.

    One head a program: sharing Q Kᵀ among heads costs more registers than the product is worth. float32: scores, mask,
    accumulator.
    """
    rows = tl.num_programs(0) // (H * ((V + BV - 1) // BV))
    pid = tl.program_id(0)
    row = pid % rows
    h = pid // rows % H
    first_v = pid // (rows * H) * BV
    start, length, row0, group0, n0, _ = locate(row, row_sequence, sequences, T, N, NG, N, PACKED)
    if length < 0:
        return
    local = row - row0
    n = n0 + local
    in_chunk = tl.arange(0, C)
    size = length - local * C
    valid = in_chunk < size
    origin = (start + local * C).to(tl.int64)
    q_tile = load_tile(q + origin * stride_q + h // (H // G) * K, stride_q, valid, C, K, BK, 0)
    k_head = k + origin * stride_k + h // (H // G) * K
    v_head = v + origin * stride_v + h * V
    k_tile = load_tile(k_head, stride_k, valid, C, K, BK, 0)
    v_tile = load_tile(v_head, stride_v, valid, C, V, BV, first_v)
    sound = all_finite(checks + ((group0 + n // GROUP - n0 // GROUP).to(tl.int64) * H + h) * TILES, TILES)
    scales = level_scales + origin * stride_s + h * L
    head_sums = sums + h.to(tl.int64) * sums_stride + origin
    row_sums = tl.load(head_sums + in_chunk, mask=valid, other=0.0)
    weights = factor * path_weights(scales, stride_s, valid, row_sums, entry_log, row0 - n0, n, n0, h, L, H, C, LOG_C,
                                    TREE)  # fmt: skip
    near, far = local_scales(scales, valid, stride_s, factor, L, C)
    near_decay, far_decay, columns = local_decays(head_sums, size, all_tokens, C, EXACT)
    mask = assemble_mask(near * near_decay, far * far_decay, columns, C)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    weighted = (scores * tl.reshape(mask, [C, C])).to(v_tile.dtype)
    acc = tl.dot(weighted, v_tile, input_precision=PRECISION)
    if not sound:
        v_tile = load_tile(v_head, stride_v, valid, C, V, BV, first_v)
        acc = careful_product(weighted, v_tile, C, PRECISION)
    if (n % 2 == 1) & (local > 0):
        acc = attend_to_previous(acc, q_tile, column(weights, 0, TREE), k_head - C * stride_k, v_head - C * stride_v,
                                 head_sums - C, stride_k, stride_v, all_tokens, first_v, C, K, V, BK, BV, EXACT,
                                 PRECISION)  # fmt: skip
    acc = walk(acc, q_tile, weights, entries, row0 - n0, n, n0, h, first_v, H, K, V, BK, BV, TREE, PRECISION)
    store_tile(o + origin * (H * V) + h * V, H * V, valid, acc, C, V, BV, first_v)
