"""STEP of the delta rule: the weighted sum of entries and open values, with the weights from ``delta_token.py``.

The kernel moves nearly all bytes of a step and does little arithmetic. It therefore holds few registers and has many loads
under way. ``delta_close.py`` closes the chunks that the step fills.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.decoding.open_chunk import entry_scales, held_slots, open_tile, store_token, weighted_entries


@triton.jit(do_not_specialize=["T", "L", "M", "later"])
def delta_step_kernel(
    v,
    level_scales,
    o,
    reach,  # [B, T, H, K]
    read,  # [B, T, H, C]
    position,
    entries,  # [B, H, M, K, V]
    open_v,  # [B, H, C, V]
    T,
    L,
    M,
    later,  # 0: tokens of the chunk that was open before the call, 1: those of the next one
    stride_v,
    stride_s,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LOG_C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: tiles of V x H x B, tiles fastest. float32: sums. Races: columns of V belong to one program."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    first_v = pid % TILES * BV
    h = pid // TILES % H
    row = (pid // (TILES * H)).to(tl.int64)
    seen = tl.load(position + row).to(tl.int32)
    n = seen // C + later
    first = seen - n * C  # the place of the call's first token
    head = row * H + h
    entries += head * M * (K * V)
    open_v += head * (C * V)

    token = row * T
    v += token * stride_v + h * V
    o += token * (H * V) + h * V
    level_scales += token * stride_s + h * L
    reach += (token * H + h) * K
    read += (token * H + h) * C
    rows_k = tl.arange(0, BK)
    columns = first_v + tl.arange(0, BV)
    for t in range(later * (C - seen % C), tl.minimum(T, C - first)):
        i = first + t
        values = open_tile(open_v, v, stride_v, first, i, C, V, BV, first_v)
        value = tl.load(v + t * stride_v + columns, mask=columns < V, other=0.0)
        weights = tl.load(read + t * (H * C) + tl.arange(0, C))
        query = tl.load(reach + t * (H * K) + rows_k, mask=rows_k < K, other=0.0)
        scales = entry_scales(level_scales + t * stride_s, n, L, LOG_C)
        past = weighted_entries(entries, scales, held_slots(n, M), first_v, K, V, BK, BV, STAGES)
        out = tl.sum(weights[:, None] * values.to(tl.float32), axis=0) + tl.sum(query[:, None] * past, axis=0)
        tl.store(o + t * (H * V) + columns, out.to(o.dtype.element_ty), mask=columns < V)
        store_token(open_v, i, value, columns, V)
