"""TOKENS OF A CONVOLUTION: a program's channels, and the inputs that a token shares with the tokens before it, in registers.

The kernels and the legend are in convolution.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from loglinear.kernels.tree.bundles import hash_of


class Inputs(NamedTuple):
    """The input and the gradient of the result, or, with values, that of the values and that of x from elsewhere before it is
    multiplied by ``skip_scale [VALUES]``, with the distance of two tokens of each; the table of ``here``. Only with values: the
    steps ``[rows, VALUES]`` and the gradients of the two parts behind x ``[rows, KEYS]``. An absent input is None.
    """

    x: Any
    dy: Any
    dskip: Any
    stride_x: Any
    stride_dy: Any
    stride_dskip: Any
    weight: Any
    bias: Any
    place: Any
    step: Any = None
    skip_scale: Any = None
    dfirst: Any = None
    dsecond: Any = None


class Span(NamedTuple):
    """Sizes of a launch: TOKENS of a program, AHEAD of them loaded together; it has HEADS parts of WIDTH channels, in COLUMNS.

    ALIGNED: a sequence begins only at a multiple of ALIGNED tokens. WHOLE: no program has fewer tokens or channels.
    VALUES: heads with values, KEYS: channels of each of the two parts behind them; 0 where there are no values.
    """

    TOKENS: Any
    AHEAD: Any
    HEADS: Any
    COLUMNS: Any
    WIDTH: Any
    ALIGNED: Any
    WHOLE: Any
    VALUES: Any
    KEYS: Any
    __hash__ = hash_of


class Block(NamedTuple):
    """The channels of a program ``[HEADS, COLUMNS]``, the same counted from where its part of the channels begins, and which
    there are; its heads and which there are; its first token.
    """

    channels: Any
    columns: Any
    inside: Any
    heads: Any
    there: Any
    start: Any


@triton.jit
def block_of(start, first, limit, begin, WIDTH: tl.constexpr, S: tl.constexpr):
    """The channels from ``first`` to ``limit``, in parts of WIDTH; their part of the channels begins at ``begin``."""
    part, column = tl.arange(0, S.HEADS), tl.arange(0, S.COLUMNS)
    columns = (first - begin) + part[:, None] * WIDTH + column[None, :]
    channels = begin + columns
    inside = (channels < limit) & (column < WIDTH)[None, :]
    heads = (first - begin) // WIDTH + part
    return Block(channels, columns, inside, heads, begin + heads * WIDTH < limit, start)


@triton.jit
def program_of(width, S: tl.constexpr):
    """(First token, number of the block of channels) of a program. Grid: spans x blocks of channels."""
    blocks = tl.cdiv(width, S.HEADS * S.COLUMNS)
    if S.VALUES > 0:
        blocks = tl.cdiv(S.VALUES, S.HEADS) + 2 * tl.cdiv(S.KEYS, S.HEADS * S.COLUMNS)
    return (tl.program_id(0) // blocks) * S.TOKENS, tl.program_id(0) % blocks


@triton.jit
def block_behind(start, block, S: tl.constexpr):
    """(Channels of a block in one of the two parts behind the heads with values, whether it is the second)."""
    blocks = tl.cdiv(S.KEYS, S.HEADS * S.COLUMNS)
    block -= tl.cdiv(S.VALUES, S.HEADS)
    begin = S.VALUES * S.WIDTH + (block // blocks) * S.KEYS
    first = begin + (block % blocks) * (S.HEADS * S.COLUMNS)
    return block_of(start, first, begin + S.KEYS, begin, S.COLUMNS, S), block >= blocks


@triton.jit
def load_token(pointers, inside, there, WHOLE: tl.constexpr):
    """Numbers of one token as they are in memory; 0 where there are none, and all 0 unless the token is ``there``."""
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside & there, other=0.0)


@triton.jit
def store_token(pointers, values, inside, there, WHOLE: tl.constexpr):
    """Write numbers of one token, if it is ``there``."""
    values = values.to(pointers.dtype.element_ty)
    if WHOLE:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=inside & there)


@triton.jit
def taps_of(x, at, W: tl.constexpr):
    """(taps by lag, bias) in float32."""
    taps = ()
    for lag in tl.static_range(W):
        taps = taps + (tl.load(x.weight + at.channels * W + (W - 1 - lag), mask=at.inside, other=0.0).to(tl.float32),)
    constant = tl.zeros(at.channels.shape, tl.float32)
    if x.bias is not None:
        constant = tl.load(x.bias + at.channels, mask=at.inside, other=0.0).to(tl.float32)
    return taps, constant


@triton.jit
def place_of(place, token, T, rows):
    """``here`` of a token, looked up or counted."""
    return token % T if place is None else tl.load(place + token, mask=token < rows, other=0)


@triton.jit
def next_place(here, place, token, T, rows):
    """``here`` of ``token``, given that of the token before it: no division where none is needed."""
    return tl.where(here + 1 == T, 0, here + 1) if place is None else place_of(place, token, T, rows)


@triton.jit
def past_of(x, at, here, W: tl.constexpr):
    """Inputs of the W - 1 tokens before a span, the nearest first, 0 before the sequence."""
    past = ()
    for lag in tl.static_range(1, W):
        pointers = x.x + (at.start - lag).to(tl.int64) * x.stride_x + at.channels
        past = past + (tl.load(pointers, mask=at.inside & (here >= lag), other=0.0).to(tl.float32),)
    return past


@triton.jit
def sum_of(taps, constant, window, W: tl.constexpr):
    """The sum over the taps, the argument of the SiLU."""
    total = constant
    for lag in tl.static_range(W):
        total += taps[lag] * window[lag]
    return total


@triton.jit
def masks_of(j: tl.constexpr, S: tl.constexpr):
    """How far back from the j-th of the tokens that are loaded together the first token of another sequence may stand."""
    masks: tl.constexpr = 1 if S.ALIGNED < S.AHEAD else j + 1 if S.ALIGNED < S.TOKENS else S.TOKENS
    return masks


@triton.jit
def of_sequence(now, past, here, j: tl.constexpr, W: tl.constexpr, S: tl.constexpr):
    """The inputs that a token's taps meet: its own and those before it, which are 0 for the first token of a sequence.

    The token is the j-th of those that were loaded together.
    """
    window = (now,)
    for lag in tl.static_range(1, W):
        before = past[lag - 1]
        if masks_of(j, S) == 1:
            before = tl.where(here > 0, before, 0.0)
        window = window + (before,)
    return window
