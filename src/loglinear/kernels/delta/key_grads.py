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

from loglinear.kernels.channel.decays import load_log
from loglinear.kernels.channel.gains import blocks_of, of_other_blocks
from loglinear.kernels.delta.score_grads import PRODUCT_GRADS, SOLVE_GRADS, plane, product
from loglinear.kernels.tree.decays import GATE_FLOOR, load_sum, pairs, strengths_of
from loglinear.kernels.tree.place import chunk_of, row_of_program
from loglinear.kernels.tree.tiles import (
    key_head,
    load_part,
    load_tile,
    load_tokens,
    query_head,
    square,
    store_part,
    store_tile,
)


@triton.jit
def inverse_grads(products, decays, strength, solved, solve_grads, S: tl.constexpr):
    """(dZ, Z, dβ ``[C]``), from ``products = K Kᵀ``."""
    t = tl.arange(0, S.C)
    overlap = tl.where(t[:, None] > t[None, :], products * decays, 0.0)
    is_diagonal = t[:, None] == t[None, :]
    inverse = -tl.dot(solved, overlap.to(solved.dtype), input_precision=S.PRECISION)
    inverse = tl.where(is_diagonal, 1.0, inverse)
    divisible = (strength >= 0.0625)[None, :]
    inverse = tl.where(divisible, solved.to(tl.float32) / tl.where(divisible, strength[None, :], 1.0), inverse)
    inverse = inverse.to(solved.dtype)
    e = tl.dot(tl.trans(inverse), solve_grads, input_precision=S.PRECISION)
    own = tl.sum(tl.where(is_diagonal, e, 0.0), axis=1)
    dn = -tl.dot(e.to(solved.dtype), tl.trans(solved), input_precision=S.PRECISION)
    dn = tl.where(t[:, None] > t[None, :], dn, 0.0)
    return dn * strength[:, None], overlap, own + tl.sum(dn * overlap, axis=1)


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "dk_parts", "dq_parts"])
def key_grads_kernel(
    x,
    maps,
    query_grads,
    scores,
    key_grads,
    gains,
    end_gains,
    chunk_gains,
    around,  # with a gate per channel, see channel/gains.py
    out,
    table,
    T,
    N,
    NG,
    all_tokens,
    sums_stride,
    dq_parts,
    dk_parts,
    S: tl.constexpr,
):
    """Grid: H x chunks, chunks fastest. float32: accumulators, decays, the gate's gradient."""
    at, chunk, h, _ = row_of_program(table, T, N, NG, S.H, S)
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    in_chunk, valid, origin = tl.arange(0, S.C), here.valid, here.origin
    site = chunk.to(tl.int64) * S.H + h
    kept = chunk.to(tl.int64) * S.HEADS + h
    dtype = scores.dtype.element_ty
    q_head, k_head = query_head(x, here, h, S), key_head(x, here, h, S)
    high, low = load_sum(maps.sums + h.to(tl.int64) * sums_stride + origin, in_chunk, valid, all_tokens, S)
    decays = pairs(high, low, S)
    from_start = tl.exp2(high)
    strength = strengths_of(x, here, h, in_chunk)
    if S.CHANNELS:
        products = tl.load(square(maps.overlaps + kept * (S.C * S.C), S.C))
    else:
        products = product(k_head, k_head, x.stride_k, x.stride_k, valid, S.K, S.BK, S)
    solved = tl.load(square(maps.solve + kept * (S.C * S.C), S.C))
    solve_grads = tl.load(plane(scores, site, SOLVE_GRADS, S))
    doverlap, overlap, dstrength = inverse_grads(products, decays, strength, solved, solve_grads, S)
    dbeta = out.dbeta + origin * out.stride_dbeta + h + in_chunk * out.stride_dbeta
    tl.store(dbeta, dstrength.to(out.dbeta.dtype.element_ty), mask=valid)
    sources = key_grads + site * (2 * S.C * S.K)
    if S.CHANNELS:  # the rest is left to channel/gate_grads.py
        tl.store(plane(scores, site, SOLVE_GRADS, S), doverlap.to(dtype))
        for first in range(0, S.K, S.BK):
            dw = load_part(sources, S.K, 0, first, S.C, S.K, S.C, S.BK)
            acc = tl.dot(tl.trans(solved), dw, input_precision=S.PRECISION)
            store_part(sources, S.K, acc, 0, first, S.C, S.K, S.C, S.BK)
            starts = load_tokens(maps.starts, S.HEADS * S.K, h, here, S.C, S.K, S.BK, first).to(tl.float32)
            seen = load_part(query_grads + site * (S.C * S.K), S.K, 0, first, S.C, S.K, S.C, S.BK).to(tl.float32)
            seen *= load_tile(q_head, x.stride_q, valid, S.C, S.K, S.BK, first).to(tl.float32)
            beside = of_other_blocks(seen + acc * starts, True, S)
            ends = load_part(sources + S.C * S.K, S.K, 0, first, S.C, S.K, S.C, S.BK).to(tl.float32)
            ends *= load_tile(k_head, x.stride_k, valid, S.C, S.K, S.BK, first).to(tl.float32)
            beside += of_other_blocks(ends, False, S) + load_log(chunk_gains, site, first, S)[None, :]
            pointers, inside = blocks_of(around, site, first, S)
            tl.store(pointers, beside, mask=inside)
        return
    gain = tl.zeros([S.C], tl.float32)
    if x.g is not None:
        shares = doverlap * overlap
        gain += tl.sum(shares, axis=1) - tl.sum(shares, axis=0)

    doverlap_low = (doverlap * decays).to(dtype)
    dproducts = tl.load(plane(scores, site, PRODUCT_GRADS, S))
    part = (h % (S.H // S.G)).to(tl.int64)
    dq_head = out.dq + part * dq_parts + origin * out.stride_dq + h // (S.H // S.G) * S.K
    dk_head = out.dk + part * dk_parts + origin * out.stride_dk + h // (S.H // S.G) * S.K
    for first in range(0, S.K, S.BK):
        k_tile = load_tile(k_head, x.stride_k, valid, S.C, S.K, S.BK, first)
        seen = load_part(query_grads + site * (S.C * S.K), S.K, 0, first, S.C, S.K, S.C, S.BK)
        acc = seen.to(tl.float32) * from_start[:, None]
        acc = tl.dot(dproducts, k_tile, acc, input_precision=S.PRECISION)
        store_tile(dq_head, out.stride_dq, valid, acc, S.C, S.K, S.BK, first)
        dw = load_part(sources, S.K, 0, first, S.C, S.K, S.C, S.BK)
        acc = tl.dot(tl.trans(solved), dw, input_precision=S.PRECISION) * from_start[:, None]
        if x.g is not None:
            gain += tl.sum(acc * k_tile.to(tl.float32), axis=1)
        acc += load_part(sources + S.C * S.K, S.K, 0, first, S.C, S.K, S.C, S.BK).to(tl.float32)
        acc = tl.dot(doverlap_low, k_tile, acc, input_precision=S.PRECISION)
        acc = tl.dot(tl.trans(doverlap_low), k_tile, acc, input_precision=S.PRECISION)
        q_tile = load_tile(q_head, x.stride_q, valid, S.C, S.K, S.BK, first)
        acc = tl.dot(tl.trans(dproducts), q_tile, acc, input_precision=S.PRECISION)
        store_tile(dk_head, out.stride_dk, valid, acc, S.C, S.K, S.BK, first)
    if x.g is not None:
        place = h.to(tl.int64) * all_tokens + origin + in_chunk
        gain += tl.load(gains + place, mask=valid, other=0.0)
        ends = tl.load(end_gains + place, mask=valid, other=0.0)
        gradient = tl.cumsum(gain, axis=0, reverse=True) + (tl.cumsum(ends, axis=0) - ends)
        gradient += tl.load(chunk_gains + site)
        gate = tl.load(x.g + origin * x.stride_g + h + in_chunk * x.stride_g, mask=valid, other=0.0).to(tl.float32)
        gradient = tl.where(gate > GATE_FLOOR, gradient, 0.0)
        dg = out.dg + origin * out.stride_dg + h + in_chunk * out.stride_dg
        tl.store(dg, gradient.to(out.dg.dtype.element_ty), mask=valid)
