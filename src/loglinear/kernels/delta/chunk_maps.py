"""CHUNK MAPS: the triangular inverse of every chunk, and the writes and erasures of the chunk, ``[W | U]``.

The kernel inverts ``I + N``, N strictly lower triangular. It uses substitution in diagonal blocks of 16, and then
``X <- X - X N₂₁ X`` from one size of blocks to the next. A product of powers of N needs no substitution. But its terms grow
like binomials where keys repeat and β is near 2, while the inverse itself stays small.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.decays import gate_sums, gates_of, pairs, strengths_of
from loglinear.kernels.tree.levels import SUB
from loglinear.kernels.tree.place import chunk_of, locate
from loglinear.kernels.tree.tiles import load_tile, square, store_part


@triton.jit
def own_blocks(lower, BLOCKS: tl.constexpr):
    """The diagonal blocks ``[BLOCKS, SUB, SUB]`` of a matrix ``[C, C]``."""
    own = tl.arange(0, BLOCKS)[:, None] == tl.arange(0, BLOCKS)[None, :]
    tiles = tl.reshape(lower, [BLOCKS, SUB, BLOCKS, SUB])
    return tl.sum(tl.where(own[:, None, :, None], tiles, 0.0), axis=2)


@triton.jit
def block_inverses(blocks, BLOCKS: tl.constexpr):
    """``(I + N)⁻¹`` of strictly lower triangular blocks N ``[BLOCKS, SUB, SUB]``, float32.

    Column j of a block of N takes its part of row j, which is complete by then, out of all rows below: no row is moved.
    """
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
def blocks_between(lower, SIZE: tl.constexpr, PAIRS: tl.constexpr):
    """The blocks N₂₁ ``[PAIRS, SIZE, SIZE]`` below the diagonal of every other diagonal block of a matrix ``[C, C]``."""
    pair = tl.arange(0, PAIRS)
    half = tl.arange(0, 2)
    tiles = tl.reshape(lower, [PAIRS, 2, SIZE, PAIRS, 2, SIZE])
    beside = pair[:, None, None, None, None, None] == pair[None, None, None, :, None, None]
    beside = beside & (half[None, None, None, None, :, None] == 0)
    _, between = halves(tl.sum(tl.sum(tl.where(beside, tiles, 0.0), axis=4), axis=3))
    return between


@triton.jit
def join_blocks(inverses, between, SIZE: tl.constexpr, PAIRS: tl.constexpr, PRECISION: tl.constexpr):
    """Inverses ``[2 PAIRS, SIZE, SIZE]`` of diagonal blocks -> ``[PAIRS, 2 SIZE, 2 SIZE]``, by ``X₂₁ = -X₂₂ N₂₁ X₁₁``."""
    first, second = halves(tl.reshape(inverses, [PAIRS, 2, SIZE, SIZE]))
    between = tl.dot(tl.dot(second, between, input_precision=PRECISION), first, input_precision=PRECISION)
    left = tl.join(first, -between)  # [P, S, S, 2], by half of the rows
    right = tl.join(tl.zeros_like(second), second)
    whole = tl.permute(tl.join(left, right), (0, 3, 1, 4, 2))
    return tl.reshape(whole, [PAIRS, 2 * SIZE, 2 * SIZE])


@triton.jit
def triangular_inverse(lower, C: tl.constexpr, PRECISION: tl.constexpr):
    """``(I + N)⁻¹`` ``[C, C]`` of strictly lower triangular N, C from 16 to 128, float32."""
    inverses = block_inverses(own_blocks(lower, C // 16), C // 16)
    if C > 16:
        inverses = join_blocks(inverses, blocks_between(lower, 16, C // 32), 16, C // 32, PRECISION)
    if C > 32:
        inverses = join_blocks(inverses, blocks_between(lower, 32, C // 64), 32, C // 64, PRECISION)
    if C > 64:
        inverses = join_blocks(inverses, blocks_between(lower, 64, C // 128), 64, C // 128, PRECISION)
    return tl.reshape(inverses, [C, C])


@triton.jit
def sound(overlaps, x, here, h, t, S: tl.constexpr):
    """(β at places ``t``, whether there are tokens with finite k, g and β)."""
    strength = strengths_of(x, here, h, t, float("nan"))
    return strength, (tl.load(overlaps + t * (S.C + 1)) < float("inf")) & (tl.abs(strength) < float("inf"))


@triton.jit
def load_lower(overlaps, x, here, h, SIZE: tl.constexpr, STEP: tl.constexpr, S: tl.constexpr):
    """Blocks ``[C / SIZE / STEP, SIZE, SIZE]`` of N from the stored scores of keys with keys: those on the diagonal, or for a
    STEP of 2 those below the diagonal of every other one. A load in this shape costs less than to cut a matrix in registers.
    """
    block = tl.arange(0, S.C // SIZE // STEP)[:, None] * (SIZE * STEP) + tl.arange(0, SIZE)[None, :]
    rows = block + (STEP - 1) * SIZE
    strength, later = sound(overlaps, x, here, h, rows, S)
    earlier = sound(overlaps, x, here, h, block, S)[1]
    row, column = tl.expand_dims(rows, 2), tl.expand_dims(block, 1)
    entered = tl.expand_dims(later, 2) & tl.expand_dims(earlier, 1) & (row > column)
    return tl.where(entered, tl.load(overlaps + (row * S.C + column)) * tl.expand_dims(strength, 2), 0.0)


@triton.jit
def stored_inverse(overlaps, x, here, h, PRECISION: tl.constexpr, S: tl.constexpr):
    """``triangular_inverse`` of N from the stored scores of keys with keys, C up to 64."""
    inverses = block_inverses(load_lower(overlaps, x, here, h, SUB, 1, S), S.C // SUB)
    if S.C > 16:
        inverses = join_blocks(inverses, load_lower(overlaps, x, here, h, 16, 2, S), 16, S.C // 32, PRECISION)
    if S.C > 32:
        inverses = join_blocks(inverses, load_lower(overlaps, x, here, h, 32, 2, S), 32, S.C // 64, PRECISION)
    return tl.reshape(inverses, [S.C, S.C])


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride"])
def chunk_maps_kernel(
    x,
    prepared,
    sums,
    chunk_log,
    solve,
    writes,
    table,
    T,
    N,
    NG,
    all_tokens,
    sums_stride,
    S: tl.constexpr,
    SOLVE: tl.constexpr,
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
        k_head, stride_k = prepared.starts + (origin * S.H + h) * S.K, S.H * S.K
        overlaps = prepared.overlaps + site * (S.C * S.C)
        strength, valid = sound(overlaps, x, here, h, in_chunk, S)
        solved = stored_inverse(overlaps, x, here, h, SOLVE, S)
    else:
        k_head, stride_k = x.k + origin * x.stride_k + h // (S.H // S.G) * S.K, x.stride_k
        gate = gates_of(x, origin, h, valid, S)
        high, low, _, total = gate_sums(gate)
        products = tl.zeros([S.C, S.C], tl.float32)
        for first in tl.static_range(0, S.K, S.BK):
            k_tile = load_tile(k_head, stride_k, valid, S.C, S.K, S.BK, first)
            products = tl.dot(k_tile, tl.trans(k_tile), products, input_precision=S.PRECISION)
        strength = strengths_of(x, here, h, in_chunk)
        squares = tl.sum(tl.where(in_chunk[:, None] == in_chunk[None, :], products, 0.0), axis=1)
        finite = (squares < float("inf")) & (tl.abs(strength) < float("inf")) & (high == high)
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
        solved = triangular_inverse(lower, S.C, SOLVE)
    solved *= tl.where(valid, strength, 0.0)[None, :]

    dtype = solve.dtype.element_ty
    tl.store(square(solve + site * (S.C * S.C), S.C), solved.to(dtype))
    written = writes + site * (S.C * (S.K + S.V))
    erase = (solved * tl.exp2(tl.where(valid, high, 0.0))[None, :]).to(dtype)
    for first in tl.static_range(0, S.K, S.BK):
        k_tile = load_tile(k_head, stride_k, valid, S.C, S.K, S.BK, first)
        erased = tl.dot(erase, k_tile, input_precision=S.PRECISION)
        store_part(written, S.K + S.V, erased, 0, first, S.C, S.K, S.C, S.BK)
    solved_low = solved.to(dtype)
    for first in tl.static_range(0, S.V, S.BV):
        v_tile = load_tile(x.v + origin * x.stride_v + h * S.V, x.stride_v, valid, S.C, S.V, S.BV, first)
        added = tl.dot(solved_low, v_tile, input_precision=S.PRECISION)
        store_part(written + S.K, S.K + S.V, added, 0, first, S.C, S.V, S.C, S.BV)
