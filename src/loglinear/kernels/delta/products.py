"""PRODUCTS with one operand in memory: whole on tensor cores, in slices on the ordinary units.

An IEEE product holds both operands in registers over the whole inner size. For float32 the product therefore takes SLICE
rows and columns at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.tiles import load_block, load_part, load_tile

FLOAT32_SLICE = tl.constexpr(32)


@triton.jit
def column_slice(matrix, which, PARTS: tl.constexpr, M: tl.constexpr, SIZE: tl.constexpr):
    """SIZE columns, from ``which * SIZE`` on, of a matrix ``[M, PARTS * SIZE]`` in registers."""
    parts = tl.reshape(matrix, [M, PARTS, SIZE])
    return tl.sum(tl.where((tl.arange(0, PARTS) == which)[None, :, None], parts, 0.0), axis=1)


@triton.jit
def row_slice(matrix, which, PARTS: tl.constexpr, SIZE: tl.constexpr, N: tl.constexpr):
    """SIZE rows, from ``which * SIZE`` on, of a matrix ``[PARTS * SIZE, N]`` in registers."""
    parts = tl.reshape(matrix, [PARTS, SIZE, N])
    return tl.sum(tl.where((tl.arange(0, PARTS) == which)[:, None, None], parts, 0.0), axis=0)


@triton.jit
def load_erased(written, S: tl.constexpr):
    """W ``[C, BK]`` of a chunk, from its ``[W | U]``."""
    return load_part(written, S.K + S.V, 0, 0, S.C, S.K, S.C, S.BK)


@triton.jit
def times_memory(left, base, stride, first, end, M: tl.constexpr, MASKED: tl.constexpr, S: tl.constexpr):
    """``left [M, BK]`` times BK columns from ``first`` on, if MASKED as far as ``end``, of a matrix of K rows. float32."""
    if S.PRECISION == "ieee" and S.BK > FLOAT32_SLICE:
        total = tl.zeros([M, S.BK], tl.float32)
        for part in range((S.K + FLOAT32_SLICE - 1) // FLOAT32_SLICE):
            row = part * FLOAT32_SLICE
            tile = load_block(base, stride, row, first, 0, end, S.K, FLOAT32_SLICE, S.BK, MASKED)
            part_of_left = column_slice(left, part, S.BK // FLOAT32_SLICE, M, FLOAT32_SLICE)
            total = tl.dot(part_of_left, tile, total, input_precision=S.PRECISION)
    else:
        tile = load_block(base, stride, 0, first, 0, end, S.K, S.BK, S.BK, MASKED)
        total = tl.dot(left, tile, input_precision=S.PRECISION)
    return total


@triton.jit
def memory_times(base, right, STRIDE: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, S: tl.constexpr):
    """The first K columns of a matrix of ROWS <= BR rows, ``[BR, BK]``, times ``right [BK, BN]``. float32."""
    MASKED: tl.constexpr = (ROWS % BR != 0) or (S.K % S.BK != 0)
    if S.PRECISION == "ieee" and S.BK > FLOAT32_SLICE:
        total = tl.zeros([BR, S.BN], tl.float32)
        for part in range(S.BK // FLOAT32_SLICE):
            tile = load_block(base, STRIDE, 0, part * FLOAT32_SLICE, 0, S.K, ROWS, BR, FLOAT32_SLICE, MASKED)
            part_of_right = row_slice(right, part, S.BK // FLOAT32_SLICE, FLOAT32_SLICE, S.BN)
            total = tl.dot(tile, part_of_right, total, input_precision=S.PRECISION)
    else:
        tile = load_block(base, STRIDE, 0, 0, 0, S.K, ROWS, BR, S.BK, MASKED)
        total = tl.dot(tile, right, input_precision=S.PRECISION)
    return total


@triton.jit
def token_products(left, right, stride_left, stride_right, valid, S: tl.constexpr):
    """``[C, C]`` float32 products of the tokens of a chunk, each pointed at by its first token, of K columns."""
    SLICE: tl.constexpr = FLOAT32_SLICE if (S.PRECISION == "ieee" and S.BK > FLOAT32_SLICE) else S.BK
    total = tl.zeros([S.C, S.C], tl.float32)
    rows = tl.arange(0, S.C)[:, None]
    for part in range(S.BK // SLICE):
        columns = part * SLICE + tl.arange(0, SLICE)[None, :]
        inside = valid[:, None] & (columns < S.K)
        a = tl.load(left + (rows * stride_left + columns), mask=inside, other=0.0)
        b = tl.load(right + (rows * stride_right + columns), mask=inside, other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision=S.PRECISION)
    return total


@triton.jit
def times_transposed(left, base, STRIDE: tl.constexpr, M: tl.constexpr, S: tl.constexpr):
    """``left [M, BK]`` times the transpose of the first K columns of a matrix of K rows. float32."""
    MASKED: tl.constexpr = S.K % S.BK != 0
    if S.PRECISION == "ieee" and S.BK > FLOAT32_SLICE:
        total = tl.zeros([M, S.BK], tl.float32)
        for part in range(S.BK // FLOAT32_SLICE):
            tile = load_block(base, STRIDE, 0, part * FLOAT32_SLICE, 0, S.K, S.K, S.BK, FLOAT32_SLICE, MASKED)
            part_of_left = column_slice(left, part, S.BK // FLOAT32_SLICE, M, FLOAT32_SLICE)
            total = tl.dot(part_of_left, tl.trans(tile), total, input_precision=S.PRECISION)
    else:
        tile = load_block(base, STRIDE, 0, 0, 0, S.K, S.K, S.BK, S.BK, MASKED)
        total = tl.dot(left, tl.trans(tile), input_precision=S.PRECISION)
    return total


@triton.jit
def transposed_times(base, right, STRIDE: tl.constexpr, S: tl.constexpr):
    """The transpose of the first K columns of a matrix of K rows times ``right [BK, BN]``. float32."""
    MASKED: tl.constexpr = S.K % S.BK != 0
    if S.PRECISION == "ieee" and S.BK > FLOAT32_SLICE:
        total = tl.zeros([S.BK, S.BN], tl.float32)
        for part in range((S.K + FLOAT32_SLICE - 1) // FLOAT32_SLICE):
            tile = load_block(base, STRIDE, part * FLOAT32_SLICE, 0, 0, S.K, S.K, FLOAT32_SLICE, S.BK, MASKED)
            part_of_right = row_slice(right, part, S.BK // FLOAT32_SLICE, FLOAT32_SLICE, S.BN)
            total = tl.dot(tl.trans(tile), part_of_right, total, input_precision=S.PRECISION)
    else:
        tile = load_block(base, STRIDE, 0, 0, 0, S.K, S.K, S.BK, S.BK, MASKED)
        total = tl.dot(tl.trans(tile), right, input_precision=S.PRECISION)
    return total


@triton.jit
def tokens_times(tokens, stride, valid, right, BN: tl.constexpr, S: tl.constexpr):
    """The tokens of a chunk, pointed at by the first, of K columns, times ``right [BK, BN]``: ``[C, BN]`` float32."""
    if S.PRECISION == "ieee" and S.BK > FLOAT32_SLICE:
        total = tl.zeros([S.C, BN], tl.float32)
        for part in range(S.BK // FLOAT32_SLICE):
            columns = part * FLOAT32_SLICE + tl.arange(0, FLOAT32_SLICE)[None, :]
            pointers = tokens + (tl.arange(0, S.C)[:, None] * stride + columns)
            tile = tl.load(pointers, mask=valid[:, None] & (columns < S.K), other=0.0)
            part_of_right = row_slice(right, part, S.BK // FLOAT32_SLICE, FLOAT32_SLICE, BN)
            total = tl.dot(tile, part_of_right, total, input_precision=S.PRECISION)
    else:
        tile = load_tile(tokens, stride, valid, S.C, S.K, S.BK, 0)
        total = tl.dot(tile, right, input_precision=S.PRECISION)
    return total


@triton.jit
def times_tokens(left, tokens, stride, valid, S: tl.constexpr):
    """``left [C, BK]`` times the transposed tokens of a chunk, pointed at by the first, of K columns: ``[C, C]`` float32."""
    if S.PRECISION == "ieee" and S.BK > FLOAT32_SLICE:
        total = tl.zeros([S.C, S.C], tl.float32)
        for part in range(S.BK // FLOAT32_SLICE):
            columns = part * FLOAT32_SLICE + tl.arange(0, FLOAT32_SLICE)[None, :]
            pointers = tokens + (tl.arange(0, S.C)[:, None] * stride + columns)
            tile = tl.load(pointers, mask=valid[:, None] & (columns < S.K), other=0.0)
            part_of_left = column_slice(left, part, S.BK // FLOAT32_SLICE, S.C, FLOAT32_SLICE)
            total = tl.dot(part_of_left, tl.trans(tile), total, input_precision=S.PRECISION)
    else:
        tile = load_tile(tokens, stride, valid, S.C, S.K, S.BK, 0)
        total = tl.dot(left, tl.trans(tile), input_precision=S.PRECISION)
    return total
