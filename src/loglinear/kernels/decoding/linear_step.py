"""LINEAR STEP: one token of the linear models against their state, which is read once and written once.

A program owns columns of one head's state and holds them in registers from the load to the store. Both rules are sums over
the rows of the state.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.decoding.host import row_stride
from loglinear.kernels.pointwise.functions import inverse_length
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.problem import cdiv, padded
from loglinear.kernels.tree.replay import replay
from loglinear.kernels.tree.tiles import load_state, store_state

BLOCK_V, WARPS = 32, 4


@triton.jit
def linear_step_kernel(
    q,
    k,
    v,
    g,
    beta,
    state,  # [B, H, K, V]
    o,
    stride_q,
    stride_k,
    stride_v,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DELTA: tl.constexpr,
):
    """Grid: tiles of V x H x B, tiles fastest. float32: everything. Every number of the state belongs to one program."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    first_v = pid % TILES * BV
    h = pid // TILES % H
    row = (pid // (TILES * H)).to(tl.int64)
    group = h // (H // G)
    head = row * H + h
    state += head * (K * V)
    rows_k = tl.arange(0, BK)
    columns = first_v + tl.arange(0, BV)
    query = tl.load(q + row * stride_q + group * K + rows_k, mask=rows_k < K, other=0.0).to(tl.float32)
    key = tl.load(k + row * stride_k + group * K + rows_k, mask=rows_k < K, other=0.0).to(tl.float32)
    new = tl.load(v + row * stride_v + h * V + columns, mask=columns < V, other=0.0).to(tl.float32)
    memory = load_state(state, 0, first_v, K, V, BK, BV) * tl.exp(tl.load(g + head))
    if DELTA:
        query *= inverse_length(query, 0)
        key *= inverse_length(key, 0)
        new = (new - tl.sum(key[:, None] * memory, axis=0)) * tl.load(beta + head)
    memory += key[:, None] * new[None, :]
    store_state(state, memory, True, 0, first_v, K, V, BK, BV)
    out = tl.sum(query[:, None] * memory, axis=0)
    tl.store(o + head * V + columns, out.to(o.dtype.element_ty), mask=columns < V)


def linear_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor) -> Tensor:
    """o ``[B, 1, H, V]``, as ``layers.recurrence.linear_step`` without the position. The token is added to ``state``.

    Args:
        q, k: ``[B, 1, G, K]``, v: ``[B, 1, H, V]``: heads side by side, at most 32 bits. g, beta: float32 ``[B, 1, H]``,
            contiguous. state: float32 ``[B, H, K, V]``, contiguous.
    """
    return replay(run_linear_step, [q, k, v, g, beta, state])[0]  # type: ignore[return-value]


def run_linear_step(inputs: list) -> tuple[Tensor]:
    """The launch of ``linear_step``."""
    q, k, v, _, beta, _ = inputs
    (batch, _, groups, width), (heads, value_width) = q.shape, v.shape[2:]
    o = launching.scratch(tuple(v.shape), v.dtype, v.device)
    tile_v = min(BLOCK_V, padded(value_width))
    programs = batch * heads * cdiv(value_width, tile_v)
    if programs:
        launching.launch(
            linear_step_kernel, programs, *inputs, o, *(row_stride(x.shape, x.stride()) for x in (q, k, v)),
            H=heads, G=groups, K=width, V=value_width, BK=padded(width), BV=tile_v, DELTA=beta is not None,
            num_warps=WARPS,
        )  # fmt: skip
    return (o,)
