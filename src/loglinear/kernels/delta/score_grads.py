"""SCORE GRADIENTS: gradients of the scores inside a chunk, ``R = P T`` with ``P = tril(Q Kᵀ ∘ Γ)``, and of P and T.

One pass computes the four ``[C, C]`` matrices that the other kernels of a chunk multiply by, and dλ of the levels
inside the chunk. The gate's gradient leaves the diagonal out: it would cancel there and leave its rounding error
behind.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.decays import load_sum, pair_decays
from loglinear.kernels.tree.levels import LOG_SUB, SUB, assemble_mask, local_levels, local_scales
from loglinear.kernels.tree.place import locate
from loglinear.kernels.tree.tiles import load_tile

# Planes of ``scores``. The last is P's share Pᵀ dR of dT, until map_grads adds the others.
PRODUCTS = tl.constexpr(0)  # P
MASKED = tl.constexpr(1)  # Λ ∘ R
PRODUCT_GRADS = tl.constexpr(2)  # dP ∘ Γ
SOLVE_GRADS = tl.constexpr(3)  # dT
PLANES = tl.constexpr(4)


@triton.jit
def square(base, C: tl.constexpr):
    """Pointers to a contiguous matrix ``[C, C]``."""
    return base + tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]


@triton.jit
def sums_by_level(pairs, L, C: tl.constexpr, LEVELS: tl.constexpr, LOG_C: tl.constexpr):
    """Row sums ``[C, LEVELS]`` of ``pairs [C, C]`` over the columns of each level, the last shared. Zero above the diagonal."""
    own, other = local_levels(C)
    is_own = (tl.arange(0, C) // SUB)[:, None] == tl.arange(0, C // SUB)[None, :]
    blocks = tl.reshape(pairs, [C, C // SUB, SUB])
    near = tl.sum(tl.where(is_own[:, :, None], blocks, 0.0), axis=1)
    far = tl.sum(blocks, axis=2)
    columns = tl.arange(0, LEVELS)[None, :]
    total = tl.zeros([C, LEVELS], tl.float32)
    for level in tl.static_range(0, LOG_C + 1):
        if level <= LOG_SUB:
            row = tl.sum(tl.where(own == level, near, 0.0), axis=1)
        else:
            row = tl.sum(tl.where(other == level, far, 0.0), axis=1)
        total += tl.where(columns == tl.minimum(level, L - 1), row[:, None], 0.0)
    return total


@triton.jit
def product(left, right, stride_l, stride_r, valid, C: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """``X Yᵀ`` ``[C, C]`` of two matrices ``[C, WIDTH]``, in tiles."""
    total = tl.zeros([C, C], tl.float32)
    for first in range(0, WIDTH, TILE):
        x = load_tile(left, stride_l, valid, C, WIDTH, TILE, first)
        y = load_tile(right, stride_r, valid, C, WIDTH, TILE, first)
        total = tl.dot(x, tl.trans(y), total, input_precision=PRECISION)
    return total


@triton.jit
def query_gain(q_head, stride_q, query_grads, valid, C: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr):
    """``q · dQ̃`` ``[C]``."""
    gain = tl.zeros([C], tl.float32)
    for first in range(0, K, TILE):
        q_tile = load_tile(q_head, stride_q, valid, C, K, TILE, first).to(tl.float32)
        gain += tl.sum(q_tile * load_tile(query_grads, K, valid, C, K, TILE, first).to(tl.float32), axis=1)
    return gain


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "L"])
def score_grads_kernel(
    q,
    k,
    v,
    do,
    level_scales,
    sums,
    solve,
    writes,
    query_grads,
    scores,  # [rows, H, PLANES, C, C]
    dlevel_scales,
    gains,  # [H, B*T] the share of a row's queries in dG
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
    stride_s,
    stride_ds,
    factor,
    L,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LOG_C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: H x rows, rows fastest. float32: products, decays, scores and their gradients until they are stored."""
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
    kept = row.to(tl.int64) * HEADS + h
    dtype = scores.dtype.element_ty
    q_head = q + origin * stride_q + h // (H // G) * K
    k_head = k + origin * stride_k + h // (H // G) * K
    planes = scores + unit * (PLANES * C * C)
    earlier = in_chunk[:, None] >= in_chunk[None, :]

    outer = product(do + origin * stride_do + h * V, v + origin * stride_v + h * V, stride_do, stride_v, valid, C, V, BV,
                    PRECISION)  # fmt: skip
    high, low = load_sum(sums + h.to(tl.int64) * sums_stride + origin, in_chunk, valid, all_tokens, EXACT)
    decays = tl.where(earlier, pair_decays(high, low, EXACT), 0.0)
    products = product(q_head, k_head, stride_q, stride_k, valid, C, K, BK, PRECISION) * decays
    products_low = products.to(dtype)
    tl.store(square(planes + PRODUCTS * C * C, C), products_low)
    solved = tl.load(square(solve + kept * (C * C), C))
    within = tl.dot(products_low, solved, input_precision=PRECISION)
    scales = level_scales + origin * stride_s + h * L
    near, far = local_scales(scales, valid, stride_s, factor, L, C)
    mask = tl.reshape(assemble_mask(near, far, tl.full([C // SUB, SUB], 1.0, tl.float32), C), [C, C])
    tl.store(square(planes + MASKED * C * C, C), (within * mask).to(dtype))
    columns = tl.arange(0, LEVELS)[None, :]
    place = dlevel_scales + origin * stride_ds + h * L + (in_chunk[:, None] * stride_ds + columns)
    inside = valid[:, None] & (columns < tl.minimum(L, LOG_C + 1))
    gradient = sums_by_level(tl.where(earlier, within * outer, 0.0), L, C, LEVELS, LOG_C) * factor
    gradient += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, gradient.to(dlevel_scales.dtype.element_ty), mask=inside)

    dwithin = (outer * mask).to(dtype)
    solve_grads = tl.dot(tl.trans(products_low), dwithin, input_precision=PRECISION)
    tl.store(square(planes + SOLVE_GRADS * C * C, C), solve_grads.to(dtype))
    query_head = query_grads + unit * (C * K)
    erased = product(query_head, writes + kept * (C * (K + V)), K, K + V, in_chunk >= 0, C, K, BK, PRECISION)
    dproducts = tl.dot(dwithin, tl.trans(solved), input_precision=PRECISION) - erased
    tl.store(square(planes + PRODUCT_GRADS * C * C, C), (dproducts * decays).to(dtype))
    if HAS_GATE:
        pairs = tl.where(in_chunk[:, None] == in_chunk[None, :], 0.0, dproducts * products)
        gain = tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0)
        gain += query_gain(q_head, stride_q, query_head, valid, C, K, BK) * tl.exp2(high)
        tl.store(gains + h.to(tl.int64) * all_tokens + origin + in_chunk, gain, mask=valid)
