"""NODE GRADIENTS: the gradient of every entry of a whole group or more, the mirror image of node_states.

Entry e is read by the chunks of its *window*, the ``lowbit(e)`` chunks after it, so its gradient is the sum over these
chunks of ``(λ exp2(log-decay since e) ∘ Q)ᵀ dO``. A program sums at most SEGMENT groups of a window; the segments of a
longer window are added by a second kernel in a fixed order. An entry's gradient stands at the slot of its last group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.place import GROUP, locate, log2_of_power
from loglinear.kernels.tree.tiles import load_tile, store_state


@triton.jit
def chunk_weight(level_scales, sums, origin, valid, stride_s, factor, C: tl.constexpr):
    """``λ exp2(log-decay since the chunk began)`` of a chunk's tokens ``[C]``, ``level_scales`` pointing at the entry's level.

    Loaded one step ahead of its use: as one number a token it cannot be copied to shared memory in the background.
    """
    in_chunk = tl.arange(0, C)
    scale = tl.load(level_scales + origin * stride_s + in_chunk * stride_s, mask=valid, other=0.0).to(tl.float32)
    return scale * factor * tl.exp2(tl.load(sums + origin + in_chunk, mask=valid, other=0.0))


@triton.jit
def chunk_gradient(q, do, weight, origin, valid, stride_q, stride_do, first_k, first_v, C: tl.constexpr, K: tl.constexpr,
                   V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``(weight ∘ Q)ᵀ dO`` of one chunk: the weight goes to dO, the narrower of the two.

    q and do point at token 0 of a head; ``origin`` (int64) is the chunk's first token.
    """
    q_tile = load_tile(q + origin * stride_q, stride_q, valid, C, K, BK, first_k)
    do_tile = load_tile(do + origin * stride_do, stride_do, valid, C, V, BV, first_v)
    weighted = (do_tile.to(tl.float32) * weight[:, None]).to(do_tile.dtype)
    return tl.dot(tl.trans(q_tile), weighted, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "N", "NG", "sums_stride", "L", "groups", "slots"])
def window_grads_kernel(
    q,
    do,
    level_scales,
    sums,
    chunk_log,
    node_grads,  # [groups, H, K, V]
    segments,  # [levels, slots, H, K, V], for levels of more than SEGMENT groups
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
    groups,
    slots,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SEGMENT: tl.constexpr,
    HIGH_LEVELS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: levels (widest first) x groups x H x tiles; programs that begin no segment of a window return at once.

    float32: accumulator, weights.
    """
    TILES_V: tl.constexpr = (V + BV - 1) // BV
    TILES: tl.constexpr = (K + BK - 1) // BK * TILES_V
    pid = tl.program_id(0)
    tile = pid % TILES
    h = pid // TILES % H
    group = pid // (TILES * H) % groups
    level = HIGH_LEVELS - 1 - pid // (TILES * H * groups)
    start, length, row0, group0, n0, sequence = locate(group, group_sequence, sequences, T, N, NG, NG, PACKED)
    j = n0 // GROUP + group - group0
    span = 1 << level
    run = tl.minimum(span, SEGMENT)
    entry = j // span * span  # groups before the window: the number of the entry, in groups
    if (length < 0) | (j // span % 2 == 0) | (j % run != 0) | (entry * GROUP <= n0):
        return
    first_k = tile // TILES_V * BK
    first_v = tile % TILES_V * BV
    in_chunk = tl.arange(0, C)
    head_sums = sums + h.to(tl.int64) * sums_stride
    scale_level = tl.minimum(log2_of_power(span * (GROUP * C)) + 1, L - 1)
    head_scales = level_scales + h * L + scale_level
    first = j * GROUP - n0
    last = tl.minimum(first + run * GROUP, (length + C - 1) // C) - 1
    total = tl.zeros([BK, BV], tl.float32)
    origin = (start + last * C).to(tl.int64)
    weight = chunk_weight(head_scales, head_sums, origin, last * C + in_chunk < length, stride_s, factor, C)
    decay = tl.load(chunk_log + (row0 + last).to(tl.int64) * H + h)
    for i in range(last + 1 - first):
        local = last - i
        position = local * C + in_chunk
        now, now_decay = weight, tl.exp2(decay)
        origin = (start + local * C).to(tl.int64)
        before = tl.maximum(local - 1, first)
        weight = chunk_weight(head_scales, head_sums, (start + before * C).to(tl.int64), before * C + in_chunk < length,
                              stride_s, factor, C)  # fmt: skip
        decay = tl.load(chunk_log + (row0 + before).to(tl.int64) * H + h)
        total = total * now_decay + chunk_gradient(
            q + h // (H // G) * K, do + h * V, now, origin, position < length, stride_q, stride_do, first_k, first_v, C, K,
            V, BK, BV, PRECISION,
        )  # fmt: skip
    if span <= SEGMENT:
        slot = group0 + entry - 1 - n0 // GROUP
        target = node_grads + (slot.to(tl.int64) * H + h) * (K * V)
        store_state(target, total, True, first_k, first_v, K, V, BK, BV)
    else:
        slot = log2_of_power(span // (2 * SEGMENT)) * slots + group // SEGMENT + sequence
        target = segments + (slot.to(tl.int64) * H + h) * (K * V)
        store_state(target, total, True, first_k, first_v, K, V, BK, BV)


@triton.jit(do_not_specialize=["T", "N", "NG", "groups", "slots"])
def segment_sums_kernel(
    segments,
    group_log,
    node_grads,
    group_sequence,
    sequences,
    T,
    N,
    NG,
    groups,
    slots,
    H: tl.constexpr,
    STATE: tl.constexpr,
    C: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid: levels of more than SEGMENT groups x groups x H x blocks of [K, V]. float32: accumulator, logs."""
    BLOCKS: tl.constexpr = (STATE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    block = pid % BLOCKS
    h = pid // BLOCKS % H
    group = pid // (BLOCKS * H) % groups
    level = pid // (BLOCKS * H * groups)
    _, length, _, group0, n0, sequence = locate(group, group_sequence, sequences, T, N, NG, NG, PACKED)
    first = n0 // GROUP
    j = first + group - group0
    span = (2 * SEGMENT) << level
    if (length < 0) | (j % span != 0) | (j // span % 2 == 0) | (j * GROUP <= n0):
        return
    end = (n0 + (length + C - 1) // C + GROUP - 1) // GROUP
    count = (tl.minimum(span, end - j) + SEGMENT - 1) // SEGMENT
    elements = block * BLOCK + tl.arange(0, BLOCK)
    inside = elements < STATE
    in_segment = tl.arange(0, SEGMENT)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(count):
        offset = (count - 1 - i) * SEGMENT
        slot = level * slots + (group + offset) // SEGMENT + sequence
        state = tl.load(segments + (slot.to(tl.int64) * H + h) * STATE + elements, mask=inside, other=0.0)
        units = (group + offset + in_segment).to(tl.int64) * H + h
        logs = tl.load(group_log + units, mask=j + offset + in_segment < end, other=0.0)
        total = total * tl.exp2(tl.sum(logs, axis=0)) + state.to(tl.float32)
    target = node_grads + ((group - 1).to(tl.int64) * H + h) * STATE
    tl.store(target + elements, total.to(node_grads.dtype.element_ty), mask=inside)
