"""KEY GRADIENTS: dq, dk, dβ and dg of a chunk, once the gradient dT of its solved system is complete.

With ``X = (I + diag(β) Z)⁻¹ = I - T Z`` and ``E = Xᵀ dT`` the chain through the inverse is three small products:
``dN = -tril(E Tᵀ, -1)``, ``dZ = diag(β) dN``, ``dβ = diag(E) + rowsum(dN ∘ Z)``.

The gate: a token's decay lies between the pairs of tokens on either side of it, between every earlier token and the
chunk's end, and between its beginning and every later token. Pairs enter with the later token and leave with the
earlier, as sums of the same float32 products; the sums for the ends run from the start, so nothing is subtracted there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.delta.score_grads import PLANES, PRODUCT_GRADS, SOLVE_GRADS, product, square
from loglinear.kernels.delta.tiles import load_part
from loglinear.kernels.tree.decays import GATE_FLOOR, load_sum, pair_decays
from loglinear.kernels.tree.place import locate
from loglinear.kernels.tree.tiles import load_tile, store_tile


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


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "dk_parts", "dq_parts"])
def key_grads_kernel(
    q,
    k,
    g,
    beta,
    sums,
    solve,
    query_grads,
    scores,
    key_grads,
    gains,
    end_gains,
    chunk_gains,
    dq,  # [H / G, B*T, G, K], float32 partial sums unless H == G
    dk,
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
    stride_g,
    stride_b,
    stride_dq,
    stride_dk,
    stride_dg,
    stride_db,
    dq_parts,
    dk_parts,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
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
    start, length, row0, _, _, _ = locate(row, row_sequence, sequences, T, N, NG, N, PACKED)
    if length < 0:
        return
    n = row - row0
    in_chunk = tl.arange(0, C)
    valid = in_chunk < length - n * C
    origin = (start + n * C).to(tl.int64)
    unit = row.to(tl.int64) * H + h
    dtype = scores.dtype.element_ty
    planes = scores + unit * (PLANES * C * C)
    q_head = q + origin * stride_q + h // (H // G) * K
    k_head = k + origin * stride_k + h // (H // G) * K
    high, low = load_sum(sums + h.to(tl.int64) * sums_stride + origin, in_chunk, valid, all_tokens, EXACT)
    decays = pair_decays(high, low, EXACT)
    from_start = tl.exp2(high)
    strength = tl.load(beta + origin * stride_b + h + in_chunk * stride_b, mask=valid, other=0.0).to(tl.float32)
    products = product(k_head, k_head, stride_k, stride_k, valid, C, K, BK, PRECISION)
    solved = tl.load(square(solve + (row.to(tl.int64) * HEADS + h) * (C * C), C))
    solve_grads = tl.load(square(planes + SOLVE_GRADS * C * C, C))
    doverlap, overlap, dstrength = inverse_grads(products, decays, strength, solved, solve_grads, C, PRECISION)
    tl.store(dbeta + origin * stride_db + h + in_chunk * stride_db, dstrength.to(dbeta.dtype.element_ty), mask=valid)
    gain = tl.zeros([C], tl.float32)
    if HAS_GATE:
        pairs = doverlap * overlap
        gain += tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0)

    doverlap_low = (doverlap * decays).to(dtype)
    dproducts = tl.load(square(planes + PRODUCT_GRADS * C * C, C))
    sources = key_grads + unit * (2 * C * K)
    part = (h % (H // G)).to(tl.int64)
    dq_head = dq + part * dq_parts + origin * stride_dq + h // (H // G) * K
    dk_head = dk + part * dk_parts + origin * stride_dk + h // (H // G) * K
    for first in range(0, K, BK):
        k_tile = load_tile(k_head, stride_k, valid, C, K, BK, first)
        acc = load_part(query_grads + unit * (C * K), 0, first, K, C, K, C, BK).to(tl.float32) * from_start[:, None]
        acc = tl.dot(dproducts, k_tile, acc, input_precision=PRECISION)
        store_tile(dq_head, stride_dq, valid, acc, C, K, BK, first)
        dw = load_part(sources, 0, first, K, C, K, C, BK)
        acc = tl.dot(tl.trans(solved), dw, input_precision=PRECISION) * from_start[:, None]
        if HAS_GATE:
            gain += tl.sum(acc * k_tile.to(tl.float32), axis=1)
        acc += load_part(sources + C * K, 0, first, K, C, K, C, BK).to(tl.float32)
        acc = tl.dot(doverlap_low, k_tile, acc, input_precision=PRECISION)
        acc = tl.dot(tl.trans(doverlap_low), k_tile, acc, input_precision=PRECISION)
        q_tile = load_tile(q_head, stride_q, valid, C, K, BK, first)
        acc = tl.dot(tl.trans(dproducts), q_tile, acc, input_precision=PRECISION)
        store_tile(dk_head, stride_dk, valid, acc, C, K, BK, first)
    if HAS_GATE:
        place = h.to(tl.int64) * all_tokens + origin + in_chunk
        gain += tl.load(gains + place, mask=valid, other=0.0)
        ends = tl.load(end_gains + place, mask=valid, other=0.0)
        gradient = tl.cumsum(gain, axis=0, reverse=True) + (tl.cumsum(ends, axis=0) - ends)
        gradient += tl.load(chunk_gains + unit)
        gate = tl.load(g + origin * stride_g + h + in_chunk * stride_g, mask=valid, other=0.0).to(tl.float32)
        gradient = tl.where(gate > GATE_FLOOR, gradient, 0.0)
        tl.store(dg + origin * stride_dg + h + in_chunk * stride_dg, gradient.to(dg.dtype.element_ty), mask=valid)
