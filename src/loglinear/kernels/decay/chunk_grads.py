"""CHUNK GRADIENTS: the gradient of every chunk's state, from the entries that contain it.

Gradients are pushed down the tree, so that a key reads one gradient instead of one per level: the gradient D_c at the
end of chunk c is that of its parent on the update path, decayed back, plus its own entry's. Inside a group the tree is
walked depth first with two accumulators, by the schedule below.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.decay.node_grads import chunk_gradient, chunk_weight
from loglinear.kernels.tree.place import GROUP, locate, log2_of_power, lowbit
from loglinear.kernels.tree.tiles import load_state, store_state

# Step i reads chunk CHUNKS[i] of the group at level LEVELS[i] of the tree; after it, D of chunk CHUNKS[i] - 1 is complete
# where STORES has bit i. Where RESTARTS has bit i the step begins from the base: D_7, and from step REBASE on D_3.
CHUNKS = tl.constexpr(0x123345675677)  # hexadecimal digits, step 0 is the last
LEVELS = tl.constexpr(0x011022220110)
STORES = tl.constexpr(0b110110001101)
RESTARTS = tl.constexpr(0b001000010010)
REBASE = tl.constexpr(8)
STEPS = tl.constexpr(12)


@triton.jit
def log_of_groups(group_log, unit, count, h, H: tl.constexpr):
    """Sum of the log-decays of ``count`` groups from ``unit`` on."""
    total = 0.0
    block = tl.arange(0, 64)
    for i in range((count + 63) // 64):
        index = i * 64 + block
        total += tl.sum(tl.load(group_log + (unit + index).to(tl.int64) * H + h, mask=index < count, other=0.0), axis=0)
    return total


@triton.jit
def gradient_after_group(node_grads, group_log, group, j, end, h, first_k, first_v, H: tl.constexpr, K: tl.constexpr,
                         V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """D at the end of group j: the gradients of its entries of a group or more, each decayed back from its end."""
    total = tl.zeros([BK, BV], tl.float32)
    e = j + 1
    log = 0.0
    while e < end:
        slot = (group + e - 1 - j).to(tl.int64) * H + h
        gradient = load_state(node_grads + slot * (K * V), first_k, first_v, K, V, BK, BV).to(tl.float32)
        total += gradient * tl.exp2(log)
        span = lowbit(e)
        log += log_of_groups(group_log, group + e - j, tl.minimum(span, end - e), h, H)
        e += span
    return total


@triton.jit
def store_beyond(beyond, gradient, entries, chunk_log, group_log, row, group, b, n0, h, tile, first_k, first_v,
                 H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                 TILES: tl.constexpr):  # fmt: skip
    """Share of the gate's gradient that flows from each entry whose window ends with chunk b - 1 past that end.

    ``gradient`` is D at the end of that chunk, which stands at ``row``; the entries are b - 2, b - 4, … while the step divides
    b. Their inner product with D, over the decay of the window, is the share of all their keys in queries after it.
    """
    inside = tl.arange(0, GROUP)
    span = tl.cast(2, tl.int32)
    while (span < lowbit(b)) & (b - span > n0):
        if span < GROUP:
            rows = (row - inside).to(tl.int64) * H + h
            log = tl.sum(tl.load(chunk_log + rows, mask=inside < span, other=0.0), axis=0)
        else:
            log = log_of_groups(group_log, group + 1 - span // GROUP, span // GROUP, h, H)
        unit = (row - span).to(tl.int64) * H + h
        state = load_state(entries + unit * (K * V), first_k, first_v, K, V, BK, BV).to(tl.float32)
        tl.store(beyond + unit * TILES + tile, tl.sum(tl.sum(gradient * state, axis=1), axis=0) * tl.exp2(log))
        span *= 2


@triton.jit
def step_weight(i, first, chunks, start, length, row0, h, level_scales, sums, chunk_log, stride_s, factor, L,
                H: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """(weight ``[C]`` of the chunk that step i of the schedule reads, its log-decay); after the last step it is unused."""
    c = tl.cast((tl.cast(CHUNKS, tl.int64) >> (4 * i)) & 15, tl.int32)
    level = tl.cast((tl.cast(LEVELS, tl.int64) >> (4 * i)) & 15, tl.int32)
    local = first + c
    position = local * C + tl.arange(0, C)
    scale_level = tl.minimum(log2_of_power(C << level) + 1, L - 1)
    weight = chunk_weight(level_scales + h * L + scale_level, sums, (start + local * C).to(tl.int64),
                          (position >= 0) & (position < length), stride_s, factor, C)  # fmt: skip
    inside = (local >= 0) & (local < chunks)
    return weight, tl.load(chunk_log + (row0 + local).to(tl.int64) * H + h, mask=inside, other=0.0)


@triton.jit
def descend(base, begin: tl.constexpr, end: tl.constexpr, q, do, level_scales, sums, chunk_log, chunk_grads, first, chunks,
            start, length, row0, h, stride_q, stride_do, stride_s, factor, L, first_k, first_v, H: tl.constexpr,
            G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """Steps ``begin`` to ``end`` of the schedule, from the gradient ``base``: stores every D on the way, returns the last."""
    acc = base
    weight, log = step_weight(begin, first, chunks, start, length, row0, h, level_scales, sums, chunk_log, stride_s, factor,
                              L, H, C)  # fmt: skip
    for i in range(begin, end):
        now, decay = weight, tl.exp2(log)
        weight, log = step_weight(i + 1, first, chunks, start, length, row0, h, level_scales, sums, chunk_log, stride_s,
                                  factor, L, H, C)  # fmt: skip
        c = tl.cast((tl.cast(CHUNKS, tl.int64) >> (4 * i)) & 15, tl.int32)
        acc = tl.where(RESTARTS >> i & 1 == 1, base, acc)
        local = first + c
        position = local * C + tl.arange(0, C)
        valid = (position >= 0) & (position < length)
        acc = acc * decay + chunk_gradient(
            q + h // (H // G) * K, do + h * V, now, (start + local * C).to(tl.int64), valid, stride_q, stride_do, first_k,
            first_v, C, K, V, BK, BV, PRECISION,
        )  # fmt: skip
        target = chunk_grads + ((row0 + local - 1).to(tl.int64) * H + h) * (K * V)
        complete = (STORES >> i & 1 == 1) & (local > 0) & (local <= chunks)
        store_state(target, acc, complete, first_k, first_v, K, V, BK, BV)
    return acc


@triton.jit(do_not_specialize=["T", "N", "NG", "sums_stride", "L"])
def chunk_grads_kernel(
    q,
    do,
    level_scales,
    sums,
    chunk_log,
    group_log,
    entries,
    node_grads,
    chunk_grads,  # [rows, H, K, V]
    beyond,  # [rows, H, TILES] see store_beyond; not for entries of a single chunk
    group_sequence,
    sequences,
    T,
    N,
    NG,
    sums_stride,
    stride_q,
    stride_do,
    stride_s,
    factor,
    L,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_GATE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: groups x H x tiles, tiles fastest. float32: accumulators, weights, inner products."""
    TILES_V: tl.constexpr = (V + BV - 1) // BV
    TILES: tl.constexpr = (K + BK - 1) // BK * TILES_V
    pid = tl.program_id(0)
    tile = pid % TILES
    h = pid // TILES % H
    group = pid // (TILES * H)
    start, length, row0, group0, n0, _ = locate(group, group_sequence, sequences, T, N, NG, NG, PACKED)
    if length < 0:
        return
    first_k = tile // TILES_V * BK
    first_v = tile % TILES_V * BV
    j = n0 // GROUP + group - group0
    chunks = (length + C - 1) // C
    end = (n0 + chunks + GROUP - 1) // GROUP
    base = gradient_after_group(node_grads, group_log, group, j, end, h, first_k, first_v, H, K, V, BK, BV)
    first = (
        j * GROUP - n0
    )  # local number of the group's first chunk; negative where the sequence began inside the group
    row = row0 + first + GROUP - 1
    complete = first + GROUP <= chunks
    target = chunk_grads + (row.to(tl.int64) * H + h) * (K * V)
    store_state(target, base, complete, first_k, first_v, K, V, BK, BV)
    if HAS_GATE & complete:
        store_beyond(beyond, base, entries, chunk_log, group_log, row, group, (j + 1) * GROUP, n0, h, tile, first_k,
                         first_v, H, K, V, BK, BV, TILES)  # fmt: skip
    head_sums = sums + h.to(tl.int64) * sums_stride
    middle = descend(base, 0, REBASE, q, do, level_scales, head_sums, chunk_log, chunk_grads, first, chunks, start, length,
                     row0, h, stride_q, stride_do, stride_s, factor, L, first_k, first_v, H, G, K, V, C, BK, BV,
                     PRECISION)  # fmt: skip
    local = first + GROUP // 2
    if HAS_GATE & (local > 0) & (local <= chunks):
        store_beyond(beyond, middle, entries, chunk_log, group_log, row0 + local - 1, group, n0 + local, n0, h, tile, first_k,
                     first_v, H, K, V, BK, BV, TILES)  # fmt: skip
    descend(middle, REBASE, STEPS, q, do, level_scales, head_sums, chunk_log, chunk_grads, first, chunks, start, length, row0,
            h, stride_q, stride_do, stride_s, factor, L, first_k, first_v, H, G, K, V, C, BK, BV, PRECISION)  # fmt: skip
