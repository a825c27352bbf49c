"""CHANNELS of an open chunk under a gate per channel: keys and log decays of four neighbouring tokens at a time.

Token ``4 r + s`` of the chunk is row r of tile s, and one thread holds a row of all four tiles. A sum along the chunk therefore
stays inside threads but for the totals of the rows. A scan of all rows would pass every number between threads. No sum is
subtracted from another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from loglinear.kernels.decoding.open_chunk import open_rows


class Four(NamedTuple):
    """Tiles ``[C / 4, BK]``, or numbers ``[C / 4]``, of the tokens ``4 r``, ``4 r + 1``, ``4 r + 2`` and ``4 r + 3``."""

    a: Any
    b: Any
    c: Any
    d: Any


@triton.jit
def rounded(rows, like):
    """Float32 numbers as the dtype of ``like`` holds them: a call must use the keys that the state will keep."""
    return rows.to(like.dtype).to(tl.float32)


@triton.jit
def four_rows(stored, given, stride, first, last, S: tl.constexpr):
    """``open_tile`` of whole rows of keys or gates."""
    place, columns = tl.arange(0, S.C // 4)[:, None] * 4, tl.arange(0, S.BK)[None, :]
    a = open_rows(place, columns, stored, given, stride, first, last, S.K, S.K == S.BK)
    b = open_rows(place + 1, columns, stored, given, stride, first, last, S.K, S.K == S.BK)
    c = open_rows(place + 2, columns, stored, given, stride, first, last, S.K, S.K == S.BK)
    d = open_rows(place + 3, columns, stored, given, stride, first, last, S.K, S.K == S.BK)
    return Four(a, b, c, d)


@triton.jit
def spread(numbers, S: tl.constexpr):
    """Numbers ``[C]`` of the tokens as columns ``[C / 4, 1]``."""
    even, odd = tl.split(tl.reshape(numbers, [S.C // 4, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return Four(a[:, None], b[:, None], c[:, None], d[:, None])


@triton.jit
def four_keys(given, units, S: tl.constexpr, NORM: tl.constexpr):
    """The keys in float32; with NORM times ``units`` ``[C]``, and rounded."""
    a, b, c, d = given.a.to(tl.float32), given.b.to(tl.float32), given.c.to(tl.float32), given.d.to(tl.float32)
    if NORM:
        unit = spread(units, S)
        a, b = rounded(a * unit.a, given.a), rounded(b * unit.b, given.b)
        c, d = rounded(c * unit.c, given.c), rounded(d * unit.d, given.d)
    return Four(a, b, c, d)


@triton.jit
def four_products(keys, row, decays, S: tl.constexpr):
    """Products ``[C]`` of a row ``[BK]`` with decayed keys."""
    row = row[None, :]
    a, b = tl.sum(keys.a * decays.a * row, axis=1), tl.sum(keys.b * decays.b * row, axis=1)
    c, d = tl.sum(keys.c * decays.c * row, axis=1), tl.sum(keys.d * decays.d * row, axis=1)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [S.C])


@triton.jit
def four_weighted(keys, weights, decays, S: tl.constexpr):
    """``Σ_j weights_j decays_j keys_j`` ``[BK]`` for weights ``[C]``."""
    weight = spread(weights, S)
    total = weight.a * (keys.a * decays.a) + weight.b * (keys.b * decays.b)
    total += weight.c * (keys.c * decays.c) + weight.d * (keys.d * decays.d)
    return tl.sum(total, axis=0)


@triton.jit
def _with_next(total, before, next_total, next_before):
    return total + next_total, total + next_before


@triton.jit
def _other_rows(gates, BACKWARD: tl.constexpr):
    """Sums of all rows before each row; BACKWARD: after it."""
    total = gates.a + gates.b + gates.c + gates.d
    _, outside = tl.associative_scan((total, tl.zeros_like(total)), 0, _with_next, reverse=BACKWARD)
    return outside


@triton.jit
def decays_after(gates):
    """Decays from after each token to the last one."""
    d = _other_rows(gates, True)
    c = d + gates.d
    b = c + gates.c
    a = b + gates.b
    return Four(tl.exp(a), tl.exp(b), tl.exp(c), tl.exp(d))


@triton.jit
def decays_through(gates):
    """Decays from the start of the chunk through each token."""
    a = _other_rows(gates, False) + gates.a
    b = a + gates.b
    c = b + gates.c
    d = c + gates.d
    return Four(tl.exp(a), tl.exp(b), tl.exp(c), tl.exp(d))
