"""MAP GRADIENTS: what the keys, the values and the triangular inverse of a chunk get from the gradient of its map.

With ``A = γ_C I - K_endᵀ W`` and ``S = K_endᵀ U`` the two halves ``[dA | dS]`` are read alike, a block of columns at a time:
``K_end [-dA | dS]`` is the gradient of ``[W | U]``, and ``[-W | U] [dA | dS]ᵀ`` that of K_end. Neither dA nor dS is stored: a
block is made where it is used, as in unit_grads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.common import GROUP, load_tile, locate, store_tile
from loglinear.kernels.delta_rule.group_grads import SPARE, prefix_row
from loglinear.kernels.delta_rule.group_maps import decay_to_end
from loglinear.kernels.delta_rule.products import tokens_times
from loglinear.kernels.delta_rule.score_grads import MASKED, PLANES, PRODUCTS, SOLVE_GRADS, square
from loglinear.kernels.delta_rule.tiles import load_part, store_part
from loglinear.kernels.delta_rule.unit_grads import state_grads, transition_grads


@triton.jit
def keys_times(k_tile, k_head, stride_k, valid, right, C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
               BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``K right`` ``[C, BN]``, from the keys at hand or, in float32, from memory."""
    if PRECISION == "ieee":
        total = tokens_times(k_head, stride_k, valid, right, C, K, BK, BN, PRECISION)
    else:
        total = tl.dot(k_tile, right, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "spare"])
def map_grads_kernel(
    k,
    v,
    do,
    sums,
    chunk_log,
    solve,
    writes,
    prefixes,  # [4 groups, H, K, K+V]
    entries,
    grads,  # [rows + spare rows, H, K, K+V], as group_grads leaves them
    query_grads,
    scores,
    key_grads,  # [rows, H, 2, C, K]: the gradients of W and of K through K_end
    dv,
    end_gains,  # [H, B*T] K_end · dK_end
    chunk_gains,  # [rows, H] what the chunk's decay adds to dG
    row_sequence,
    sequences,
    T,
    N,
    NG,
    all_tokens,
    sums_stride,
    stride_k,
    stride_v,
    stride_do,
    stride_dv,
    spare,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BW: tl.constexpr,
    HAS_GATE: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: H x rows, rows fastest. float32: accumulators, decays."""
    WIDTH: tl.constexpr = K + V
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
    k_head = k + origin * stride_k + h // (H // G) * K
    k_tile = load_tile(k_head, stride_k, valid, C, K, BK, 0)
    head_sums = sums + h.to(tl.int64) * sums_stride + origin
    to_end = decay_to_end(head_sums, tl.minimum(length - n * C, C), all_tokens, C, EXACT)
    from_start = tl.exp2(tl.load(head_sums + in_chunk, mask=valid, other=0.0))
    written = writes + kept * (C * WIDTH)
    targets = key_grads + unit * (2 * C * K)
    acc = tl.zeros([C, BK], tl.float32)
    solve_grads = tl.zeros([C, C], tl.float32)

    products = tl.load(square(planes + PRODUCTS * C * C, C))
    c = n % GROUP
    group = group0 + n // GROUP
    x_row = prefix_row(c, row, spare + group * SPARE)
    trace = tl.zeros([BK], tl.float32)
    for first in range(0, K, BN):
        # What is multiplied last is loaded first, and arrives in the meantime.
        queries = load_part(query_grads + unit * (C * K), 0, first, K, C, K, C, BN)
        erased = load_part(written, 0, first, K, C, WIDTH, C, BN)
        keys = k_tile if BN == BK else load_tile(k_head, stride_k, valid, C, K, BN, first)
        transition = transition_grads(prefixes, entries, grads, c, group, row, x_row, h, 0, first, H, HEADS, K, WIDTH, 1, BK,
                                      BN, BW, PRECISION)  # fmt: skip
        if HAS_GATE:
            is_diagonal = tl.arange(0, BK)[:, None] == (first + tl.arange(0, BN))[None, :]
            trace += tl.sum(tl.where(is_diagonal, transition, 0.0), axis=1)
        da = transition.to(dtype)
        dw = keys_times(k_tile, k_head, stride_k, valid, da, C, K, BK, BN, PRECISION) * to_end[:, None]
        dw = tl.dot(tl.trans(products), queries, dw, input_precision=PRECISION)
        dw_low = (-dw).to(dtype)
        store_part(targets, dw_low, 0, first, K, C, K, C, BN)
        solve_grads = tl.dot(dw_low, tl.trans(keys), solve_grads, input_precision=PRECISION)
        acc = tl.dot(erased, tl.trans(da), acc, input_precision=PRECISION)
    acc = -acc
    solve_grads *= from_start[None, :]

    masked = tl.load(square(planes + MASKED * C * C, C))
    solved = tl.load(square(solve + kept * (C * C), C))
    # Not pipelined: its buffers would leave room for one program on a multiprocessor and not two.
    for first in tl.range(0, V, BV, num_stages=1):
        values = load_tile(v + origin * stride_v + h * V, stride_v, valid, C, V, BV, first)
        outputs = load_tile(do + origin * stride_do + h * V, stride_do, valid, C, V, BV, first)
        added = load_part(written + K, 0, first, V, C, WIDTH, C, BV)
        ds = state_grads(grads, c, row, x_row, h, 0, first, H, K, V, BK, BV).to(dtype)
        du = keys_times(k_tile, k_head, stride_k, valid, ds, C, K, BK, BV, PRECISION)
        du = (du * to_end[:, None]).to(dtype)
        solve_grads = tl.dot(du, tl.trans(values), solve_grads, input_precision=PRECISION)
        dvalues = tl.dot(tl.trans(masked), outputs, input_precision=PRECISION)
        dvalues = tl.dot(tl.trans(solved), du, dvalues, input_precision=PRECISION)
        store_tile(dv + origin * stride_dv + h * V, stride_dv, valid, dvalues, C, V, BV, first)
        acc = tl.dot(added, tl.trans(ds), acc, input_precision=PRECISION)

    target = square(planes + SOLVE_GRADS * C * C, C)
    tl.store(target, (solve_grads + tl.load(target).to(tl.float32)).to(dtype))
    acc = acc * to_end[:, None]
    store_part(targets + C * K, acc, 0, 0, K, C, K, C, BK)
    if HAS_GATE:
        keys = load_tile(k_head, stride_k, valid, C, K, BK, 0)  # again, that registers need not hold them till here
        ends = tl.sum(acc * keys.to(tl.float32), axis=1)
        tl.store(end_gains + h.to(tl.int64) * all_tokens + origin + in_chunk, ends, mask=valid)
        tl.store(chunk_gains + unit, tl.sum(trace, axis=0) * tl.exp2(tl.load(chunk_log + kept)))
