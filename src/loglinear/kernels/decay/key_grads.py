"""KEY GRADIENTS: dK, from the chunk itself and from one gradient that holds everything after it."""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.decays import to_chunk_end
from loglinear.kernels.tree.place import locate
from loglinear.kernels.tree.tiles import load_state, load_tile, store_tile


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride"])
def key_grads_kernel(
    q,
    v,
    sums,
    chunk_grads,
    score_grads,
    dk,  # [H / HEADS / G, B*T, G, K], float32 partial sums unless the first size is 1
    row_sequence,
    sequences,
    T,
    N,
    NG,
    all_tokens,
    sums_stride,
    stride_q,
    stride_v,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HEADS: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: H/HEADS x rows, rows fastest. float32: accumulator, decays."""
    BLOCKS: tl.constexpr = H // G // HEADS
    TILES_V: tl.constexpr = (V + BV - 1) // BV
    rows = tl.num_programs(0) // (H // HEADS)
    pid = tl.program_id(0)
    row = pid % rows
    block = pid // rows
    start, length, row0, _, _, _ = locate(row, row_sequence, sequences, T, N, NG, N, PACKED)
    if length < 0:
        return
    local = row - row0
    in_chunk = tl.arange(0, C)
    size = length - local * C
    valid = in_chunk < size
    origin = (start + local * C).to(tl.int64)
    group_head = block // BLOCKS
    q_tile = load_tile(q + origin * stride_q + group_head * K, stride_q, valid, C, K, BK, 0)
    source = score_grads + (row.to(tl.int64) * (H // HEADS) + block) * (C * C)
    ds = tl.load(source + in_chunk[:, None] * C + in_chunk[None, :])
    acc = tl.dot(tl.trans(ds), q_tile, input_precision=PRECISION)
    for i in range(HEADS * TILES_V):
        h = block * HEADS + i // TILES_V
        first_v = i % TILES_V * BV
        decay = to_chunk_end(sums + h.to(tl.int64) * sums_stride + origin, size, all_tokens, C, EXACT)
        v_tile = load_tile(v + origin * stride_v + h * V, stride_v, valid, C, V, BV, first_v)
        state = load_state(chunk_grads + (row.to(tl.int64) * H + h) * (K * V), 0, first_v, K, V, BK, BV)
        weighted = (v_tile.to(tl.float32) * decay[:, None]).to(v_tile.dtype)
        acc = tl.dot(weighted, tl.trans(state), acc=acc, input_precision=PRECISION)
    part = (block % BLOCKS).to(tl.int64) * all_tokens + origin
    store_tile(dk + part * (G * K) + group_head * K, G * K, valid, acc, C, K, BK, 0)
