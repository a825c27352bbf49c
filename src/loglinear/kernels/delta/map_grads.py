"""MAP GRADIENTS: gradients of the keys, the values and the triangular inverse of a chunk from the gradient of its map.

The chunk takes a map Y before it to ``γ_C Y + K_endᵀ D`` with ``D = [0 | U] - W Y``, and X is the gradient of this
result. Two thin products, ``K_end X`` and D, then give everything. ``K_end X`` is the gradient of D: its columns of S
are the gradient of U, and its product with Y is the gradient of -W. ``D Xᵀ`` is the gradient of K_end. Each X is read a
block of columns at a time, beside the same block of Y. The gradient ``X Yᵀ`` of the chunk's transition, a matrix
``[K, K]``, is never formed. Only the columns of S are read a second time, for U: there the gradients of all maps that
the chunk closes are added up first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.delta.group_grads import SPARE, prefix_row
from loglinear.kernels.delta.group_maps import decay_to_end, identity_columns, load_square, prefix_slot
from loglinear.kernels.delta.products import memory_times, times_tokens, tokens_times
from loglinear.kernels.delta.score_grads import MASKED, PLANES, PRODUCTS, SOLVE_GRADS, square
from loglinear.kernels.delta.tiles import load_part, load_part_if, store_part
from loglinear.kernels.delta.unit_grads import state_grads
from loglinear.kernels.tree.place import GROUP, locate
from loglinear.kernels.tree.tiles import load_tile, store_tile


@triton.jit
def inner_product(left, right, BN: tl.constexpr, PRECISION: tl.constexpr):
    """``<X, Y>`` of two tiles with BN columns: on tensor cores, so that the tiles do not pass through registers."""
    if PRECISION == "ieee":
        product = tl.sum(left * right)
    else:
        pairs = tl.dot(tl.trans(left), right, input_precision=PRECISION)
        is_diagonal = tl.arange(0, BN)[:, None] == tl.arange(0, BN)[None, :]
        product = tl.sum(tl.where(is_diagonal, pairs, 0.0))
    return product


@triton.jit
def after_maps(prefixes, entries, grads, c, group, row, x_row, h, k_tile, erased, k_head, stride_k, valid, written,
               H: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
               BN: tl.constexpr, HAS_GATE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``(W Y Xᵀ, K X Yᵀ, <X, Y>)`` of the prefix before unit c and, for unit 5, of unit 4 before it; zero for unit 0."""
    own = grads + (row.to(tl.int64) * H + h) * (K * WIDTH)
    x = grads + (x_row.to(tl.int64) * H + h) * (K * WIDTH)
    prefix = prefixes + (prefix_slot(c, group).to(tl.int64) * HEADS + h) * (K * WIDTH)
    # The prefix before units 1, 2 and 4 is an entry, as is the pair's first unit before unit 5.
    entry = entries + ((row - 1).to(tl.int64) * HEADS + h) * (K * WIDTH)
    other = tl.where(c == 5, own, x)
    acc = tl.zeros([C, BK], tl.float32)
    dw = tl.zeros([C, BK], tl.float32)
    trace = 0.0
    BLOCKS: tl.constexpr = (WIDTH + BN - 1) // BN
    after_entry = (0b110110 >> c) & 1
    after_prefix = (0b11101000 >> c) & 1
    for i in range(BLOCKS * (1 - after_entry), BLOCKS * (1 + after_prefix)):
        is_other = i < BLOCKS
        first = tl.where(is_other, i, i - BLOCKS) * BN
        left = load_part(tl.where(is_other, other, x), 0, first, WIDTH, K, WIDTH, BK, BN)
        right = load_part(tl.where(is_other, entry, prefix), 0, first, WIDTH, K, WIDTH, BK, BN)
        if HAS_GATE:
            trace += inner_product(left, right, BN, PRECISION)
        if PRECISION == "ieee":
            passed = tokens_times(k_head, stride_k, valid, left, C, K, BK, BN, PRECISION)
        else:
            passed = tl.dot(k_tile, left, input_precision=PRECISION)
        dw = tl.dot(passed.to(left.dtype), tl.trans(right), dw, input_precision=PRECISION)
        if PRECISION == "ieee":
            change = memory_times(written, right, WIDTH, C, K, C, BK, BN, PRECISION)
        else:
            change = tl.dot(erased, right, input_precision=PRECISION)
        acc = tl.dot(change.to(left.dtype), tl.trans(left), acc, input_precision=PRECISION)
    return acc, dw, trace


@triton.jit
def after_identity(acc, dw, trace, grads, c, row, h, k_tile, erased, k_head, stride_k, valid, written, H: tl.constexpr,
                   K: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
                   HAS_GATE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add the same of ``Y = [I | 0]``, where unit c is the first of the prefix or of a pair."""
    x = grads + (row.to(tl.int64) * H + h) * (K * WIDTH)
    if HAS_GATE:
        diagonal = tl.arange(0, BK)
        inside = diagonal < tl.where(c % 2 == 0, K, 0)
        trace += tl.sum(tl.load(x + diagonal * (WIDTH + 1), mask=inside, other=0.0).to(tl.float32))
    if PRECISION == "ieee" or BK > 128:  # no room for the whole of A
        for first in range(0, K, BN):
            left = load_part_if(c % 2 == 0, x, 0, first, K, K, WIDTH, BK, BN)
            identity = identity_columns(first, BK, BN).to(left.dtype)
            passed = tokens_times(k_head, stride_k, valid, left, C, K, BK, BN, PRECISION).to(left.dtype)
            part = load_part(written, 0, first, K, C, WIDTH, C, BN)
            dw = tl.dot(passed, tl.trans(identity), dw, input_precision=PRECISION)
            acc = tl.dot(part, tl.trans(left), acc, input_precision=PRECISION)
    elif c % 2 == 0:
        left = load_part(x, 0, 0, K, K, WIDTH, BK, BK)
        dw = tl.dot(k_tile, left, dw, input_precision=PRECISION)
        acc = tl.dot(erased, tl.trans(left), acc, input_precision=PRECISION)
    return acc, dw, trace


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
    chunk_gains,  # [rows, H] the share of the chunk's decay in dG
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
    k_head = k + origin * stride_k + h // (H // G) * K
    k_tile = load_tile(k_head, stride_k, valid, C, K, BK, 0)
    head_sums = sums + h.to(tl.int64) * sums_stride + origin
    written = writes + kept * (C * WIDTH)
    c = n % GROUP
    group = group0 + n // GROUP
    x_row = prefix_row(c, row, spare + group * SPARE)
    erased = load_square(written, WIDTH, C, K, C, BK)
    acc, dw, trace = after_maps(prefixes, entries, grads, c, group, row, x_row, h, k_tile, erased, k_head, stride_k, valid,
                                written, H, HEADS, K, WIDTH, C, BK, BN, HAS_GATE, PRECISION)  # fmt: skip
    acc, dw, trace = after_identity(acc, dw, trace, grads, c, row, h, k_tile, erased, k_head, stride_k, valid, written, H, K,
                                    WIDTH, C, BK, BN, HAS_GATE, PRECISION)  # fmt: skip
    if HAS_GATE:
        tl.store(chunk_gains + unit, trace * tl.exp2(tl.load(chunk_log + kept)))
    to_end = decay_to_end(head_sums, tl.minimum(length - n * C, C), all_tokens, C, EXACT)
    acc = -acc
    planes = scores + unit * (PLANES * C * C)
    targets = key_grads + unit * (2 * C * K)
    products = tl.load(square(planes + PRODUCTS * C * C, C))
    queries = load_part(query_grads + unit * (C * K), 0, 0, K, C, K, C, BK)
    dw = tl.dot(tl.trans(products), queries, dw * to_end[:, None], input_precision=PRECISION)
    dw_low = (-dw).to(dtype)
    store_part(targets, dw_low, 0, 0, K, C, K, C, BK)
    from_start = tl.exp2(tl.load(head_sums + in_chunk, mask=valid, other=0.0))
    if PRECISION == "ieee":
        solve_grads = times_tokens(dw_low, k_head, stride_k, valid, C, K, BK, PRECISION)
    else:
        solve_grads = tl.dot(dw_low, tl.trans(k_tile), input_precision=PRECISION)
    solve_grads *= from_start[None, :]

    masked = tl.load(square(planes + MASKED * C * C, C))
    solved = tl.load(square(solve + kept * (C * C), C))
    # Not pipelined: the buffers would leave room for one program on a multiprocessor and not two.
    for first in tl.range(0, V, BV, num_stages=1):
        values = load_tile(v + origin * stride_v + h * V, stride_v, valid, C, V, BV, first)
        outputs = load_tile(do + origin * stride_do + h * V, stride_do, valid, C, V, BV, first)
        added = load_part(written + K, 0, first, V, C, WIDTH, C, BV)
        ds = state_grads(grads, c, row, x_row, h, 0, first, H, K, V, BK, BV).to(dtype)
        if PRECISION == "ieee":
            du = tokens_times(k_head, stride_k, valid, ds, C, K, BK, BV, PRECISION)
        else:
            du = tl.dot(k_tile, ds, input_precision=PRECISION)
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
        keys = load_tile(k_head, stride_k, valid, C, K, BK, 0)  # loaded again: registers need not hold them until here
        ends = tl.sum(acc * keys.to(tl.float32), axis=1)
        tl.store(end_gains + h.to(tl.int64) * all_tokens + origin + in_chunk, ends, mask=valid)
