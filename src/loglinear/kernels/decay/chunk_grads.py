"""CHUNK GRADIENTS: the gradient of every chunk's state, from the entries that contain it.

Gradients are pushed down the tree, so that a key reads one gradient instead of one per level: the gradient D_c at the
end of chunk c is that of its parent on the update path, decayed back, plus its own entry's. Inside an octet the tree is
walked depth first with two accumulators, by the schedule below.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.fenwick import level
from loglinear.kernels.decay.node_grads import chunk_gradient, chunk_weight
from loglinear.kernels.tree.place import OCTET, locate, log2_of_power, lowbit, row_of, tile_of_program
from loglinear.kernels.tree.tiles import load_entry, store_entry


def schedule(end: int, size: int) -> list[tuple[int, int, bool, bool]]:
    """The steps from D of chunk ``end - 1`` to every D of the ``size - 1`` chunks before it, depth first.

    A step reads a chunk, at a level of the tree. The third member says whether D of the chunk before is complete after it, the
    fourth whether the step begins again from the base: D of the octet's last chunk and, from REBASE on, D of its middle.
    """
    steps, width = [], 1
    while width < size:
        first = end - width
        for n in range(end - 1, first - 1, -1):
            steps.append((n, level(n, first - 1) - 1, n == first, width > 1 and n == end - 1))
        steps += schedule(first, width)
        width *= 2
    return steps


_STEPS = schedule(OCTET.value, OCTET.value)
# One digit or bit a step, step 0 the last.
CHUNKS = tl.constexpr(sum(step[0] << 4 * i for i, step in enumerate(_STEPS)))
LEVELS = tl.constexpr(sum(step[1] << 4 * i for i, step in enumerate(_STEPS)))
STORES = tl.constexpr(sum(step[2] << i for i, step in enumerate(_STEPS)))
RESTARTS = tl.constexpr(sum(step[3] << i for i, step in enumerate(_STEPS)))
STEPS = tl.constexpr(len(_STEPS))
REBASE = tl.constexpr(len(_STEPS) - len(schedule(OCTET.value // 2, OCTET.value // 2)))


@triton.jit
def log_of_octets(octet_log, site, count, h, H: tl.constexpr):
    """Sum of the log-decays of ``count`` octets from ``unit`` on."""
    total = 0.0
    block = tl.arange(0, 64)
    for i in range((count + 63) // 64):
        index = i * 64 + block
        total += tl.sum(tl.load(octet_log + (site + index).to(tl.int64) * H + h, mask=index < count, other=0.0), axis=0)
    return total


@triton.jit
def gradient_after_octet(states, node_grads, octet, j, end, part, S: tl.constexpr):
    """D at the end of octet j: the gradients of its entries of an octet or more, each decayed back from its end."""
    total = tl.zeros([S.BK, S.BV], tl.float32)
    e = j + 1
    log = 0.0
    while e < end:
        slot = (octet + e - 1 - j).to(tl.int64) * S.H + part.h
        gradient = load_entry(node_grads, slot, part.first_k, part.first_v, S).to(tl.float32)
        total += gradient * tl.exp2(log)
        span = lowbit(e)
        log += log_of_octets(states.octet_log, octet + e - j, tl.minimum(span, end - e), part.h, S.H)
        e += span
    return total


@triton.jit
def store_beyond(beyond, gradient, states, chunk, octet, b, n0, part, S: tl.constexpr, FIRST: tl.constexpr):
    """Share of the gate's gradient that flows from each entry whose window ends with chunk b - 1 past that end.

    ``gradient`` is D at the end of that chunk, which stands at ``chunk``; the entries are b - FIRST, … in steps that double
    while they divide b. Their inner product with D, over the decay of the window, is what all their keys pass to queries
    after it.
    """
    TILES: tl.constexpr = (S.K + S.BK - 1) // S.BK * ((S.V + S.BV - 1) // S.BV)
    h = part.h
    inside = tl.arange(0, OCTET)
    span = tl.cast(FIRST, tl.int32)
    EVERY: tl.constexpr = 4 if FIRST == 4 else 1
    while (span < lowbit(b)) & (b - span > n0):
        if span < OCTET:
            sites = (chunk - inside).to(tl.int64) * S.H + h
            log = tl.sum(tl.load(states.chunk_log + sites, mask=inside < span, other=0.0), axis=0)
        else:
            log = log_of_octets(states.octet_log, octet + 1 - span // OCTET, span // OCTET, h, S.H)
        site = (chunk - span).to(tl.int64) * S.H + h
        row = row_of(chunk - span, EVERY).to(tl.int64) * S.H + h
        state = load_entry(states.entries, row, part.first_k, part.first_v, S).to(tl.float32)
        tl.store(beyond + site * TILES + part.tile, tl.sum(tl.sum(gradient * state, axis=1), axis=0) * tl.exp2(log))
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
    return weight, tl.load(states.chunk_log + (at.chunk0 + local).to(tl.int64) * S.H + h, mask=inside, other=0.0)


@triton.jit
def descend(  # 13 parameters: what the kernel has, and which steps of its walk
    base, begin: tl.constexpr, end: tl.constexpr, x, L, states, sums, chunk_grads, at, first, part, S: tl.constexpr,
    EVERY: tl.constexpr,
):  # fmt: skip
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
        site = row_of(at.chunk0 + local - 1, EVERY).to(tl.int64) * S.H + h
        complete = (STORES >> i & 1 == 1) & (local > 0) & (local <= (at.length + S.C - 1) // S.C)
        store_entry(chunk_grads, site, acc, complete, part.first_k, part.first_v, S)
    return acc


@triton.jit(do_not_specialize=["T", "N", "NG", "sums_stride", "L"])
def chunk_grads_kernel(
    x, L, states, node_grads, chunk_grads, gains, table, T, N, NG, sums_stride, S: tl.constexpr, PAIRS: tl.constexpr
):
    """``chunk_grads [chunks, H, K, V]``; the gains ``beyond``, of entries of two chunks or more. PAIRS: of every second chunk,
    without rows for the others, and of entries of four chunks or more.

    Grid: octets x H x tiles, tiles fastest. float32: accumulators, weights, inner products.
    """
    GATED: tl.constexpr = x.g is not None
    part, octet = tile_of_program(S)
    at = locate(octet, table, T, N, NG, NG, S.PACKED)
    if at.length < 0:
        return
    n0 = at.n0
    j = n0 // OCTET + octet - at.octet0
    chunks = (at.length + S.C - 1) // S.C
    end = (n0 + chunks + OCTET - 1) // OCTET
    base = gradient_after_octet(states, node_grads, octet, j, end, part, S)
    # Local number of the octet's first chunk; negative where the sequence began inside the octet.
    first = j * OCTET - n0
    chunk = at.chunk0 + first + OCTET - 1
    complete = first + OCTET <= chunks
    EVERY: tl.constexpr = 2 if PAIRS else 1
    row = row_of(chunk, EVERY).to(tl.int64) * S.H + part.h
    store_entry(chunk_grads, row, base, complete, part.first_k, part.first_v, S)
    if GATED & complete:
        store_beyond(gains.beyond, base, states, chunk, octet, (j + 1) * OCTET, n0, part, S, 4 if PAIRS else 2)
    sums = states.sums + part.h.to(tl.int64) * sums_stride
    if PAIRS:  # past the steps for the chunks between
        descend(base, 1, 3, x, L, states, sums, chunk_grads, at, first, part, S, EVERY)
        middle = descend(base, 4, REBASE, x, L, states, sums, chunk_grads, at, first, part, S, EVERY)
    else:
        middle = descend(base, 0, REBASE, x, L, states, sums, chunk_grads, at, first, part, S, EVERY)
    local = first + OCTET // 2
    if GATED & (not PAIRS) & (local > 0) & (local <= chunks):
        store_beyond(gains.beyond, middle, states, at.chunk0 + local - 1, octet, n0 + local, n0, part, S, 2)
    if PAIRS:
        descend(middle, REBASE + 1, STEPS - 1, x, L, states, sums, chunk_grads, at, first, part, S, EVERY)
    else:
        descend(middle, REBASE, STEPS, x, L, states, sums, chunk_grads, at, first, part, S, EVERY)
