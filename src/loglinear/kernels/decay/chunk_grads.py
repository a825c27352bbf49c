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
from loglinear.kernels.tree.tiles import load_entry, store_entry

# Step i reads chunk CHUNKS[i] of the group at level LEVELS[i] of the tree; after it, D of chunk CHUNKS[i] - 1 is complete
# where STORES has bit i. Where RESTARTS has bit i the step begins from the base: D_7, and from step REBASE on D_3. One digit or
# bit a step, step 0 the last. tests/kernels/test_schedule.py holds what they do against the partition.
CHUNKS = tl.constexpr(0x123345675677)
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
def gradient_after_group(states, node_grads, group, j, end, h, first_k, first_v, S: tl.constexpr):
    """D at the end of group j: the gradients of its entries of a group or more, each decayed back from its end."""
    total = tl.zeros([S.BK, S.BV], tl.float32)
    e = j + 1
    log = 0.0
    while e < end:
        slot = (group + e - 1 - j).to(tl.int64) * S.H + h
        gradient = load_entry(node_grads, slot, first_k, first_v, S).to(tl.float32)
        total += gradient * tl.exp2(log)
        span = lowbit(e)
        log += log_of_groups(states.group_log, group + e - j, tl.minimum(span, end - e), h, S.H)
        e += span
    return total


@triton.jit
def store_beyond(
    beyond, gradient, states, row, group, b, n0, h, tile, first_k, first_v, S: tl.constexpr, TILES: tl.constexpr
):
    """Share of the gate's gradient that flows from each entry whose window ends with chunk b - 1 past that end.

    ``gradient`` is D at the end of that chunk, which stands at ``row``; the entries are b - 2, b - 4, … while the step divides
    b. Their inner product with D, over the decay of the window, is what all their keys pass to queries after it.
    """
    inside = tl.arange(0, GROUP)
    span = tl.cast(2, tl.int32)
    while (span < lowbit(b)) & (b - span > n0):
        if span < GROUP:
            rows = (row - inside).to(tl.int64) * S.H + h
            log = tl.sum(tl.load(states.chunk_log + rows, mask=inside < span, other=0.0), axis=0)
        else:
            log = log_of_groups(states.group_log, group + 1 - span // GROUP, span // GROUP, h, S.H)
        unit = (row - span).to(tl.int64) * S.H + h
        state = load_entry(states.entries, unit, first_k, first_v, S).to(tl.float32)
        tl.store(beyond + unit * TILES + tile, tl.sum(tl.sum(gradient * state, axis=1), axis=0) * tl.exp2(log))
        span *= 2


@triton.jit
def step_weight(i, x, sums, chunk_log, at, first, chunks, h, L, S: tl.constexpr):
    """(weight ``[C]`` of the chunk that step i of the schedule reads, its log-decay); what comes after the last is unused."""
    c = tl.cast((tl.cast(CHUNKS, tl.int64) >> (4 * i)) & 15, tl.int32)
    level = tl.cast((tl.cast(LEVELS, tl.int64) >> (4 * i)) & 15, tl.int32)
    local = first + c
    position = local * S.C + tl.arange(0, S.C)
    scale_level = tl.minimum(log2_of_power(S.C << level) + 1, L - 1)
    origin = (at.start + local * S.C).to(tl.int64)
    weight = chunk_weight(x, sums, h, scale_level, origin, (position >= 0) & (position < at.length), L, S)
    inside = (local >= 0) & (local < chunks)
    return weight, tl.load(chunk_log + (at.row0 + local).to(tl.int64) * S.H + h, mask=inside, other=0.0)


@triton.jit
def descend(base, begin: tl.constexpr, end: tl.constexpr, x, sums, chunk_log, chunk_grads, at, first, chunks, h, L, first_k,
            first_v, S: tl.constexpr):  # fmt: skip
    """Steps ``begin`` to ``end`` of the schedule, from the gradient ``base``: stores every D on the way, returns the last."""
    acc = base
    weight, log = step_weight(begin, x, sums, chunk_log, at, first, chunks, h, L, S)
    for i in range(begin, end):
        now, decay = weight, tl.exp2(log)
        weight, log = step_weight(i + 1, x, sums, chunk_log, at, first, chunks, h, L, S)
        c = tl.cast((tl.cast(CHUNKS, tl.int64) >> (4 * i)) & 15, tl.int32)
        acc = tl.where(RESTARTS >> i & 1 == 1, base, acc)
        local = first + c
        position = local * S.C + tl.arange(0, S.C)
        valid = (position >= 0) & (position < at.length)
        origin = (at.start + local * S.C).to(tl.int64)
        acc = acc * decay + chunk_gradient(x, h, now, origin, valid, first_k, first_v, S)
        unit = (at.row0 + local - 1).to(tl.int64) * S.H + h
        complete = (STORES >> i & 1 == 1) & (local > 0) & (local <= chunks)
        store_entry(chunk_grads, unit, acc, complete, first_k, first_v, S)
    return acc


@triton.jit(do_not_specialize=["T", "N", "NG", "sums_stride", "L"])
def chunk_grads_kernel(
    x,
    L,
    states,
    node_grads,
    chunk_grads,  # [rows, H, K, V]
    gains,  # writes ``beyond``: [rows, H, TILES] see store_beyond; not for entries of a single chunk
    table,
    T,
    N,
    NG,
    sums_stride,
    S: tl.constexpr,
):
    """Grid: groups x H x tiles, tiles fastest. float32: accumulators, weights, inner products."""
    GATED: tl.constexpr = x.g is not None
    TILES_V: tl.constexpr = (S.V + S.BV - 1) // S.BV
    TILES: tl.constexpr = (S.K + S.BK - 1) // S.BK * TILES_V
    pid = tl.program_id(0)
    tile = pid % TILES
    h = pid // TILES % S.H
    group = pid // (TILES * S.H)
    at = locate(group, table, T, N, NG, NG, S.PACKED)
    if at.length < 0:
        return
    first_k = tile // TILES_V * S.BK
    first_v = tile % TILES_V * S.BV
    n0 = at.n0
    j = n0 // GROUP + group - at.group0
    chunks = (at.length + S.C - 1) // S.C
    end = (n0 + chunks + GROUP - 1) // GROUP
    base = gradient_after_group(states, node_grads, group, j, end, h, first_k, first_v, S)
    # Local number of the group's first chunk; negative where the sequence began inside the group.
    first = j * GROUP - n0
    row = at.row0 + first + GROUP - 1
    complete = first + GROUP <= chunks
    store_entry(chunk_grads, row.to(tl.int64) * S.H + h, base, complete, first_k, first_v, S)
    if GATED & complete:
        b = (j + 1) * GROUP
        store_beyond(gains.beyond, base, states, row, group, b, n0, h, tile, first_k, first_v, S, TILES)
    sums = states.sums + h.to(tl.int64) * sums_stride
    middle = descend(
        base, 0, REBASE, x, sums, states.chunk_log, chunk_grads, at, first, chunks, h, L, first_k, first_v, S
    )
    local = first + GROUP // 2
    if GATED & (local > 0) & (local <= chunks):
        row = at.row0 + local - 1
        store_beyond(gains.beyond, middle, states, row, group, n0 + local, n0, h, tile, first_k, first_v, S, TILES)
    descend(middle, REBASE, STEPS, x, sums, states.chunk_log, chunk_grads, at, first, chunks, h, L, first_k, first_v, S)
