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
def after_maps(
    prefixes,
    entries,
    grads,
    c,
    group,
    row,
    x_row,
    h,
    k_tile,
    erased,
    k_head,
    stride_k,
    valid,
    written,
    WIDTH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    S: tl.constexpr,
):
    """``(W Y Xᵀ, K X Yᵀ, <X, Y>)`` of the prefix before unit c and, for unit 5, of unit 4 before it; zero for unit 0."""
    own = grads + (row.to(tl.int64) * S.H + h) * (S.K * WIDTH)
    x = grads + (x_row.to(tl.int64) * S.H + h) * (S.K * WIDTH)
    prefix = prefixes + (prefix_slot(c, group).to(tl.int64) * S.HEADS + h) * (S.K * WIDTH)
    # The prefix before units 1, 2 and 4 is an entry, as is the pair's first unit before unit 5.
    entry = entries + ((row - 1).to(tl.int64) * S.HEADS + h) * (S.K * WIDTH)
    other = tl.where(c == 5, own, x)
    acc = tl.zeros([S.C, S.BK], tl.float32)
    dw = tl.zeros([S.C, S.BK], tl.float32)
    trace = 0.0
    BLOCKS: tl.constexpr = (WIDTH + S.BN - 1) // S.BN
    after_entry = (0b110110 >> c) & 1
    after_prefix = (0b11101000 >> c) & 1
    for i in range(BLOCKS * (1 - after_entry), BLOCKS * (1 + after_prefix)):
        is_other = i < BLOCKS
        first = tl.where(is_other, i, i - BLOCKS) * S.BN
        left = load_part(tl.where(is_other, other, x), 0, first, WIDTH, S.K, WIDTH, S.BK, S.BN)
        right = load_part(tl.where(is_other, entry, prefix), 0, first, WIDTH, S.K, WIDTH, S.BK, S.BN)
        if HAS_GATE:
            trace += inner_product(left, right, S)
        if S.PRECISION == "ieee":
            passed = tokens_times(k_head, stride_k, valid, left, S.BN, S)
        else:
            passed = tl.dot(k_tile, left, input_precision=S.PRECISION)
        dw = tl.dot(passed.to(left.dtype), tl.trans(right), dw, input_precision=S.PRECISION)
        if S.PRECISION == "ieee":
            change = memory_times(written, right, WIDTH, S.C, S.C, S)
        else:
            change = tl.dot(erased, right, input_precision=S.PRECISION)
        acc = tl.dot(change.to(left.dtype), tl.trans(left), acc, input_precision=S.PRECISION)
    return acc, dw, trace


@triton.jit
def after_identity(
    acc,
    dw,
    trace,
    grads,
    c,
    row,
    h,
    k_tile,
    erased,
    k_head,
    stride_k,
    valid,
    written,
    WIDTH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    S: tl.constexpr,
):
    """Add the same of ``Y = [I | 0]``, where unit c is the first of the prefix or of a pair."""
    x = grads + (row.to(tl.int64) * S.H + h) * (S.K * WIDTH)
    if HAS_GATE:
        diagonal = tl.arange(0, S.BK)
        inside = diagonal < tl.where(c % 2 == 0, S.K, 0)
        trace += tl.sum(tl.load(x + diagonal * (WIDTH + 1), mask=inside, other=0.0).to(tl.float32))
    if S.PRECISION == "ieee" or S.BK > 128:  # no room for the whole of A
        for first in range(0, S.K, S.BN):
            left = load_part_if(c % 2 == 0, x, 0, first, S.K, S.K, WIDTH, S.BK, S.BN)
            identity = identity_columns(first, S).to(left.dtype)
            passed = tokens_times(k_head, stride_k, valid, left, S.BN, S).to(left.dtype)
            part = load_part(written, 0, first, S.K, S.C, WIDTH, S.C, S.BN)
            dw = tl.dot(passed, tl.trans(identity), dw, input_precision=S.PRECISION)
            acc = tl.dot(part, tl.trans(left), acc, input_precision=S.PRECISION)
    elif c % 2 == 0:
        left = load_part(x, 0, 0, S.K, S.K, WIDTH, S.BK, S.BK)
        dw = tl.dot(k_tile, left, dw, input_precision=S.PRECISION)
        acc = tl.dot(erased, tl.trans(left), acc, input_precision=S.PRECISION)
    return acc, dw, trace


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "spare"])
def map_grads_kernel(
    x,
    maps,
    prefixes,  # [4 groups, H, K, K+V]
    grads,  # [rows + spare rows, H, K, K+V], as group_grads leaves them
    query_grads,
    scores,
    key_grads,  # [rows, H, 2, C, K]: the gradients of W and of K through K_end
    out,
    end_gains,  # [H, B*T] K_end · dK_end
    chunk_gains,  # [rows, H] the share of the chunk's decay in dG
    table,
    T,
    N,
    NG,
    all_tokens,
    sums_stride,
    spare,
    S: tl.constexpr,
):
    """Grid: H x rows, rows fastest. float32: accumulators, decays."""
    WIDTH: tl.constexpr = S.K + S.V
    rows = tl.num_programs(0) // S.H
    pid = tl.program_id(0)
    row = pid % rows
    h = pid // rows
    start, length, row0, group0, _, _ = locate(row, table, T, N, NG, N, S.PACKED)
    if length < 0:
        return
    n = row - row0
    in_chunk = tl.arange(0, S.C)
    valid = in_chunk < length - n * S.C
    origin = (start + n * S.C).to(tl.int64)
    unit = row.to(tl.int64) * S.H + h
    kept = row.to(tl.int64) * S.HEADS + h
    dtype = scores.dtype.element_ty
    k_head = x.k + origin * x.stride_k + h // (S.H // S.G) * S.K
    k_tile = load_tile(k_head, x.stride_k, valid, S.C, S.K, S.BK, 0)
    head_sums = maps.sums + h.to(tl.int64) * sums_stride + origin
    written = maps.writes + kept * (S.C * WIDTH)
    c = n % GROUP
    group = group0 + n // GROUP
    x_row = prefix_row(c, row, spare + group * SPARE)
    erased = load_square(written, WIDTH, S.C, S.C, S)
    acc, dw, trace = after_maps(
        prefixes,
        maps.entries,
        grads,
        c,
        group,
        row,
        x_row,
        h,
        k_tile,
        erased,
        k_head,
        x.stride_k,
        valid,
        written,
        WIDTH,
        x.g is not None,
        S,
    )
    acc, dw, trace = after_identity(
        acc, dw, trace, grads, c, row, h, k_tile, erased, k_head, x.stride_k, valid, written, WIDTH, x.g is not None, S
    )
    if x.g is not None:
        tl.store(chunk_gains + unit, trace * tl.exp2(tl.load(maps.chunk_log + kept)))
    to_end = decay_to_end(head_sums, tl.minimum(length - n * S.C, S.C), all_tokens, S)
    acc = -acc
    planes = scores + unit * (PLANES * S.C * S.C)
    targets = key_grads + unit * (2 * S.C * S.K)
    products = tl.load(square(planes + PRODUCTS * S.C * S.C, S.C))
    queries = load_part(query_grads + unit * (S.C * S.K), 0, 0, S.K, S.C, S.K, S.C, S.BK)
    dw = tl.dot(tl.trans(products), queries, dw * to_end[:, None], input_precision=S.PRECISION)
    dw_low = (-dw).to(dtype)
    store_part(targets, dw_low, 0, 0, S.K, S.C, S.K, S.C, S.BK)
    from_start = tl.exp2(tl.load(head_sums + in_chunk, mask=valid, other=0.0))
    if S.PRECISION == "ieee":
        solve_grads = times_tokens(dw_low, k_head, x.stride_k, valid, S)
    else:
        solve_grads = tl.dot(dw_low, tl.trans(k_tile), input_precision=S.PRECISION)
    solve_grads *= from_start[None, :]

    masked = tl.load(square(planes + MASKED * S.C * S.C, S.C))
    solved = tl.load(square(maps.solve + kept * (S.C * S.C), S.C))
    # Not pipelined: the buffers would leave room for one program on a multiprocessor and not two.
    for first in tl.range(0, S.V, S.BV, num_stages=1):
        values = load_tile(x.v + origin * x.stride_v + h * S.V, x.stride_v, valid, S.C, S.V, S.BV, first)
        outputs = load_tile(x.do + origin * x.stride_do + h * S.V, x.stride_do, valid, S.C, S.V, S.BV, first)
        added = load_part(written + S.K, 0, first, S.V, S.C, WIDTH, S.C, S.BV)
        ds = state_grads(grads, c, row, x_row, h, 0, first, S.BV, S).to(dtype)
        if S.PRECISION == "ieee":
            du = tokens_times(k_head, x.stride_k, valid, ds, S.BV, S)
        else:
            du = tl.dot(k_tile, ds, input_precision=S.PRECISION)
        du = (du * to_end[:, None]).to(dtype)
        solve_grads = tl.dot(du, tl.trans(values), solve_grads, input_precision=S.PRECISION)
        dvalues = tl.dot(tl.trans(masked), outputs, input_precision=S.PRECISION)
        dvalues = tl.dot(tl.trans(solved), du, dvalues, input_precision=S.PRECISION)
        store_tile(out.dv + origin * out.stride_dv + h * S.V, out.stride_dv, valid, dvalues, S.C, S.V, S.BV, first)
        acc = tl.dot(added, tl.trans(ds), acc, input_precision=S.PRECISION)

    target = square(planes + SOLVE_GRADS * S.C * S.C, S.C)
    tl.store(target, (solve_grads + tl.load(target).to(tl.float32)).to(dtype))
    acc = acc * to_end[:, None]
    store_part(targets + S.C * S.K, acc, 0, 0, S.K, S.C, S.K, S.C, S.BK)
    if x.g is not None:
        keys = load_tile(
            k_head, x.stride_k, valid, S.C, S.K, S.BK, 0
        )  # loaded again: registers need not hold them until here
        ends = tl.sum(acc * keys.to(tl.float32), axis=1)
        tl.store(end_gains + h.to(tl.int64) * all_tokens + origin + in_chunk, ends, mask=valid)
