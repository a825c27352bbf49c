"""CHANNELS of an open chunk under a gate per channel: keys and log decays as ``[SPAN, C / SPAN, BK]``.

Token ``SPAN · r + s`` of the chunk stands at ``[s, r]``. One thread holds all s of its r, so a sum along the chunk stays inside
threads but for the totals of the spans. No sum is subtracted from another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.decoding.open_chunk import open_rows

SPAN = tl.constexpr(
    4
)  # with chunks of 64 and 8 warps, rows of 128 keys of 16 bits lie so in registers as they are loaded


@triton.jit
def _with_next(total, before, next_total, next_before):
    return total + next_total, total + next_before


@triton.jit
def sums_before(x, INCLUSIVE: tl.constexpr, BACKWARD: tl.constexpr):
    """Sums ``[SPAN, C / SPAN, BK]`` along the chunk of all before each token, and of itself if INCLUSIVE; BACKWARD: after it.

    The sums within a span are written out: a scan of Triton would move every number between threads.
    """
    s = tl.arange(0, SPAN)[:, None, None]
    sums, total = tl.zeros_like(x), tl.sum(tl.zeros_like(x), axis=0)
    for i in tl.static_range(SPAN):
        here = s == (SPAN - 1 - i if BACKWARD else i)
        before = total
        total += tl.sum(tl.where(here, x, 0.0), axis=0)
        sums = tl.where(here, (total if INCLUSIVE else before)[None, :, :], sums)
    _, outside = tl.associative_scan((total, tl.zeros_like(total)), 0, _with_next, reverse=BACKWARD)
    return sums + outside[None, :, :]


@triton.jit
def spread(numbers, S: tl.constexpr):
    """Numbers ``[C]`` of the tokens as ``[SPAN, C / SPAN, 1]``."""
    return tl.trans(tl.reshape(numbers, [S.C // SPAN, SPAN]))[:, :, None]


@triton.jit
def gathered(numbers, S: tl.constexpr):
    """Numbers ``[SPAN, C / SPAN]`` as ``[C]``."""
    return tl.reshape(tl.trans(numbers), [S.C])


@triton.jit
def channels(stored, given, stride, first, last, S: tl.constexpr):
    """``open_tile`` of whole rows of keys or gates, in the order of this module."""
    place = tl.arange(0, S.C // SPAN)[None, :, None] * SPAN + tl.arange(0, SPAN)[:, None, None]
    return open_rows(place, tl.arange(0, S.BK)[None, None, :], stored, given, stride, first, last, S.K, S.K == S.BK)
