"""KEY GRADIENTS: dK, from the chunk itself and from one gradient that holds everything after it."""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.decays import to_chunk_end
from loglinear.kernels.tree.place import chunk_of, locate
from loglinear.kernels.tree.tiles import load_entry, load_tokens, store_tile


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "L"])
def key_grads_kernel(
    x,
    L,
    states,
    chunk_grads,
    score_grads,
    dk,  # [H / HEADS / G, B*T, G, K], float32 partial sums unless the first size is 1
    table,
    T,
    N,
    NG,
    all_tokens,
    sums_stride,
    S: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid: H/HEADS x rows, rows fastest. float32: accumulator, decays."""
    BLOCKS: tl.constexpr = S.H // S.G // HEADS
    TILES_V: tl.constexpr = (S.V + S.BV - 1) // S.BV
    rows = tl.num_programs(0) // (S.H // HEADS)
    pid = tl.program_id(0)
    row = pid % rows
    block = pid // rows
    at = locate(row, table, T, N, NG, N, S.PACKED)
    if at.length < 0:
        return
    here = chunk_of(at, row, S.C)
    in_chunk = tl.arange(0, S.C)
    group_head = block // BLOCKS
    q_tile = load_tokens(x.q, x.stride_q, group_head, here, S.C, S.K, S.BK, 0)
    source = score_grads + (row.to(tl.int64) * (S.H // HEADS) + block) * (S.C * S.C)
    ds = tl.load(source + in_chunk[:, None] * S.C + in_chunk[None, :])
    acc = tl.dot(tl.trans(ds), q_tile, input_precision=S.PRECISION)
    for i in range(HEADS * TILES_V):
        h = block * HEADS + i // TILES_V
        first_v = i % TILES_V * S.BV
        head_sums = states.sums + h.to(tl.int64) * sums_stride + here.origin
        decay = to_chunk_end(head_sums, here.size, all_tokens, S.C, S.EXACT)
        v_tile = load_tokens(x.v, x.stride_v, h, here, S.C, S.V, S.BV, first_v)
        state = load_entry(chunk_grads, row.to(tl.int64) * S.H + h, 0, first_v, S)
        weighted = (v_tile.to(tl.float32) * decay[:, None]).to(v_tile.dtype)
        acc = tl.dot(weighted, tl.trans(state), acc=acc, input_precision=S.PRECISION)
    part = (block % BLOCKS).to(tl.int64) * all_tokens + here.origin
    target = dk + part * (S.G * S.K) + group_head * S.K
    store_tile(target, S.G * S.K, here.valid, acc, S.C, S.K, S.BK, 0)
