"""SHORT CONVOLUTION: causal, depthwise, a few taps, then SiLU; forward, and the backward in one pass over memory.

A program owns some channels of a span of tokens and takes the tokens one after the other. Neighbouring tokens share values, and
registers hold them: the W - 1 inputs before a token, and in the backward pass the W - 1 gradients that are not complete yet.
A kernel therefore reads every number once, except the few numbers where two spans meet. Only the inputs are saved for backward.

Legend: rows are the tokens of all sequences, one behind the other; ``here`` is how many tokens of its sequence stand before a
token, from the table ``place`` if sequences are packed; lag j is the tap that reads j tokens back, weight column W - 1 - j.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.pointwise.functions import silu_slope
from loglinear.kernels.pointwise.rows import scratch_like, with_strides
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import constants, hash_of
from loglinear.kernels.tree.problem import cdiv

SPAN = 128  # tokens of a program
AHEAD = 8  # tokens that are loaded together; at least W - 1
CHANNELS = 256
WARPS, GRADS_WARPS = 2, 4  # a thread has four channels, or two where it also keeps gradients


class Inputs(NamedTuple):
    """The input and the gradient of the result, with the distance of two tokens of each, and the table of ``here``; None
    where absent.
    """

    x: Any
    dy: Any
    stride_x: Any
    stride_dy: Any
    weight: Any
    bias: Any
    place: Any


class Span(NamedTuple):
    """Sizes of a launch: TOKENS of a program, AHEAD of them loaded together, and its CHANNELS.

    ALIGNED: a sequence begins only at the first of tokens that are loaded together.
    """

    TOKENS: Any
    AHEAD: Any
    CHANNELS: Any
    ALIGNED: Any
    __hash__ = hash_of


@triton.jit
def _load(pointer, token, stride, channels, width, there):
    """The channels of one token as they are in memory; 0 where they end, and all 0 unless the token is ``there``."""
    mask = channels < tl.where(there, width, 0)
    return tl.load(pointer + token.to(tl.int64) * stride + channels, mask=mask, other=0.0)


@triton.jit
def _store(pointer, token, stride, channels, width, values, there):
    """Write the channels of one token, if it is ``there``."""
    pointers = pointer + token.to(tl.int64) * stride + channels
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=channels < tl.where(there, width, 0))


@triton.jit
def _taps(x, channels, width, W: tl.constexpr):
    """(taps by lag, bias) in float32."""
    inside = channels < width
    taps = ()
    for lag in tl.static_range(W):
        taps = taps + (tl.load(x.weight + channels * W + (W - 1 - lag), mask=inside, other=0.0).to(tl.float32),)
    constant = tl.zeros([channels.shape[0]], tl.float32)
    if x.bias is not None:
        constant = tl.load(x.bias + channels, mask=inside, other=0.0).to(tl.float32)
    return taps, constant


@triton.jit
def _place(place, token, T, rows):
    """``here`` of a token, looked up or counted."""
    return token % T if place is None else tl.load(place + token, mask=token < rows, other=0)


@triton.jit
def _next(here, place, token, T, rows):
    """``here`` of ``token``, given that of the token before it: no division where none is needed."""
    return tl.where(here + 1 == T, 0, here + 1) if place is None else _place(place, token, T, rows)


@triton.jit
def _past(x, token, here, stride, channels, width, W: tl.constexpr):
    """Inputs of the W - 1 tokens before ``token``, the nearest first, 0 before the sequence."""
    past = ()
    for lag in tl.static_range(1, W):
        past = past + (_load(x, token - lag, stride, channels, width, here >= lag).to(tl.float32),)
    return past


@triton.jit
def _sum(taps, constant, window, W: tl.constexpr):
    """The sum over the taps, the argument of the SiLU."""
    total = constant
    for lag in tl.static_range(W):
        total += taps[lag] * window[lag]
    return total


@triton.jit
def _of_sequence(now, past, here, j: tl.constexpr, W: tl.constexpr, S: tl.constexpr):
    """The inputs that a token's taps meet: its own and those before it, which are 0 for the first token of a sequence.

    The token is the j-th of those that were loaded together.
    """
    window = (now,)
    for lag in tl.static_range(1, W):
        before = past[lag - 1]
        if not S.ALIGNED or j == 0:
            before = tl.where(here > 0, before, 0.0)
        window = window + (before,)
    return window


@triton.jit
def _begin(x, T, rows, width, W: tl.constexpr, S: tl.constexpr):
    """(Number of the span, its first token, channels, taps, bias, ``here`` and the past of the token) of a program.

    Grid: spans x blocks of channels.
    """
    blocks = tl.cdiv(width, S.CHANNELS)
    part = tl.program_id(0) // blocks
    start = part * S.TOKENS
    channels = (tl.program_id(0) % blocks) * S.CHANNELS + tl.arange(0, S.CHANNELS)
    taps, constant = _taps(x, channels, width, W)
    here = _place(x.place, start, T, rows)
    return part, start, channels, taps, constant, here, _past(x.x, start, here, x.stride_x, channels, width, W)


@triton.jit(do_not_specialize=["T", "rows"])
def convolution_kernel(x, y, T, rows, width, W: tl.constexpr, S: tl.constexpr):
    """y ``[rows, width]`` from x ``[rows, width]``."""
    _, start, channels, taps, constant, here, past = _begin(x, T, rows, width, W, S)
    for i in range(0, S.TOKENS, S.AHEAD):
        loaded = ()
        for j in tl.static_range(S.AHEAD):
            loaded = loaded + (_load(x.x, start + i + j, x.stride_x, channels, width, start + i + j < rows),)
        for j in tl.static_range(S.AHEAD):
            token = start + i + j
            window = _of_sequence(loaded[j].to(tl.float32), past, here, j, W, S)
            total = _sum(taps, constant, window, W)
            _store(y, token, width, channels, width, total * tl.sigmoid(total), token < rows)
            past = window[: W - 1]
            here = _next(here, x.place, token + 1, T, rows)


@triton.jit(do_not_specialize=["T", "rows"])
def convolution_grads_kernel(x, dx, partial, stride_dx, T, rows, width, W: tl.constexpr, S: tl.constexpr):
    """dx ``[rows, width]``, and the sums over a span, ``partial [spans, W + 1, width]`` (taps by lag, bias).

    The gradient of an input is complete W - 1 tokens later, so a program goes on for AHEAD tokens after its span.
    """
    part, start, channels, taps, constant, here, past = _begin(x, T, rows, width, W, S)
    end = tl.minimum(start + S.TOKENS, rows)
    zero = tl.zeros([S.CHANNELS], tl.float32)
    grads, sums = (), (zero,)  # for the W - 1 tokens before this one, the nearest first; for bias and taps
    for _ in tl.static_range(1, W):
        grads = grads + (zero,)
    for _ in tl.static_range(W):
        sums = sums + (zero,)
    for i in range(0, S.TOKENS + S.AHEAD, S.AHEAD):
        loaded, given = (), ()
        for j in tl.static_range(S.AHEAD):
            token = start + i + j
            loaded = loaded + (_load(x.x, token, x.stride_x, channels, width, token < rows),)
            given = given + (_load(x.dy, token, x.stride_dy, channels, width, token < rows),)
        for j in tl.static_range(S.AHEAD):
            token = start + i + j
            window = _of_sequence(loaded[j].to(tl.float32), past, here, j, W, S)
            before = _sum(taps, constant, window, W)
            gradient = given[j].to(tl.float32) * silu_slope(before, tl.sigmoid(before))
            own = tl.where(token < end, gradient, 0.0)
            added, longer = (sums[0] + own,), (taps[0] * gradient,)
            for lag in tl.static_range(W):
                added = added + (sums[lag + 1] + own * window[lag],)
            for lag in tl.static_range(1, W):  # a token of another sequence gets nothing
                share = gradient
                if not S.ALIGNED or j < lag:
                    share = tl.where(here >= lag, gradient, 0.0)
                longer = longer + (grads[lag - 1] + taps[lag] * share,)
            complete = token - (W - 1)
            _store(dx, complete, stride_dx, channels, width, longer[W - 1], (complete >= start) & (complete < end))
            past, grads, sums = window[: W - 1], longer[: W - 1], added
            here = _next(here, x.place, token + 1, T, rows)
    for lag in tl.static_range(W):
        _store(partial, part * (W + 1) + lag, width, channels, width, sums[lag + 1], True)
    _store(partial, part * (W + 1) + W, width, channels, width, sums[0], True)


def _launch(kernel, x: Tensor, dy: Tensor | None, weight: Tensor, bias, place, made: tuple, warps: int) -> None:
    """A kernel whose programs have a span of tokens and a block of channels."""
    batch, length, width = x.shape
    programs = cdiv(batch * length, SPAN) * cdiv(width, CHANNELS)
    if programs:
        inputs = Inputs(*with_strides(x, dy), weight.contiguous(), bias, place)
        aligned = place is None and length % AHEAD == 0
        sizes = dict(W=weight.shape[1], S=constants(Span, SPAN, AHEAD, CHANNELS, aligned), num_warps=warps)
        launching.launch(kernel, programs, inputs, *made, length, batch * length, width, **sizes)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor | None) -> Tensor:
    """y ``[B, T, channels]``, contiguous, in the dtype of x.

    Args:
        x: ``[B, T, channels]``, at most 32 bits. weight: ``[channels, W]``, W <= 7. bias: ``[channels]`` or None.
        place: int32 ``[T]``, for packed sequences (B = 1): how many tokens of its sequence come before each token. None
        stands for B sequences of T tokens.
    """
    y = scratch_like(x)
    _launch(convolution_kernel, x, None, weight, bias, place, (y,), WARPS)
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor | None, into: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, dweight, dbias) in the dtypes of x, weight and bias; arguments as in ``forward``. The same bits on every run.

    dx is written into ``into``, columns of wider rows, where it is given.
    """
    taps, spans = weight.shape[1], cdiv(x.shape[0] * x.shape[1], SPAN)
    dx = scratch_like(x) if into is None else into
    partial = launching.scratch((spans, taps + 1, x.shape[2]), torch.float32, x.device)
    _launch(convolution_grads_kernel, x, dy, weight, bias, place, (dx, partial, dx.stride(1)), GRADS_WARPS)
    sums = partial.sum(0)
    dweight = sums[:taps].flip(0).T.to(weight.dtype).contiguous()
    return dx, dweight, None if bias is None else sums[taps].to(bias.dtype)
