"""CHUNK MAPS: the triangular inverse of every chunk, and the writes and erasures of the chunk, ``[W | U]``.

The kernel inverts ``I + N``, N strictly lower triangular. It uses substitution in diagonal blocks of 16, and then
``X <- X - X N₂₁ X`` from one size of blocks to the next. A product of powers of N needs no substitution. But its terms grow
like binomials where keys repeat and β is near 2, while the inverse itself stays small.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.decays import gate_sums, gates_of, pairs
from loglinear.kernels.tree.levels import SUB
from loglinear.kernels.tree.place import chunk_of, locate
from loglinear.kernels.tree.tiles import load_tile, square, store_part


@triton.jit
def block_inverses(lower, BLOCKS: tl.constexpr):
    """``(I + N)⁻¹`` ``[BLOCKS, SUB, SUB]`` of the diagonal blocks of strictly lower triangular N ``[C, C]``, float32.

    Column j of a block of N takes its part of row j, which is complete by then, out of all rows below: no row is moved.
    """
    own = tl.arange(0, BLOCKS)[:, None] == tl.arange(0, BLOCKS)[None, :]
    tiles = tl.reshape(lower, [BLOCKS, SUB, BLOCKS, SUB])
    blocks = tl.sum(tl.where(own[:, None, :, None], tiles, 0.0), axis=2)
    row = tl.arange(0, SUB)[None, :, None]
    inner = tl.arange(0, SUB)[None, None, :]
    inverse = tl.where((row == inner) & (tl.arange(0, BLOCKS)[:, None, None] >= 0), 1.0, 0.0)
    for j in range(SUB - 1):
        factors = tl.sum(tl.where(inner == j, blocks, 0.0), axis=2)
        complete = tl.sum(tl.where(row == j, inverse, 0.0), axis=1)
        inverse -= factors[:, :, None] * complete[:, None, :]
    return inverse


@triton.jit
def halves(blocks):
    """``[P, 2, M, N]`` -> two ``[P, M, N]``."""
    return tl.split(tl.permute(blocks, (0, 2, 3, 1)))


@triton.jit
def join_blocks(inverses, lower, SIZE: tl.constexpr, PAIRS: tl.constexpr, PRECISION: tl.constexpr):
    """Inverses ``[2 PAIRS, SIZE, SIZE]`` of diagonal blocks -> ``[PAIRS, 2 SIZE, 2 SIZE]``, by ``X₂₁ = -X₂₂ N₂₁ X₁₁``."""
    pair = tl.arange(0, PAIRS)
    half = tl.arange(0, 2)
    tiles = tl.reshape(lower, [PAIRS, 2, SIZE, PAIRS, 2, SIZE])
    beside = pair[:, None, None, None, None, None] == pair[None, None, None, :, None, None]
    beside = beside & (half[None, None, None, None, :, None] == 0)
    _, between = halves(tl.sum(tl.sum(tl.where(beside, tiles, 0.0), axis=4), axis=3))
    first, second = halves(tl.reshape(inverses, [PAIRS, 2, SIZE, SIZE]))
    between = tl.dot(tl.dot(second, between, input_precision=PRECISION), first, input_precision=PRECISION)
    left = tl.join(first, -between)  # [P, S, S, 2], by half of the rows
    right = tl.join(tl.zeros_like(second), second)
    whole = tl.permute(tl.join(left, right), (0, 3, 1, 4, 2))
    return tl.reshape(whole, [PAIRS, 2 * SIZE, 2 * SIZE])


@triton.jit
def triangular_inverse(lower, C: tl.constexpr, PRECISION: tl.constexpr):
    """``(I + N)⁻¹`` ``[C, C]`` of strictly lower triangular N, C from 16 to 128, float32."""
    inverses = block_inverses(lower, C // 16)
    if C > 16:
        inverses = join_blocks(inverses, lower, 16, C // 32, PRECISION)
    if C > 32:
        inverses = join_blocks(inverses, lower, 32, C // 64, PRECISION)
    if C > 64:
        inverses = join_blocks(inverses, lower, 64, C // 128, PRECISION)
    return tl.reshape(inverses, [C, C])


@triton.jit
def strengths_of(x, here, h, S: tl.constexpr):
    """β of a chunk's tokens ``[C]``, float32; 0 past the end."""
    first = x.beta + here.origin * x.stride_beta + h
    return tl.load(first + tl.arange(0, S.C) * x.stride_beta, mask=here.valid, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride"])
def chunk_maps_kernel(
    x, prepared, sums, chunk_log, solve, writes, table, T, N, NG, all_tokens, sums_stride,
    S: tl.constexpr, SOLVE: tl.constexpr
):
    """The first four of ``Maps``. Grid: chunks x H, heads fastest.

    float32: sums, decays, the matrix and its inverse, accumulators.

    Tokens past the end have β = 0 and k = v = 0: their rows and columns of ``solve`` and their ``writes`` are zero. A token
    whose k, g or β is not finite gets zeros too: 0 · NaN would reach earlier tokens. Its sum of logs is NaN, and every later
    token and state reads this sum. A bad v spoils its column of U.
    """
    pid = tl.program_id(0)
    h = pid % S.H
    chunk = pid // S.H
    at = locate(chunk, table, T, N, NG, N, S.PACKED)
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    in_chunk, valid, origin = tl.arange(0, S.C), here.valid, here.origin
    site = chunk.to(tl.int64) * S.H + h
    if S.CHANNELS:
        high = tl.zeros([S.C], tl.float32)
        low = high
        k_head = prepared.starts + (origin * S.H + h) * S.K
        products = tl.load(square(prepared.overlaps + site * (S.C * S.C), S.C))
    else:
        gate = gates_of(x, origin, h, valid, S)
        high, low, _, total = gate_sums(gate)
        k_head = x.k + origin * x.stride_k + h // (S.H // S.G) * S.K
        products = tl.zeros([S.C, S.C], tl.float32)
        for first in tl.static_range(0, S.K, S.BK):
            k_tile = load_tile(k_head, x.stride_k, valid, S.C, S.K, S.BK, first)
            products = tl.dot(k_tile, tl.trans(k_tile), products, input_precision=S.PRECISION)
    strength = strengths_of(x, here, h, S)
    squares = tl.sum(tl.where(in_chunk[:, None] == in_chunk[None, :], products, 0.0), axis=1)
    finite = (squares < float("inf")) & (tl.abs(strength) < float("inf")) & (high == high)
    if not S.CHANNELS:
        high = tl.where(finite, high, float("nan"))
        head_sums = sums + h.to(tl.int64) * sums_stride + origin + in_chunk
        tl.store(head_sums, high, mask=valid)
        if S.EXACT:
            tl.store(head_sums + all_tokens, low, mask=valid)
        tl.store(chunk_log + site, total)
    valid = valid & finite
    strength = tl.where(valid, strength, 0.0)

    earlier = tl.where(valid, in_chunk, 0)[:, None] > tl.where(valid, in_chunk, S.C)[None, :]
    lower = tl.where(earlier, products * pairs(high, low, S) * strength[:, None], 0.0)
    solved = triangular_inverse(lower, S.C, SOLVE) * strength[None, :]

    dtype = solve.dtype.element_ty
    tl.store(square(solve + site * (S.C * S.C), S.C), solved.to(dtype))
    written = writes + site * (S.C * (S.K + S.V))
    erase = (solved * tl.exp2(tl.where(valid, high, 0.0))[None, :]).to(dtype)
    for first in tl.static_range(0, S.K, S.BK):
        k_tile = load_tile(k_head, S.H * S.K if S.CHANNELS else x.stride_k, valid, S.C, S.K, S.BK, first)
        erased = tl.dot(erase, k_tile, input_precision=S.PRECISION)
        store_part(written, S.K + S.V, erased, 0, first, S.C, S.K, S.C, S.BK)
    solved_low = solved.to(dtype)
    for first in tl.static_range(0, S.V, S.BV):
        v_tile = load_tile(x.v + origin * x.stride_v + h * S.V, x.stride_v, valid, S.C, S.V, S.BV, first)
        added = tl.dot(solved_low, v_tile, input_precision=S.PRECISION)
        store_part(written + S.K, S.K + S.V, added, 0, first, S.C, S.V, S.C, S.BV)
