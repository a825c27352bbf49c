"""KEY GRADIENTS: of values and of decayed keys, from the chunk itself and from one gradient that holds everything after it."""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.channel.gains import blocks_of, of_other_blocks, skipping
from loglinear.kernels.channel.output import load_square
from loglinear.kernels.tree.levels import level_mask
from loglinear.kernels.tree.place import chunk_of, row_of_program
from loglinear.kernels.tree.tiles import load_entry, load_tokens, store_tokens


@triton.jit(do_not_specialize=["T", "N", "NG", "L", "tiles"])
def key_grads_kernel(x, states, grads, dv, table, T, N, NG, L, tiles, S: tl.constexpr):
    """Of grads it reads ``chunks``, ``levels`` and ``beyond``, of ``tiles`` of V, writes ``k`` and completes ``around``.

    Grid: H x chunks, chunks fastest. float32: mask, accumulators.
    """
    at, chunk, h, all_chunks = row_of_program(table, T, N, NG, S.H, S)
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    site = chunk.to(tl.int64) * S.H + h
    k_tile = load_tokens(x.k, x.stride_k, h, here, S.C, S.K, S.BK, 0)
    weights = load_square(states.scores, site, S.C).to(tl.float32) * level_mask(x, here, h, L, S)
    weights = weights.to(k_tile.dtype)
    total = tl.zeros([S.C, S.BK], tl.float32)
    for first_v in range(0, S.V, S.BV):
        v_tile = load_tokens(x.v, x.stride_v, h, here, S.C, S.V, S.BV, first_v)
        do_tile = load_tokens(x.do, x.stride_do, h, here, S.C, S.V, S.BV, first_v)
        state = load_entry(grads.chunks, site, 0, first_v, S)
        total = tl.dot(v_tile, tl.trans(state), acc=total, input_precision=S.PRECISION)
        own = tl.dot(k_tile, state, input_precision=S.PRECISION)
        own = tl.dot(tl.trans(weights), do_tile, acc=own, input_precision=S.PRECISION)
        store_tokens(dv, S.H * S.V, h, here, own, S.C, S.V, S.BV, first_v)
    store_tokens(grads.k, S.H * S.K, h, here, total, S.C, S.K, S.BK, 0)
    gains = of_other_blocks(k_tile.to(tl.float32) * total, False, S)
    gains += skipping(grads, at, chunk, here.n, h, all_chunks, tiles, 0, S)[None, :]
    pointers, inside = blocks_of(grads.around, site, 0, S)
    tl.store(pointers, gains + tl.load(pointers, mask=inside, other=0.0), mask=inside)
