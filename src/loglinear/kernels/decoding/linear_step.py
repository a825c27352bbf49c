"""LINEAR STEP: one token of the linear models against their state, which is read once and written once.

A program owns columns of one head's state and holds them in registers from the load to the store. Both rules are sums over
the rows of the state.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.decoding.host import gather, tiles_of
from loglinear.kernels.decoding.open_chunk import held_row, program_of
from loglinear.kernels.pointwise.functions import inverse_length
from loglinear.kernels.pointwise.rows import scratch_like
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.tiles import load_state, store_state
from loglinear.transition import is_per_channel

BLOCK_V, WARPS = 32, 4


@triton.jit
def linear_step_kernel(x, state, o, rows, stride, S: tl.constexpr):
    """Grid: ``program_of``. float32: everything. Every number of the state ``[rows, H, K, V]`` belongs to one program."""
    own = program_of(S)
    row, head, first_v = own.row, own.head, own.first_v
    rows_k = tl.arange(0, S.BK)
    columns = first_v + tl.arange(0, S.BV)
    query = tl.load(x.q + row * x.stride_q + own.group * S.K + rows_k, mask=rows_k < S.K, other=0.0).to(tl.float32)
    key = tl.load(x.k + row * x.stride_k + own.group * S.K + rows_k, mask=rows_k < S.K, other=0.0).to(tl.float32)
    new = tl.load(x.v + row * x.stride_v + own.h * S.V + columns, mask=columns < S.V, other=0.0).to(tl.float32)
    state += held_row(rows, row) * stride + own.h * (S.K * S.V)
    memory = load_state(state, 0, first_v, S.K, S.V, S.BK, S.BV)
    if S.GATES == 1:
        memory *= tl.exp(tl.load(x.g + head))
    else:
        memory *= tl.exp(tl.load(x.g + head * S.K + rows_k, mask=rows_k < S.K, other=0.0))[:, None]
    if x.beta is not None:
        query *= inverse_length(query, 0)
        key *= inverse_length(key, 0)
        new = (new - tl.sum(key[:, None] * memory, axis=0)) * tl.load(x.beta + head)
    memory += key[:, None] * new[None, :]
    store_state(state, memory, True, 0, first_v, S.K, S.V, S.BK, S.BV)
    out = tl.sum(query[:, None] * memory, axis=0)
    tl.store(o + head * S.V + columns, out.to(o.dtype.element_ty), mask=columns < S.V)


def linear_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor, rows: Tensor | None = None
) -> Tensor:
    """o ``[B, 1, H, V]``, as ``layers.recurrence.linear_step`` without the position. The token is added to ``state``.

    Args:
        q, k: ``[B, 1, G, K]``, v: ``[B, 1, H, V]``: heads side by side, at most 32 bits. g, beta: float32 ``[B, 1, H]``,
            or g ``[B, 1, H, K]``, contiguous. state: float32 ``[rows, H, K, V]``, each row contiguous.
        rows: int64 ``[B]``, the row of the state for each row of q; None: they are the same.
    """
    return launching.replay(run_linear_step, [q, k, v, g, beta, state, rows])[0]


def run_linear_step(inputs: list) -> tuple[Tensor]:
    """The launch of ``linear_step``."""
    *given, state, rows = inputs
    q, v, g = given[0], given[2], given[3]
    o = scratch_like(v)
    programs, S = tiles_of(q.shape, v.shape, 0, BLOCK_V, gates=q.shape[3] if is_per_channel(g) else 1)
    if programs:
        x = gather(*given, None, 1.0)
        launching.launch(linear_step_kernel, programs, x, state, o, rows, state.stride(0), S=S, num_warps=WARPS)
    return (o,)
