"""GATE GRADIENTS: dg of a token is the sum over all pairs (query, key) that have the decay of this token between them.

For a token of chunk n these are pairs within the chunk, pairs of its later queries with earlier chunks, pairs of its
earlier keys with later chunks, and pairs that skip the chunk. Only the pairs within the chunk take a difference, of two
sums of the same float32 products. The keys before the chunk are the entries on its query path. An entry passes a share
to the queries after chunk n in the rest of its window, level gain by level gain, and a share beyond the window, which
chunk_grads has computed. So no error is carried from chunk to chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.decays import GATE_FLOOR
from loglinear.kernels.tree.place import LOG_OCTET, OCTET, locate


@triton.jit
def strided_sum(base, stride, count):
    """Sum of ``count`` float32 values ``stride`` apart, in blocks of 128."""
    total = 0.0
    block = tl.arange(0, 128)
    for i in range((count + 127) // 128):
        index = i * 128 + block
        total += tl.sum(tl.load(base + index.to(tl.int64) * stride, mask=index < count, other=0.0), axis=0)
    return total


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "all_chunks", "high_levels"])
def gate_grads_kernel(
    x, gains, dg, table, T, N, NG, all_tokens, all_chunks, high_levels, S: tl.constexpr, TILES: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """dg ``[B*T, H]`` from all ``gains``. Grid: octets x H. float32 throughout.

    PAIRS: of entries of two chunks, ``beyond`` has what each chunk passes on past their end.
    """
    pid = tl.program_id(0)
    h = pid % S.H
    octet = pid // S.H
    at = locate(octet, table, T, N, NG, NG, S.PACKED)
    if at.length < 0:
        return
    n0, chunk0 = at.n0, at.chunk0
    j = n0 // OCTET + octet - at.octet0
    chunks = (at.length + S.C - 1) // S.C
    in_chunk = tl.arange(0, S.C)
    m = tl.arange(0, 32)
    # Per tree level: the gain of the queries after the chunk, within the chunk's window, from the entry before this window.
    later = tl.zeros([32], tl.float32)
    for i in range(high_levels):
        level = LOG_OCTET + i
        entry = (j * OCTET) >> level << level
        first = (j + 1) * OCTET - n0
        last = tl.minimum(entry + (tl.cast(1, tl.int32) << level) - n0, chunks)
        if ((j * OCTET >> level) & 1 == 1) & (entry > n0) & (first < last):
            base = gains.levels + (level * S.H + h).to(tl.int64) * all_chunks + chunk0 + first
            later = tl.where(m == level, strided_sum(base, 1, last - first), later)
    for i in range(OCTET):
        n = j * OCTET + OCTET - 1 - i
        local = n - n0
        if (local >= 0) & (local < chunks):
            position = local * S.C + in_chunk
            valid = position < at.length
            tokens = at.start + position
            row_place = h.to(tl.int64) * all_tokens + tokens
            gain = tl.load(gains.rows + row_place, mask=valid, other=0.0)
            loss = tl.load(gains.columns + row_place, mask=valid, other=0.0)
            entry = n >> m << m
            reads = ((n >> m) & 1 == 1) & (entry > n0)
            place = (m * S.H + h).to(tl.int64) * all_chunks + chunk0 + local
            own = tl.load(gains.levels + place, mask=reads, other=0.0)
            passes = reads & (entry + (tl.cast(1, tl.int32) << m) < n0 + chunks)
            # A single chunk passes on its whole gain minus the gain that this chunk takes: one difference is harmless.
            site = (chunk0 + local).to(tl.int64) * S.H + h
            skips = tl.where(reads, later, 0.0)
            skips += tl.load(gains.chunks + site - S.H + 0 * m, mask=passes & (m == 0), other=0.0)
            skips -= tl.where(passes & (m == 0), own, 0.0)
            for t in range(TILES):
                place = ((chunk0 + entry - 1 - n0).to(tl.int64) * S.H + h) * TILES + t
                skips += tl.load(gains.beyond + place, mask=passes & (m > 0), other=0.0)
                if PAIRS:
                    skips += tl.load(gains.beyond + place - S.H * TILES, mask=passes & (m == 1), other=0.0)
            if PAIRS:  # again minus what the readers take: this chunk, and the one before or after it in the window
                before = tl.load(gains.levels + (S.H + h).to(tl.int64) * all_chunks + chunk0 + local - 1 + 0 * m,
                                 mask=passes & (m == 1) & (n % 2 == 1), other=0.0)  # fmt: skip
                skips -= tl.where(passes & (m == 1), own + later, 0.0) + before
            crossing = tl.sum(skips, axis=0) + tl.load(gains.chunks + site)
            gradient = crossing + tl.cumsum(gain - loss, axis=0, reverse=True)
            gate = tl.load(x.g + tokens.to(tl.int64) * x.stride_g + h, mask=valid, other=0.0)
            gradient = tl.where(gate.to(tl.float32) > GATE_FLOOR, gradient, 0.0)
            tl.store(dg + tokens.to(tl.int64) * S.H + h, gradient.to(dg.dtype.element_ty), mask=valid)
            later = tl.where((n - 1) >> m == n >> m, later + own, 0.0)
