"""CHUNK GRADIENTS: the gradient of every chunk's state, from the entries that contain it.

Gradients are pushed down the tree, so that a key reads one gradient instead of one per level: the gradient D_c at the
end of chunk c is that of its parent on the update path, decayed back, plus its own entry's. Inside a group the tree is
walked depth first with two accumulators, by the schedule below.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.fenwick import level
from loglinear.kernels.decay.node_grads import chunk_gradient, chunk_weight
from loglinear.kernels.tree.place import GROUP, locate, log2_of_power, lowbit, tile_of_program
from loglinear.kernels.tree.tiles import load_entry, store_entry


def schedule(end: int, size: int) -> list[tuple[int, int, bool, bool]]:
    """The steps from D of chunk ``end - 1`` to every D of the ``size - 1`` chunks before it, depth first.

    A step reads a chunk, at a level of the tree. The third member says whether D of the chunk before is complete after it, the
    fourth whether the step begins again from the base: D of the group's last chunk and, from REBASE on, D of its middle.
    """
    steps, width = [], 1
    while width < size:
        first = end - width
        for n in range(end - 1, first - 1, -1):
            steps.append((n, level(n, first - 1) - 1, n == first, width > 1 and n == end - 1))
        steps += schedule(first, width)
        width *= 2
    return steps


_STEPS = schedule(GROUP.value, GROUP.value)
# One digit or bit a step, step 0 the last.
CHUNKS = tl.constexpr(sum(step[0] << 4 * i for i, step in enumerate(_STEPS)))
LEVELS = tl.constexpr(sum(step[1] << 4 * i for i, step in enumerate(_STEPS)))
STORES = tl.constexpr(sum(step[2] << i for i, step in enumerate(_STEPS)))
RESTARTS = tl.constexpr(sum(step[3] << i for i, step in enumerate(_STEPS)))
STEPS = tl.constexpr(len(_STEPS))
REBASE = tl.constexpr(len(_STEPS) - len(schedule(GROUP.value // 2, GROUP.value // 2)))


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
def gradient_after_group(states, node_grads, group, j, end, part, S: tl.constexpr):
    """D at the end of group j: the gradients of its entries of a group or more, each decayed back from its end."""
    total = tl.zeros([S.BK, S.BV], tl.float32)
    e = j + 1
    log = 0.0
    while e < end:
        slot = (group + e - 1 - j).to(tl.int64) * S.H + part.h
        gradient = load_entry(node_grads, slot, part.first_k, part.first_v, S).to(tl.float32)
        total += gradient * tl.exp2(log)
        span = lowbit(e)
        log += log_of_groups(states.group_log, group + e - j, tl.minimum(span, end - e), part.h, S.H)
        e += span
    return total


@triton.jit
def store_beyond(beyond, gradient, states, row, group, b, n0, part, S: tl.constexpr):
    """Share of the gate's gradient that flows from each entry whose window ends with chunk b - 1 past that end.

    ``gradient`` is D at the end of that chunk, which stands at ``row``; the entries are b - 2, b - 4, … while the step divides
    b. Their inner product with D, over the decay of the window, is what all their keys pass to queries after it.
    """
    TILES: tl.constexpr = (S.K + S.BK - 1) // S.BK * ((S.V + S.BV - 1) // S.BV)
    h = part.h
    inside = tl.arange(0, GROUP)
    span = tl.cast(2, tl.int32)
    while (span < lowbit(b)) & (b - span > n0):
        if span < GROUP:
            rows = (row - inside).to(tl.int64) * S.H + h
            log = tl.sum(tl.load(states.chunk_log + rows, mask=inside < span, other=0.0), axis=0)
        else:
            log = log_of_groups(states.group_log, group + 1 - span // GROUP, span // GROUP, h, S.H)
        unit = (row - span).to(tl.int64) * S.H + h
        state = load_entry(states.entries, unit, part.first_k, part.first_v, S).to(tl.float32)
        tl.store(beyond + unit * TILES + part.tile, tl.sum(tl.sum(gradient * state, axis=1), axis=0) * tl.exp2(log))
        span *= 2


@triton.jit
def step_weight(i, x, L, states, sums, at, first, h, S: tl.constexpr):
    """(weight ``[C]`` of the chunk that step i of the schedule reads, its log-decay); what comes after the last is unused."""
    c = tl.cast((tl.cast(CHUNKS, tl.int64) >> (4 * i)) & 15, tl.int32)
    height = tl.cast((tl.cast(LEVELS, tl.int64) >> (4 * i)) & 15, tl.int32)
    local = first + c
    position = local * S.C + tl.arange(0, S.C)
    scale_level = tl.minimum(log2_of_power(S.C << height) + 1, L - 1)
    origin = (at.start + local * S.C).to(tl.int64)
    weight = chunk_weight(x, sums, h, scale_level, origin, (position >= 0) & (position < at.length), L, S)
    inside = (local >= 0) & (local < (at.length + S.C - 1) // S.C)
    return weight, tl.load(states.chunk_log + (at.row0 + local).to(tl.int64) * S.H + h, mask=inside, other=0.0)


@triton.jit
def descend(
    base, begin: tl.constexpr, end: tl.constexpr, x, L, states, sums, chunk_grads, at, first, part, S: tl.constexpr
):
    """Steps ``begin`` to ``end`` of the schedule, from the gradient ``base``: stores every D on the way, returns the last."""
    acc, h = base, part.h
    weight, log = step_weight(begin, x, L, states, sums, at, first, h, S)
    for i in range(begin, end):
        now, decay = weight, tl.exp2(log)
        weight, log = step_weight(i + 1, x, L, states, sums, at, first, h, S)
        c = tl.cast((tl.cast(CHUNKS, tl.int64) >> (4 * i)) & 15, tl.int32)
        acc = tl.where(RESTARTS >> i & 1 == 1, base, acc)
        local = first + c
        position = local * S.C + tl.arange(0, S.C)
        valid = (position >= 0) & (position < at.length)
        origin = (at.start + local * S.C).to(tl.int64)
        acc = acc * decay + chunk_gradient(x, part, now, origin, valid, S)
        unit = (at.row0 + local - 1).to(tl.int64) * S.H + h
        complete = (STORES >> i & 1 == 1) & (local > 0) & (local <= (at.length + S.C - 1) // S.C)
        store_entry(chunk_grads, unit, acc, complete, part.first_k, part.first_v, S)
    return acc


@triton.jit(do_not_specialize=["T", "N", "NG", "sums_stride", "L"])
def chunk_grads_kernel(x, L, states, node_grads, chunk_grads, gains, table, T, N, NG, sums_stride, S: tl.constexpr):
    """``chunk_grads [rows, H, K, V]``; the gains ``beyond``, of entries of two chunks or more.

    Grid: groups x H x tiles, tiles fastest. float32: accumulators, weights, inner products.
    """
    GATED: tl.constexpr = x.g is not None
    part, group = tile_of_program(S)
    at = locate(group, table, T, N, NG, NG, S.PACKED)
    if at.length < 0:
        return
    n0 = at.n0
    j = n0 // GROUP + group - at.group0
    chunks = (at.length + S.C - 1) // S.C
    end = (n0 + chunks + GROUP - 1) // GROUP
    base = gradient_after_group(states, node_grads, group, j, end, part, S)
    # Local number of the group's first chunk; negative where the sequence began inside the group.
    first = j * GROUP - n0
    row = at.row0 + first + GROUP - 1
    complete = first + GROUP <= chunks
    store_entry(chunk_grads, row.to(tl.int64) * S.H + part.h, base, complete, part.first_k, part.first_v, S)
    if GATED & complete:
        store_beyond(gains.beyond, base, states, row, group, (j + 1) * GROUP, n0, part, S)
    sums = states.sums + part.h.to(tl.int64) * sums_stride
    middle = descend(base, 0, REBASE, x, L, states, sums, chunk_grads, at, first, part, S)
    local = first + GROUP // 2
    if GATED & (local > 0) & (local <= chunks):
        store_beyond(gains.beyond, middle, states, at.row0 + local - 1, group, n0 + local, n0, part, S)
    descend(middle, REBASE, STEPS, x, L, states, sums, chunk_grads, at, first, part, S)
