"""NODE GRADIENTS: the gradient of every entry of a whole octet or more, the mirror image of node_states.

Entry e is read by the chunks of its *window*, the ``lowbit(e)`` chunks after it, so its gradient is the sum over these
chunks of ``(λ exp2(log-decay since e) ∘ Q)ᵀ dO``. A program sums at most SEGMENT octets of a window; the segments of a
longer window are added by a second kernel in a fixed order. An entry's gradient stands at the slot of its last octet.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.place import OCTET, locate, log2_of_power, tile_of_program
from loglinear.kernels.tree.tiles import load_tile, store_entry


@triton.jit
def chunk_weight(x, sums, h, level, origin, valid, L, S: tl.constexpr):
    """``λ exp2(log-decay since the chunk began)`` ``[C]`` of a chunk's tokens, λ of one level; ``sums`` points at token 0.

    Loaded one step ahead of its use: as one number a token it cannot be copied to shared memory in the background.
    """
    in_chunk = tl.arange(0, S.C)
    scales = x.scales + h * L + level + origin * x.stride_scales
    scale = tl.load(scales + in_chunk * x.stride_scales, mask=valid, other=0.0).to(tl.float32)
    return scale * x.factor * tl.exp2(tl.load(sums + origin + in_chunk, mask=valid, other=0.0))


@triton.jit
def chunk_gradient(x, part, weight, origin, valid, S: tl.constexpr):
    """``(weight ∘ Q)ᵀ dO`` of one chunk from token ``origin`` on: the weight goes to dO, the narrower of the two."""
    q = x.q + part.h // (S.H // S.G) * S.K + origin * x.stride_q
    q_tile = load_tile(q, x.stride_q, valid, S.C, S.K, S.BK, part.first_k)
    do = x.do + part.h * S.V + origin * x.stride_do
    do_tile = load_tile(do, x.stride_do, valid, S.C, S.V, S.BV, part.first_v)
    weighted = (do_tile.to(tl.float32) * weight[:, None]).to(do_tile.dtype)
    return tl.dot(tl.trans(q_tile), weighted, input_precision=S.PRECISION)


@triton.jit(do_not_specialize=["T", "N", "NG", "sums_stride", "L", "octets", "slots"])
def window_grads_kernel(
    x, L, states, out, table, T, N, NG, sums_stride, octets, slots, S: tl.constexpr, SEGMENT: tl.constexpr
):
    """Grid: LEVELS, widest first, x octets x H x tiles; programs that begin no segment of a window return at once.

    out: ``nodes [octets, H, K, V]`` and, for levels of more than SEGMENT octets, ``segments [levels, slots, H, K, V]``.
    float32: accumulator, weights.
    """
    part, rest = tile_of_program(S)
    h = part.h
    octet = rest % octets
    level = S.LEVELS - 1 - rest // octets
    at = locate(octet, table, T, N, NG, NG, S.PACKED)
    j = at.n0 // OCTET + octet - at.octet0
    span = 1 << level
    run = tl.minimum(span, SEGMENT)
    entry = j // span * span  # octets before the window: the number of the entry, in octets
    if (at.length < 0) | (j // span % 2 == 0) | (j % run != 0) | (entry * OCTET <= at.n0):
        return
    in_chunk = tl.arange(0, S.C)
    sums = states.sums + h.to(tl.int64) * sums_stride
    scale_level = tl.minimum(log2_of_power(span * (OCTET * S.C)) + 1, L - 1)
    first = j * OCTET - at.n0
    last = tl.minimum(first + run * OCTET, (at.length + S.C - 1) // S.C) - 1
    total = tl.zeros([S.BK, S.BV], tl.float32)
    origin = (at.start + last * S.C).to(tl.int64)
    weight = chunk_weight(x, sums, h, scale_level, origin, last * S.C + in_chunk < at.length, L, S)
    decay = tl.load(states.chunk_log + (at.chunk0 + last).to(tl.int64) * S.H + h)
    for i in range(last + 1 - first):
        local = last - i
        position = local * S.C + in_chunk
        now, now_decay = weight, tl.exp2(decay)
        origin = (at.start + local * S.C).to(tl.int64)
        before = tl.maximum(local - 1, first)
        earlier = (at.start + before * S.C).to(tl.int64)
        weight = chunk_weight(x, sums, h, scale_level, earlier, before * S.C + in_chunk < at.length, L, S)
        decay = tl.load(states.chunk_log + (at.chunk0 + before).to(tl.int64) * S.H + h)
        gradient = chunk_gradient(x, part, now, origin, position < at.length, S)
        total = total * now_decay + gradient
    if span <= SEGMENT:
        slot = at.octet0 + entry - 1 - at.n0 // OCTET
        store_entry(out.nodes, slot.to(tl.int64) * S.H + h, total, True, part.first_k, part.first_v, S)
    else:
        slot = log2_of_power(span // (2 * SEGMENT)) * slots + octet // SEGMENT + at.sequence
        store_entry(out.segments, slot.to(tl.int64) * S.H + h, total, True, part.first_k, part.first_v, S)


@triton.jit(do_not_specialize=["T", "N", "NG", "octets", "slots"])
def segment_sums_kernel(
    states, out, table, T, N, NG, octets, slots, S: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: levels of more than SEGMENT octets x octets x H x blocks of [K, V]. float32: accumulator, logs."""
    STATE: tl.constexpr = S.K * S.V
    BLOCKS: tl.constexpr = (STATE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    block = pid % BLOCKS
    h = pid // BLOCKS % S.H
    octet = pid // (BLOCKS * S.H) % octets
    level = pid // (BLOCKS * S.H * octets)
    at = locate(octet, table, T, N, NG, NG, S.PACKED)
    first = at.n0 // OCTET
    j = first + octet - at.octet0
    span = (2 * SEGMENT) << level
    if (at.length < 0) | (j % span != 0) | (j // span % 2 == 0) | (j * OCTET <= at.n0):
        return
    end = (at.n0 + (at.length + S.C - 1) // S.C + OCTET - 1) // OCTET
    count = (tl.minimum(span, end - j) + SEGMENT - 1) // SEGMENT
    elements = block * BLOCK + tl.arange(0, BLOCK)
    inside = elements < STATE
    in_segment = tl.arange(0, SEGMENT)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(count):
        offset = (count - 1 - i) * SEGMENT
        slot = level * slots + (octet + offset) // SEGMENT + at.sequence
        state = tl.load(out.segments + (slot.to(tl.int64) * S.H + h) * STATE + elements, mask=inside, other=0.0)
        sites = (octet + offset + in_segment).to(tl.int64) * S.H + h
        logs = tl.load(states.octet_log + sites, mask=j + offset + in_segment < end, other=0.0)
        total = total * tl.exp2(tl.sum(logs, axis=0)) + state.to(tl.float32)
    target = out.nodes + ((octet - 1).to(tl.int64) * S.H + h) * STATE
    tl.store(target + elements, total.to(out.nodes.dtype.element_ty), mask=inside)
