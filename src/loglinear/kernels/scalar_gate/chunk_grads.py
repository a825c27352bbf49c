"""CHUNK GRADIENTS: the gradient of every chunk's state, from the entries that contain it.

Gradients are pushed down the tree, so that a key reads one gradient instead of one per level: the gradient D_c at the
end of chunk c is that of its parent on the update path, decayed back, plus its own entry's. Inside a group the tree is
walked depth first with two accumulators, by the schedule below.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.common import GROUP, load_state, locate, log2_of_power, lowbit, store_state
from loglinear.kernels.scalar_gate.node_grads import chunk_gradient

# Step i reads chunk CHUNKS[i] of the group at level LEVELS[i] of the tree; after it, D of chunk CHUNKS[i] - 1 is complete
# where STORES has bit i. Where RESTARTS has bit i the step begins from the base: D_7, then from step REBASE on D_3.
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
def gradient_after_group(node_grads, group_log, group_states, crossings, group, j, end, h, tile, first_k, first_v,
                         high_levels, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                         BV: tl.constexpr, TILES: tl.constexpr, HAS_GATE: tl.constexpr):  # fmt: skip
    """D at the end of group j: its entries of a whole group or more, each decayed back from the entry's end.

    ``crossings [groups, H, levels, tiles]`` receives, per level, the inner product of that gradient with the group's state:
    what the keys of this group pass to the entry's window, which gate_grads needs.
    """
    total = tl.zeros([BK, BV], tl.float32)
    own = (group.to(tl.int64) * H + h) * (K * V)
    if HAS_GATE:
        state = load_state(group_states + own, first_k, first_v, K, V, BK, BV).to(tl.float32)
    e = j + 1
    log = 0.0
    while e < end:
        slot = (group + e - 1 - j).to(tl.int64) * H + h
        gradient = load_state(node_grads + slot * (K * V), first_k, first_v, K, V, BK, BV).to(tl.float32)
        gradient = gradient * tl.exp2(log)
        total += gradient
        span = lowbit(e)
        if HAS_GATE:
            crossing = tl.sum(tl.sum(gradient * state, axis=1), axis=0)
            place = (group.to(tl.int64) * H + h) * high_levels + log2_of_power(span)
            tl.store(crossings + place * TILES + tile, crossing)
        log += log_of_groups(group_log, group + e - j, tl.minimum(span, end - e), h, H)
        e += span
    return total


@triton.jit(do_not_specialize=["T", "N", "NG", "sums_stride", "L", "high_levels"])
def chunk_grads_kernel(
    q,
    do,
    level_scales,
    sums,
    chunk_log,
    group_log,
    group_states,
    node_grads,
    chunk_grads,  # [rows, H, K, V]
    crossings,
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
    high_levels,
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
    base = gradient_after_group(node_grads, group_log, group_states, crossings, group, j, end, h, tile, first_k, first_v,
                                high_levels, H, K, V, BK, BV, TILES, HAS_GATE)  # fmt: skip
    first = (
        j * GROUP - n0
    )  # local number of the group's first chunk, negative where the sequence began inside the group
    row = (row0 + first + GROUP - 1).to(tl.int64) * H + h
    store_state(chunk_grads + row * (K * V), base, first + GROUP <= chunks, first_k, first_v, K, V, BK, BV)
    in_chunk = tl.arange(0, C)
    head_sums = sums + h.to(tl.int64) * sums_stride
    acc = base
    for i in range(STEPS):
        c = tl.cast((tl.cast(CHUNKS, tl.int64) >> (4 * i)) & 15, tl.int32)
        level = tl.cast((tl.cast(LEVELS, tl.int64) >> (4 * i)) & 15, tl.int32)
        base = tl.where(i == REBASE, acc, base)
        acc = tl.where(RESTARTS >> i & 1 == 1, base, acc)
        local = first + c
        position = local * C + in_chunk
        origin = (start + local * C).to(tl.int64)
        valid = (position >= 0) & (position < length)
        inside = (local >= 0) & (local < chunks)
        decay = tl.exp2(tl.load(chunk_log + (row0 + local).to(tl.int64) * H + h, mask=inside, other=0.0))
        scale_level = tl.minimum(log2_of_power(C << level) + 1, L - 1)
        acc = acc * decay + chunk_gradient(
            q + h // (H // G) * K, do + h * V, level_scales + h * L + scale_level, head_sums, origin, valid, stride_q,
            stride_do, stride_s, factor, first_k, first_v, C, K, V, BK, BV, PRECISION,
        )  # fmt: skip
        row = (row0 + local - 1).to(tl.int64) * H + h
        keep = (STORES >> i & 1 == 1) & (local > 0) & (local <= chunks)
        store_state(chunk_grads + row * (K * V), acc, keep, first_k, first_v, K, V, BK, BV)
