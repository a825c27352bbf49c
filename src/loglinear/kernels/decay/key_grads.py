"""KEY GRADIENTS: dK, from the chunk itself and from one gradient that holds everything after it."""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.decays import to_end
from loglinear.kernels.tree.place import chunk_of, row_of_program
from loglinear.kernels.tree.tiles import load_entry, load_tokens, square, store_tile


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "L"])
def key_grads_kernel(
    x, L, states, chunk_grads, score_grads, dk, table, T, N, NG, all_tokens, sums_stride, S: tl.constexpr
):
    """dk ``[H / HEADS / G, B*T, G, K]``: float32 partial sums unless the first size is 1.

    Grid: H/HEADS x chunks, chunks fastest. float32: accumulator, decays.
    """
    BLOCKS: tl.constexpr = S.H // S.G // S.HEADS
    TILES_V: tl.constexpr = (S.V + S.BV - 1) // S.BV
    at, chunk, block, _ = row_of_program(table, T, N, NG, S.H // S.HEADS, S)
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    group_head = block // BLOCKS
    q_tile = load_tokens(x.q, x.stride_q, group_head, here, S.C, S.K, S.BK, 0)
    ds = tl.load(square(score_grads + (chunk.to(tl.int64) * (S.H // S.HEADS) + block) * (S.C * S.C), S.C))
    acc = tl.dot(tl.trans(ds), q_tile, input_precision=S.PRECISION)
    for i in range(S.HEADS * TILES_V):
        h = block * S.HEADS + i // TILES_V
        first_v = i % TILES_V * S.BV
        head_sums = states.sums + h.to(tl.int64) * sums_stride + here.origin
        decay = to_end(head_sums, here.size, all_tokens, S)
        v_tile = load_tokens(x.v, x.stride_v, h, here, S.C, S.V, S.BV, first_v)
        state = load_entry(chunk_grads, chunk.to(tl.int64) * S.H + h, 0, first_v, S)
        weighted = (v_tile.to(tl.float32) * decay[:, None]).to(v_tile.dtype)
        acc = tl.dot(weighted, tl.trans(state), acc=acc, input_precision=S.PRECISION)
    part = (block % BLOCKS).to(tl.int64) * all_tokens + here.origin
    target = dk + part * (S.G * S.K) + group_head * S.K
    store_tile(target, S.G * S.K, here.valid, acc, S.C, S.K, S.BK, 0)
