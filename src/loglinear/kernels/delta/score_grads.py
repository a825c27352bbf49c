"""SCORE GRADIENTS: gradients of the scores inside a chunk, ``R = P T`` with ``P = tril(Q Kᵀ ∘ Γ)``, and of P and T.

One pass computes the four ``[C, C]`` matrices that the other kernels of a chunk multiply by, and dλ of the levels
inside the chunk. The gate's gradient leaves the diagonal out: it would cancel there and leave its rounding error
behind.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.decays import load_sum, pairs
from loglinear.kernels.tree.levels import LOG_SUB, SUB, level_mask, local_levels
from loglinear.kernels.tree.place import chunk_of, row_of_program
from loglinear.kernels.tree.tiles import key_head, load_tile, query_head, square

# Planes of ``scores``. The last is P's share Pᵀ dR of dT, until map_grads adds the others.
PRODUCTS = tl.constexpr(0)  # P
MASKED = tl.constexpr(1)  # Λ ∘ R
PRODUCT_GRADS = tl.constexpr(2)  # dP ∘ Γ
SOLVE_GRADS = tl.constexpr(3)  # dT
PLANES = tl.constexpr(4)


@triton.jit
def plane(scores, site, which, S: tl.constexpr):
    """Pointers to one of the planes of a chunk and head."""
    return square(scores + site * (PLANES * S.C * S.C) + which * S.C * S.C, S.C)


@triton.jit
def sums_by_level(values, L, S: tl.constexpr):
    """Row sums ``[C, LEVELS]`` of ``values [C, C]`` over the columns of each level. Zero above the diagonal."""
    own, other = local_levels(S.C)
    is_own = (tl.arange(0, S.C) // SUB)[:, None] == tl.arange(0, S.C // SUB)[None, :]
    blocks = tl.reshape(values, [S.C, S.C // SUB, SUB])
    near = tl.sum(tl.where(is_own[:, :, None], blocks, 0.0), axis=1)
    far = tl.sum(blocks, axis=2)
    columns = tl.arange(0, S.LEVELS)[None, :]
    total = tl.zeros([S.C, S.LEVELS], tl.float32)
    for level in tl.static_range(0, S.LOG_C + 1):
        if level <= LOG_SUB:
            row = tl.sum(tl.where(own == level, near, 0.0), axis=1)
        else:
            row = tl.sum(tl.where(other == level, far, 0.0), axis=1)
        total += tl.where(columns == tl.minimum(level, L - 1), row[:, None], 0.0)
    return total


@triton.jit
def product(left, right, stride_l, stride_r, valid, WIDTH: tl.constexpr, TILE: tl.constexpr, S: tl.constexpr):
    """``X Yᵀ`` ``[C, C]`` of two matrices ``[C, WIDTH]``, in tiles."""
    total = tl.zeros([S.C, S.C], tl.float32)
    for first in range(0, WIDTH, TILE):
        x = load_tile(left, stride_l, valid, S.C, WIDTH, TILE, first)
        y = load_tile(right, stride_r, valid, S.C, WIDTH, TILE, first)
        total = tl.dot(x, tl.trans(y), total, input_precision=S.PRECISION)
    return total


@triton.jit
def query_gain(q_head, stride_q, query_grads, valid, TILE: tl.constexpr, S: tl.constexpr):
    """``q · dQ̃`` ``[C]``."""
    gain = tl.zeros([S.C], tl.float32)
    for first in range(0, S.K, TILE):
        q_tile = load_tile(q_head, stride_q, valid, S.C, S.K, TILE, first).to(tl.float32)
        gain += tl.sum(q_tile * load_tile(query_grads, S.K, valid, S.C, S.K, TILE, first).to(tl.float32), axis=1)
    return gain


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "L"])
def score_grads_kernel(
    x, L, maps, query_grads, scores, out, gains, table, T, N, NG, all_tokens, sums_stride, S: tl.constexpr
):
    """``scores [chunks, H, PLANES, C, C]``; completes dλ; ``gains [H, B*T]``, the share of a row's queries in dG.

    Grid: H x chunks, chunks fastest. float32: products, decays, scores and their gradients until they are stored.
    """
    at, chunk, h, _ = row_of_program(table, T, N, NG, S.H, S)
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    in_chunk, valid, origin = tl.arange(0, S.C), here.valid, here.origin
    site = chunk.to(tl.int64) * S.H + h
    kept = chunk.to(tl.int64) * S.HEADS + h
    dtype = scores.dtype.element_ty
    q_head, k_head = query_head(x, here, h, S), key_head(x, here, h, S)
    earlier = in_chunk[:, None] >= in_chunk[None, :]

    do, v = x.do + origin * x.stride_do + h * S.V, x.v + origin * x.stride_v + h * S.V
    outer = product(do, v, x.stride_do, x.stride_v, valid, S.V, S.BV, S)
    high, low = load_sum(maps.sums + h.to(tl.int64) * sums_stride + origin, in_chunk, valid, all_tokens, S)
    decays = tl.where(earlier, pairs(high, low, S), 0.0)
    if S.CHANNELS:
        products = tl.load(square(maps.scores + kept * (S.C * S.C), S.C)).to(tl.float32)
    else:
        products = product(q_head, k_head, x.stride_q, x.stride_k, valid, S.K, S.BK, S) * decays
    products_low = products.to(dtype)
    tl.store(plane(scores, site, PRODUCTS, S), products_low)
    solved = tl.load(square(maps.solve + kept * (S.C * S.C), S.C))
    within = tl.dot(products_low, solved, input_precision=S.PRECISION)
    mask = level_mask(x, here, h, L, S)
    tl.store(plane(scores, site, MASKED, S), (within * mask).to(dtype))
    columns = tl.arange(0, S.LEVELS)[None, :]
    place = out.dscales + origin * out.stride_dscales + h * L + (in_chunk[:, None] * out.stride_dscales + columns)
    inside = valid[:, None] & (columns < tl.minimum(L, S.LOG_C + 1))
    gradient = sums_by_level(tl.where(earlier, within * outer, 0.0), L, S) * x.factor
    gradient += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, gradient.to(out.dscales.dtype.element_ty), mask=inside)

    dwithin = (outer * mask).to(dtype)
    solve_grads = tl.dot(tl.trans(products_low), dwithin, input_precision=S.PRECISION)
    tl.store(plane(scores, site, SOLVE_GRADS, S), solve_grads.to(dtype))
    query_grad = query_grads + site * (S.C * S.K)
    erased = product(query_grad, maps.writes + kept * (S.C * (S.K + S.V)), S.K, S.K + S.V, in_chunk >= 0, S.K, S.BK, S)
    dproducts = tl.dot(dwithin, tl.trans(solved), input_precision=S.PRECISION) - erased
    tl.store(plane(scores, site, PRODUCT_GRADS, S), (dproducts * decays).to(dtype))
    if x.g is not None:
        shares = tl.where(in_chunk[:, None] == in_chunk[None, :], 0.0, dproducts * products)
        gain = tl.sum(shares, axis=1) - tl.sum(shares, axis=0)
        gain += query_gain(q_head, x.stride_q, query_grad, valid, S.BK, S) * tl.exp2(high)
        tl.store(gains + h.to(tl.int64) * all_tokens + origin + in_chunk, gain, mask=valid)
