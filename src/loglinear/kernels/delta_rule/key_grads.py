"""KEY GRADIENTS: dq, dk, dv, dβ and dg of a chunk, from the shares that its scores and the tree have left.

The gradient of W and that of U give dT, and T gives them on, to keys and values. With ``X = (I + diag(β) Z)⁻¹ = I - T Z`` and
``E = Xᵀ dT`` the chain through the inverse is three small products: ``dN = -tril(E Tᵀ, -1)``, ``dZ = diag(β) dN``,
``dβ = diag(E) + rowsum(dN ∘ Z)``.

The gate: a token's decay lies between the pairs of tokens on either side of it, between every earlier token and the chunk's
end, between its beginning and every later token, and between the two ends. Pairs enter with the later token and leave with the
earlier, as sums of the same float32 products; the ends are summed from the start, so nothing there is subtracted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.common import GATE_FLOOR, GROUP, load_sum, load_tile, locate, pair_decays, store_tile
from loglinear.kernels.delta_rule.group_maps import FIRST_PAIRED
from loglinear.kernels.delta_rule.map_grads import has_pair, share_slot
from loglinear.kernels.delta_rule.score_grads import (
    MASKED,
    PLANES,
    PRODUCT_GRADS,
    PRODUCTS,
    SOLVE_GRADS,
    product,
    square,
)
from loglinear.kernels.delta_rule.tiles import load_part, load_part_if, store_part


@triton.jit
def inverse_grads(products, decays, strength, solved, solve_grads, C: tl.constexpr, PRECISION: tl.constexpr):
    """(dZ, Z, dβ ``[C]``), from ``products = K Kᵀ``."""
    t = tl.arange(0, C)
    overlap = tl.where(t[:, None] > t[None, :], products * decays, 0.0)
    is_diagonal = t[:, None] == t[None, :]
    inverse = -tl.dot(solved, overlap.to(solved.dtype), input_precision=PRECISION)
    inverse = tl.where(is_diagonal, 1.0, inverse)
    divisible = (strength >= 0.0625)[None, :]
    inverse = tl.where(divisible, solved.to(tl.float32) / tl.where(divisible, strength[None, :], 1.0), inverse)
    inverse = inverse.to(solved.dtype)
    e = tl.dot(tl.trans(inverse), solve_grads, input_precision=PRECISION)
    own = tl.sum(tl.where(is_diagonal, e, 0.0), axis=1)
    dn = -tl.dot(e.to(solved.dtype), tl.trans(solved), input_precision=PRECISION)
    dn = tl.where(t[:, None] > t[None, :], dn, 0.0)
    return dn * strength[:, None], overlap, own + tl.sum(dn * overlap, axis=1)


@triton.jit
def shares_of(n, row, group, rows, length, C: tl.constexpr):
    """(whether chunk n has shares of its group's pair, where those are, whether of a leaf, where those are)."""
    c = n % GROUP
    chunks = (length + C - 1) // C
    pair = has_pair(chunks - (n - c)) & ((c == FIRST_PAIRED) | (c == FIRST_PAIRED + 1))
    return pair, share_slot(True, c, row, group, rows), (n % 2 == 0) & (n + 1 < chunks), row // 2


@triton.jit
def key_share(key_shares, leaf_keys, part, row, pair, pair_slot, leaf, leaf_slot, h, first, H: tl.constexpr,
              K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """Columns from ``first`` on of the gradient of W (part 0) or of K through K_end (1), summed over its shares. float32."""
    total = tl.zeros([C, BK], tl.float32)
    shares = BLOCKS * (1 + pair.to(tl.int32))
    for i in range(shares + leaf.to(tl.int32)):
        slot = tl.where(i < BLOCKS, row, pair_slot)
        place = slot.to(tl.int64) * BLOCKS + i % BLOCKS
        source = tl.where(i < shares, key_shares + (place * H + h) * (2 * C * K),
                          leaf_keys + (leaf_slot.to(tl.int64) * H + h) * (2 * C * K))  # fmt: skip
        total += load_part(source + part * (C * K), 0, first, K, C, K, C, BK).to(tl.float32)
    return total


@triton.jit
def value_share(value_shares, leaf_values, row, pair, pair_slot, leaf, leaf_slot, h, first, H: tl.constexpr,
                V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """Rows from ``first`` on of the gradient ``[V, C]`` of U, summed over its shares, in their dtype."""
    own = value_shares + (row.to(tl.int64) * H + h) * (C * V)
    other = value_shares + (pair_slot.to(tl.int64) * H + h) * (C * V)
    last = leaf_values + (leaf_slot.to(tl.int64) * H + h) * (C * V)
    total = load_part(own, first, 0, C, V, C, BV, C).to(tl.float32)
    total += load_part_if(pair, other, first, 0, C, V, C, BV, C).to(tl.float32)
    total += load_part_if(leaf, last, first, 0, C, V, C, BV, C).to(tl.float32)
    return total.to(value_shares.dtype.element_ty)


@triton.jit
def trace_share(traces, leaf_traces, row, pair, pair_slot, leaf, leaf_slot, h, H: tl.constexpr, BLOCKS: tl.constexpr):
    """The sum of the traces of the gradients of the chunk's transition."""
    total = tl.load(leaf_traces + (leaf_slot.to(tl.int64) * H + h), mask=leaf, other=0.0)
    for block in range(BLOCKS):
        total += tl.load(traces + ((row.to(tl.int64) * BLOCKS + block) * H + h))
        total += tl.load(traces + ((pair_slot.to(tl.int64) * BLOCKS + block) * H + h), mask=pair, other=0.0)
    return total


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "dk_parts", "dq_parts"])
def key_grads_kernel(
    q,
    k,
    v,
    do,
    g,
    beta,
    sums,
    chunk_log,
    solve,
    query_grads,
    scores,
    key_shares,  # [rows + 2 groups, blocks, H, 2, C, K]; the second of a row's first is written over
    value_shares,  # [rows + 2 groups, H, V, C]
    traces,  # [rows + 2 groups, blocks, H]
    leaf_keys,  # [rows / 2, H, 2, C, K]
    leaf_values,  # [rows / 2, H, V, C]
    leaf_traces,  # [rows / 2, H]
    gains,  # [H, B*T]
    dq,  # [H / G, B*T, G, K], float32 partial sums unless H == G
    dk,
    dv,
    dg,
    dbeta,
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
    stride_do,
    stride_g,
    stride_b,
    stride_dq,
    stride_dk,
    stride_dv,
    stride_dg,
    stride_db,
    dq_parts,
    dk_parts,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: H x rows, rows fastest. float32: accumulators, decays, the gate's gradient."""
    rows = tl.num_programs(0) // H
    pid = tl.program_id(0)
    row = pid % rows
    h = pid // rows
    start, length, row0, group0, _, _ = locate(row, row_sequence, sequences, T, N, NG, N, PACKED)
    if length < 0:
        return
    n = row - row0
    in_chunk = tl.arange(0, C)
    valid = in_chunk < length - n * C
    origin = (start + n * C).to(tl.int64)
    unit = row.to(tl.int64) * H + h
    kept = row.to(tl.int64) * HEADS + h
    dtype = scores.dtype.element_ty
    planes = scores + unit * (PLANES * C * C)
    q_head = q + origin * stride_q + h // (H // G) * K
    k_head = k + origin * stride_k + h // (H // G) * K
    pair, pair_slot, leaf, leaf_slot = shares_of(n, row, group0 + n // GROUP, rows, length, C)
    from_start = tl.exp2(tl.load(sums + h.to(tl.int64) * sums_stride + origin + in_chunk, mask=valid, other=0.0))
    solved = tl.load(square(solve + kept * (C * C), C))
    through_map = key_shares + (row.to(tl.int64) * BLOCKS * H + h) * (2 * C * K) + C * K

    solve_grads = tl.zeros([C, C], tl.float32)
    gain = tl.zeros([C], tl.float32)
    ends = tl.zeros([C], tl.float32)
    scored = tl.load(square(planes + PRODUCTS * C * C, C))
    for first in range(0, K, BK):
        k_tile = load_tile(k_head, stride_k, valid, C, K, BK, first)
        queries = load_part(query_grads + unit * (C * K), 0, first, K, C, K, C, BK)
        dw = key_share(key_shares, leaf_keys, 0, row, pair, pair_slot, leaf, leaf_slot, h, first, H, K, C, BK, BLOCKS)
        dw = (dw - tl.dot(tl.trans(scored), queries, input_precision=PRECISION)).to(dtype)
        solve_grads = tl.dot(dw, tl.trans(k_tile), solve_grads, input_precision=PRECISION)
        acc = tl.dot(tl.trans(solved), dw, input_precision=PRECISION) * from_start[:, None]
        end = key_share(key_shares, leaf_keys, 1, row, pair, pair_slot, leaf, leaf_slot, h, first, H, K, C, BK, BLOCKS)
        if HAS_GATE:
            gain += tl.sum(acc * k_tile.to(tl.float32), axis=1)
            ends += tl.sum(end * k_tile.to(tl.float32), axis=1)
        tl.debug_barrier()  # all have read their share, which this takes the place of
        store_part(through_map, acc + end, 0, first, K, C, K, C, BK)
    solve_grads *= from_start[None, :]

    masked = tl.load(square(planes + MASKED * C * C, C))
    for first in range(0, V, BV):
        values = load_tile(v + origin * stride_v + h * V, stride_v, valid, C, V, BV, first)
        outputs = load_tile(do + origin * stride_do + h * V, stride_do, valid, C, V, BV, first)
        du = value_share(value_shares, leaf_values, row, pair, pair_slot, leaf, leaf_slot, h, first, H, V, C, BV)
        solve_grads = tl.dot(tl.trans(du), tl.trans(values), solve_grads, input_precision=PRECISION)
        dvalues = tl.dot(tl.trans(masked), outputs, input_precision=PRECISION)
        dvalues = tl.dot(tl.trans(solved), tl.trans(du), dvalues, input_precision=PRECISION)
        store_tile(dv + origin * stride_dv + h * V, stride_dv, valid, dvalues, C, V, BV, first)

    solve_grads += tl.load(square(planes + SOLVE_GRADS * C * C, C)).to(tl.float32)
    high, low = load_sum(sums + h.to(tl.int64) * sums_stride + origin, in_chunk, valid, all_tokens, EXACT)
    decays = pair_decays(high, low, EXACT)
    strength = tl.load(beta + origin * stride_b + h + in_chunk * stride_b, mask=valid, other=0.0).to(tl.float32)
    products = product(k_head, k_head, stride_k, stride_k, valid, C, K, BK, PRECISION)
    doverlap, overlap, dstrength = inverse_grads(
        products, decays, strength, solved, solve_grads.to(dtype), C, PRECISION
    )
    tl.store(dbeta + origin * stride_db + h + in_chunk * stride_db, dstrength.to(dbeta.dtype.element_ty), mask=valid)
    if HAS_GATE:
        pairs = doverlap * overlap
        gain += tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0)

    tl.debug_barrier()  # what this program has written of its keys' gradients is read by other threads of it
    doverlap_low = (doverlap * decays).to(dtype)
    dproducts = tl.load(square(planes + PRODUCT_GRADS * C * C, C))
    own = (h % (H // G)).to(tl.int64)
    dq_head = dq + own * dq_parts + origin * stride_dq + h // (H // G) * K
    dk_head = dk + own * dk_parts + origin * stride_dk + h // (H // G) * K
    for first in range(0, K, BK):
        k_tile = load_tile(k_head, stride_k, valid, C, K, BK, first)
        acc = load_part(query_grads + unit * (C * K), 0, first, K, C, K, C, BK).to(tl.float32) * from_start[:, None]
        acc = tl.dot(dproducts, k_tile, acc, input_precision=PRECISION)
        store_tile(dq_head, stride_dq, valid, acc, C, K, BK, first)
        acc = load_part(through_map, 0, first, K, C, K, C, BK).to(tl.float32)
        acc = tl.dot(doverlap_low, k_tile, acc, input_precision=PRECISION)
        acc = tl.dot(tl.trans(doverlap_low), k_tile, acc, input_precision=PRECISION)
        q_tile = load_tile(q_head, stride_q, valid, C, K, BK, first)
        acc = tl.dot(tl.trans(dproducts), q_tile, acc, input_precision=PRECISION)
        store_tile(dk_head, stride_dk, valid, acc, C, K, BK, first)
    if HAS_GATE:
        place = h.to(tl.int64) * all_tokens + origin + in_chunk
        gain += tl.load(gains + place, mask=valid, other=0.0)
        gradient = tl.cumsum(gain, axis=0, reverse=True) + (tl.cumsum(ends, axis=0) - ends)
        trace = trace_share(traces, leaf_traces, row, pair, pair_slot, leaf, leaf_slot, h, H, BLOCKS)
        gradient += trace * tl.exp2(tl.load(chunk_log + kept))
        gate = tl.load(g + origin * stride_g + h + in_chunk * stride_g, mask=valid, other=0.0).to(tl.float32)
        gradient = tl.where(gate > GATE_FLOOR, gradient, 0.0)
        tl.store(dg + origin * stride_dg + h + in_chunk * stride_dg, gradient.to(dg.dtype.element_ty), mask=valid)
