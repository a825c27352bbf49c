"""STEP of the transitions whose entries are carried: the sum of entries and open values, weighted by ``carried_token.py``.

The kernel moves nearly all bytes of a step and does little arithmetic. It therefore holds few registers and has many loads
under way. ``carried_close.py`` closes the chunks that the step fills.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.decoding.open_chunk import (
    at_head,
    at_token,
    entry_scales,
    held_slots,
    open_scales,
    open_tile,
    program_of,
    store_token,
    weighted_entries,
)
from loglinear.kernels.tree.dependent import launch_dependents, wait


@triton.jit(do_not_specialize=["T", "L", "M", "later"])
def carried_step_kernel(
    x, held, o, reach, read, T, L, M, later, S: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr
):
    """Grid: ``program_of``. float32: sums. Races: columns of V belong to one program.

    reach, read: as ``carried_token_kernel`` leaves them; nothing else depends on the launch before. later: 0 for tokens of the
    chunk that was open before the call, 1 for those of the next one.
    """
    own = program_of(S)
    first_v = own.first_v
    held = at_head(held, own, M, S)
    seen = tl.load(held.position).to(tl.int32)
    n = seen // S.C + later
    first = seen - n * S.C  # the place of the call's first token

    _, _, v, _, _, level_scales = at_token(x, own, T, L, S)
    head = own.row * T * S.H + own.h
    o += own.row * T * (S.H * S.V) + own.h * S.V
    reach += head * S.K
    read += head * S.C
    rows_k, places = tl.arange(0, S.BK), tl.arange(0, S.C)
    columns = first_v + tl.arange(0, S.BV)
    for t in range(later * (S.C - seen % S.C), tl.minimum(T, S.C - first)):
        i = first + t
        values = open_tile(held.open_v, v, x.stride_v, first, i, S.C, S.V, S.BV, first_v)
        value = tl.load(v + t * x.stride_v + columns, mask=columns < S.V, other=0.0)
        near = open_scales(level_scales + t * x.stride_scales, i, L, S.C)
        scales = entry_scales(level_scales + t * x.stride_scales, n, L, S.LOG_C)
        past = weighted_entries(held.entries, scales, held_slots(n, M), first_v, S, STAGES)
        if EARLY:
            wait()
        weights = tl.load(read + t * (S.H * S.C) + places) * near
        query = tl.load(reach + t * (S.H * S.K) + rows_k, mask=rows_k < S.K, other=0.0)
        out = tl.sum(weights[:, None] * values.to(tl.float32), axis=0) + tl.sum(query[:, None] * past, axis=0)
        tl.store(o + t * (S.H * S.V) + columns, out.to(o.dtype.element_ty), mask=columns < S.V)
        store_token(held.open_v, i, value, columns, S.V)
    if EARLY:
        wait()  # of a program without tokens too: the next launch relies on it
        launch_dependents()
