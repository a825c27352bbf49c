"""MAP GRADIENTS: gradients of the keys, the values and the triangular inverse of a chunk from the gradient of its map.

The chunk takes a map Y before it to ``γ_C Y + K_endᵀ D`` with ``D = [0 | U] - W Y``, and X is the gradient of this
result. Two thin products, ``K_end X`` and D, then give everything. ``K_end X`` is the gradient of D: its columns of S
are the gradient of U, and its product with Y is the gradient of -W. ``D Xᵀ`` is the gradient of K_end. Each X is read a
block of columns at a time, beside the same block of Y. The gradient ``X Yᵀ`` of the chunk's transition, a matrix
``[K, K]``, is never formed. Only the columns of S are read a second time, for U: there the gradients of all maps that
the chunk closes are added up first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from loglinear.kernels.channel.decays import load_log, store_log
from loglinear.kernels.delta.octet_maps import identity
from loglinear.kernels.delta.products import load_erased, memory_times, times_tokens, tokens_times
from loglinear.kernels.delta.score_grads import MASKED, PRODUCTS, SOLVE_GRADS, plane
from loglinear.kernels.delta.unit_grads import block_before, blocks_before, map_before, state_grads, unit_of
from loglinear.kernels.tree.decays import to_end
from loglinear.kernels.tree.place import OCTET, chunk_of, row_of_program
from loglinear.kernels.tree.tiles import (
    key_head,
    load_block,
    load_part,
    load_tile,
    load_tokens,
    square,
    store_part,
    store_tile,
)


class Thin(NamedTuple):
    """The two thin matrices of a chunk, K and W, in registers for tensor cores and in memory for IEEE products."""

    k_tile: Any
    erased: Any
    keys: Any
    stride: Any
    valid: Any
    written: Any


@triton.jit
def keys_times(thin, right, BN: tl.constexpr, S: tl.constexpr):
    """``K X`` ``[C, BN]`` of ``right [BK, BN]``, float32."""
    if S.PRECISION == "ieee":
        product = tokens_times(thin.keys, thin.stride, thin.valid, right, BN, S)
    else:
        product = tl.dot(thin.k_tile, right, input_precision=S.PRECISION)
    return product


@triton.jit
def erased_times(thin, right, S: tl.constexpr):
    """``W Y`` ``[C, BN]`` of ``right [BK, BN]``, float32."""
    if S.PRECISION == "ieee":
        product = memory_times(thin.written, right, S.K + S.V, S.C, S.C, S)
    else:
        product = tl.dot(thin.erased, right, input_precision=S.PRECISION)
    return product


@triton.jit
def row_products(u, i, blocks, S: tl.constexpr):
    """``<X, Y>`` of each row ``[BK]`` of block i, of BN columns, from loads of its own.

    A tile that a product reads must not pass through registers too. Triton 3.6 then pipelines it in one buffer, and the copy
    of the next tile overtakes the product. Loads that differ in their eviction policy are not made one.
    """
    left, right, first = map_before(u, i, blocks, S.BN)
    row, column = tl.arange(0, S.BK)[:, None], first + tl.arange(0, S.BN)[None, :]
    places, inside = row * (S.K + S.V) + column, (row < S.K) & (column < S.K + S.V)
    x = tl.load(left + places, mask=inside, other=0.0, eviction_policy="evict_last")
    y = tl.load(right + places, mask=inside, other=0.0, eviction_policy="evict_last")
    return tl.sum(x.to(tl.float32) * y.to(tl.float32), axis=1)


@triton.jit
def inner_product(left, right, S: tl.constexpr):
    """``<X, Y>`` of two tiles with BN columns: on tensor cores, so that the tiles do not pass through registers."""
    if S.PRECISION == "ieee":
        product = tl.sum(left * right)
    else:
        pairs = tl.dot(tl.trans(left), right, input_precision=S.PRECISION)
        is_diagonal = tl.arange(0, S.BN)[:, None] == tl.arange(0, S.BN)[None, :]
        product = tl.sum(tl.where(is_diagonal, pairs, 0.0))
    return product


@triton.jit
def after_maps(u, thin, GATED: tl.constexpr, S: tl.constexpr):
    """``(W Y Xᵀ, K X Yᵀ, <X, Y>)`` of the prefix before unit c and, for unit 5, of unit 4 before it; zero for unit 0."""
    acc = tl.zeros([S.C, S.BK], tl.float32)
    dw = tl.zeros([S.C, S.BK], tl.float32)
    if S.CHANNELS:
        trace = tl.zeros([S.BK], tl.float32)
    else:
        trace = 0.0
    BLOCKS: tl.constexpr = (S.K + S.V + S.BN - 1) // S.BN
    begin, end = blocks_before(u, BLOCKS)
    for i in range(begin, end):
        left, right = block_before(u, i, BLOCKS, 0, 0, S.BK, S.BN, S)
        if S.CHANNELS:
            trace += row_products(u, i, BLOCKS, S)
        elif GATED:
            trace += inner_product(left, right, S)
        passed = keys_times(thin, left, S.BN, S)
        dw = tl.dot(passed.to(left.dtype), tl.trans(right), dw, input_precision=S.PRECISION)
        change = erased_times(thin, right, S)
        acc = tl.dot(change.to(left.dtype), tl.trans(left), acc, input_precision=S.PRECISION)
    return acc, dw, trace


@triton.jit
def after_identity(acc, dw, trace, u, thin, GATED: tl.constexpr, S: tl.constexpr):
    """Add the same of ``Y = [I | 0]``, where unit c is the first of the prefix or of a pair."""
    WIDTH: tl.constexpr = S.K + S.V
    end = tl.where(u.c % 2 == 0, S.K, 0)
    if GATED:
        diagonal = tl.arange(0, S.BK)
        own = tl.load(u.own + diagonal * (WIDTH + 1), mask=diagonal < end, other=0.0).to(tl.float32)
        trace += own if S.CHANNELS else tl.sum(own)
    if S.PRECISION == "ieee" or S.BK > 128:  # no room for the whole of A
        for first in range(0, S.K, S.BN):
            left = load_block(u.own, WIDTH, 0, first, 0, end, S.K, S.BK, S.BN, True)
            passed = tokens_times(thin.keys, thin.stride, thin.valid, left, S.BN, S).to(left.dtype)
            part = load_part(thin.written, WIDTH, 0, first, S.C, S.K, S.C, S.BN)
            dw = tl.dot(passed, tl.trans(identity(first, S).to(left.dtype)), dw, input_precision=S.PRECISION)
            acc = tl.dot(part, tl.trans(left), acc, input_precision=S.PRECISION)
    elif u.c % 2 == 0:
        left = load_part(u.own, WIDTH, 0, 0, S.K, S.K, S.BK, S.BK)
        dw = tl.dot(thin.k_tile, left, dw, input_precision=S.PRECISION)
        acc = tl.dot(thin.erased, tl.trans(left), acc, input_precision=S.PRECISION)
    return acc, dw, trace


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "spare"])
def map_grads_kernel(
    x,
    maps,
    prefixes,  # [4 octets, H, K, K+V]
    grads,  # [chunks + spare rows, H, K, K+V], as octet_grads leaves them
    query_grads,
    scores,
    key_grads,  # [chunks, H, 2, C, K]: the gradients of W and of K through K_end
    out,
    end_gains,  # [H, B*T] K_end · dK_end
    chunk_gains,  # [chunks, H] or [chunks, H, K], the share of the chunk's decay in dG
    table,
    T,
    N,
    NG,
    all_tokens,
    sums_stride,
    spare,
    S: tl.constexpr,
):
    """Grid: H x chunks, chunks fastest. float32: accumulators, decays."""
    GATED: tl.constexpr = S.CHANNELS or x.g is not None
    at, chunk, h, _ = row_of_program(table, T, N, NG, S.H, S)
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    n, valid = here.local, here.valid
    in_chunk = tl.arange(0, S.C)
    site = chunk.to(tl.int64) * S.H + h
    kept = chunk.to(tl.int64) * S.HEADS + h
    dtype = scores.dtype.element_ty
    keys = key_head(x, here, h, S)
    k_tile = load_tile(keys, x.stride_k, valid, S.C, S.K, S.BK, 0)
    head_sums = maps.sums + h.to(tl.int64) * sums_stride + here.origin
    written = maps.writes + kept * (S.C * (S.K + S.V))
    u = unit_of(prefixes, maps.entries, grads, n % OCTET, at.octet0 + n // OCTET, chunk, 1, spare, h, S)
    thin = Thin(k_tile, load_erased(written, S), keys, x.stride_k, valid, written)
    acc, dw, trace = after_maps(u, thin, GATED, S)
    acc, dw, trace = after_identity(acc, dw, trace, u, thin, GATED, S)
    if GATED:
        if S.CHANNELS:
            store_log(chunk_gains, site, trace * tl.exp2(load_log(maps.chunk_log, kept, 0, S)), 0, S)
        else:
            tl.store(chunk_gains + site, trace * tl.exp2(tl.load(maps.chunk_log + kept)))
    decay = to_end(head_sums, here.size, all_tokens, S)
    acc = -acc
    targets = key_grads + site * (2 * S.C * S.K)
    products = tl.load(plane(scores, site, PRODUCTS, S))
    queries = load_part(query_grads + site * (S.C * S.K), S.K, 0, 0, S.C, S.K, S.C, S.BK)
    dw = tl.dot(tl.trans(products), queries, dw * decay[:, None], input_precision=S.PRECISION)
    dw_low = (-dw).to(dtype)
    store_part(targets, S.K, dw_low, 0, 0, S.C, S.K, S.C, S.BK)
    if S.CHANNELS:
        starts = maps.starts + (here.origin * S.HEADS + h) * S.K
        solve_grads = times_tokens(dw_low, starts, S.HEADS * S.K, valid, S)
    elif S.PRECISION == "ieee":
        solve_grads = times_tokens(dw_low, keys, x.stride_k, valid, S)
    else:
        solve_grads = tl.dot(dw_low, tl.trans(k_tile), input_precision=S.PRECISION)
    if not S.CHANNELS:
        solve_grads *= tl.exp2(tl.load(head_sums + in_chunk, mask=valid, other=0.0))[None, :]

    masked = tl.load(plane(scores, site, MASKED, S))
    solved = tl.load(square(maps.solve + kept * (S.C * S.C), S.C))
    # Not pipelined: the buffers would leave room for one program on a multiprocessor and not two.
    for first in tl.range(0, S.V, S.BV, num_stages=1):
        values = load_tokens(x.v, x.stride_v, h, here, S.C, S.V, S.BV, first)
        outputs = load_tokens(x.do, x.stride_do, h, here, S.C, S.V, S.BV, first)
        added = load_part(written + S.K, S.K + S.V, 0, first, S.C, S.V, S.C, S.BV)
        ds = state_grads(u, 0, first, S.BV, S).to(dtype)
        du = (keys_times(thin, ds, S.BV, S) * decay[:, None]).to(dtype)
        solve_grads = tl.dot(du, tl.trans(values), solve_grads, input_precision=S.PRECISION)
        dvalues = tl.dot(tl.trans(masked), outputs, input_precision=S.PRECISION)
        dvalues = tl.dot(tl.trans(solved), du, dvalues, input_precision=S.PRECISION)
        dv = out.dv + here.origin * out.stride_dv + h * S.V
        store_tile(dv, out.stride_dv, valid, dvalues, S.C, S.V, S.BV, first)
        acc = tl.dot(added, tl.trans(ds), acc, input_precision=S.PRECISION)

    target = plane(scores, site, SOLVE_GRADS, S)
    tl.store(target, (solve_grads + tl.load(target).to(tl.float32)).to(dtype))
    acc = acc * decay[:, None]
    store_part(targets + S.C * S.K, S.K, acc, 0, 0, S.C, S.K, S.C, S.BK)
    if x.g is not None:
        # Loaded again: registers need not hold them until here.
        k_again = load_tile(keys, x.stride_k, valid, S.C, S.K, S.BK, 0)
        ends = tl.sum(acc * k_again.to(tl.float32), axis=1)
        tl.store(end_gains + h.to(tl.int64) * all_tokens + here.origin + in_chunk, ends, mask=valid)
