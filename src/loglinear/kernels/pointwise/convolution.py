"""SHORT CONVOLUTION: causal, depthwise, a few taps, then SiLU; forward, and the backward in one pass over memory.

A program owns some channels of a span of tokens and takes the tokens one after the other. Neighbouring tokens share values, and
registers hold them: the W - 1 inputs before a token, and in the backward pass the W - 1 gradients that are not complete yet.
A kernel therefore reads every number once, except the few numbers where two spans meet. Only the inputs are saved for backward.

The first channels may be the x of heads whose values ``v = x · step`` are wanted too (Mamba-2). The forward pass makes both,
and the backward pass takes the gradients of v and of x, and sums the gradient of the step over a head's columns.

Legend: rows are the tokens of all sequences, one behind the other; ``here`` is how many tokens of its sequence stand before a
token, from the table ``place`` if sequences are packed; lag j is the tap that reads j tokens back, weight column W - 1 - j.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.pointwise.convolution_tokens import (
    Inputs,
    Span,
    block_behind,
    block_of,
    load_token,
    masks_of,
    next_place,
    of_sequence,
    past_of,
    place_of,
    program_of,
    store_token,
    sum_of,
    taps_of,
)
from loglinear.kernels.pointwise.functions import sigmoid, silu_slope
from loglinear.kernels.pointwise.rows import registers, scratch_like, with_strides
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import constants
from loglinear.kernels.tree.problem import cdiv, padded

SPAN = 128  # tokens of a program
# Tokens that are loaded together, and channels of a program and of a thread. Backward with values, 32,768 tokens of 3,328
# channels and heads of 64, takes 0.330 ms (H200, Triton 3.6, 2026-12-01). With 8 tokens, and as many registers as they take,
# it takes 0.344, with two channels a thread 0.337, with eight 0.407.
AHEAD, GRADS_AHEAD = 8, 4
CHANNELS, THREAD = 128, 4
REGISTERS = 128  # of a thread in the backward pass, at most


@triton.jit
def _convolve(x, y, v, at, inner, T, rows, width, W: tl.constexpr, VALUES: tl.constexpr, S: tl.constexpr):
    """The outputs of a program, and its values."""
    taps, constant = taps_of(x, at, W)
    here = place_of(x.place, at.start, T, rows)
    past = past_of(x, at, here, W)
    for i in range(0, S.TOKENS, S.AHEAD):
        first = (at.start + i).to(tl.int64)
        loaded, steps = (), ()
        for j in tl.static_range(S.AHEAD):
            there = first + j < rows
            loaded = loaded + (load_token(x.x + (first + j) * x.stride_x + at.channels, at.inside, there, S.WHOLE),)
            if VALUES:
                steps = steps + (load_token(x.step + (first + j) * S.VALUES + at.heads, at.there, there, S.WHOLE),)
        for j in tl.static_range(S.AHEAD):
            token, there = first + j, first + j < rows
            window = of_sequence(loaded[j].to(tl.float32), past, here, j, W, S)
            total = sum_of(taps, constant, window, W)
            result = total * sigmoid(total)
            store_token(y + token * width + at.channels, result, at.inside, there, S.WHOLE)
            if VALUES:
                store_token(v + token * inner + at.channels, result * steps[j][:, None], at.inside, there, S.WHOLE)
            past = window[: W - 1]
            if S.ALIGNED < S.TOKENS:
                here = next_place(here, x.place, at.start + i + j + 1, T, rows)


@triton.jit(do_not_specialize=["T", "rows"])
def convolution_kernel(x, y, v, T, rows, width, W: tl.constexpr, S: tl.constexpr):
    """y ``[rows, width]`` from x ``[rows, width]``, and the values of its first channels, ``v [rows, VALUES, WIDTH]``."""
    start, block = program_of(width, S)
    inner = S.VALUES * S.WIDTH
    if S.VALUES > 0:
        if block * S.HEADS < S.VALUES:
            at = block_of(start, block * (S.HEADS * S.WIDTH), inner, 0, S.WIDTH, S)
            _convolve(x, y, v, at, inner, T, rows, width, W, True, S)
        else:
            at, _ = block_behind(start, block, S)
            _convolve(x, y, v, at, inner, T, rows, width, W, False, S)
    else:
        at = block_of(start, block * (S.HEADS * S.COLUMNS), width, 0, S.COLUMNS, S)
        _convolve(x, y, v, at, inner, T, rows, width, W, False, S)


class Given(NamedTuple):
    """The gradient of a program's results, from its first channel on, and the distance of two tokens."""

    dy: Any
    stride: Any


@triton.jit
def _given(x, given, token, at, there, VALUES: tl.constexpr, WHOLE: tl.constexpr, S: tl.constexpr):
    """The gradient of a token's result, or of its values, then the step and the skip's gradient, as they are in memory."""
    raw = (load_token(given.dy + token * given.stride + at.columns, at.inside, there, WHOLE),)
    if VALUES:
        raw = raw + (load_token(x.step + token * S.VALUES + at.heads, at.there, there, WHOLE),)
        raw = raw + (load_token(x.dskip + token * x.stride_dskip + at.channels, at.inside, there, WHOLE),)
    return raw


@triton.jit
def _gradient(raw, window, taps, constant, scale, W: tl.constexpr, VALUES: tl.constexpr):
    """(Gradient of the sum over the taps, gradient of the step ``[HEADS]``) of a token."""
    total = sum_of(taps, constant, window, W)
    opening = sigmoid(total)
    dy = raw[0].to(tl.float32)
    dstep = dy
    if VALUES:
        dstep = tl.sum(dy * (total * opening), 1)
        dy = dy * raw[1][:, None] + raw[2].to(tl.float32) * scale
    return dy * silu_slope(total, opening), dstep


@triton.jit
def _passed_back(gradient, grads, taps, here, masks: tl.constexpr, W: tl.constexpr):
    """Gradients of a token and of the W - 1 before it, the last of them complete. ``masks``: a token that many tokens back, or
    more, may belong to another sequence, and then gets nothing.
    """
    longer = (taps[0] * gradient,)
    for lag in tl.static_range(1, W):
        share = gradient
        if lag >= masks:
            share = tl.where(here >= lag, gradient, 0.0)
        longer = longer + (grads[lag - 1] + taps[lag] * share,)
    return longer


@triton.jit
def _differentiate(  # 14 parameters: those of the kernels that call it
    x,
    given,
    dx,
    dstep,
    dweight,
    dbias,
    stride_dx,
    at,
    T,
    rows,
    width,
    W: tl.constexpr,
    VALUES: tl.constexpr,
    S: tl.constexpr,
):
    """The gradients of a program: of its own tokens, and through W - 1 tokens behind them, whose taps reach back."""
    taps, constant = taps_of(x, at, W)
    here = place_of(x.place, at.start, T, rows)
    past = past_of(x, at, here, W)
    end = tl.minimum(at.start + S.TOKENS, rows)
    zero = tl.zeros(at.channels.shape, tl.float32)
    scale = zero
    if VALUES:
        scale += tl.load(x.skip_scale + at.heads, mask=at.there, other=0.0).to(tl.float32)[:, None]
    grads, sums = (), (zero,)  # for the W - 1 tokens before this one, the nearest first; for bias and taps
    for _ in tl.static_range(1, W):
        grads = grads + (zero,)
    for _ in tl.static_range(W):
        sums = sums + (zero,)
    for i in range(0, S.TOKENS, S.AHEAD):
        first = (at.start + i).to(tl.int64)
        loaded, raws = (), ()
        for j in tl.static_range(S.AHEAD):
            there = first + j < rows
            loaded = loaded + (load_token(x.x + (first + j) * x.stride_x + at.channels, at.inside, there, S.WHOLE),)
            raws = raws + (_given(x, given, first + j, at, there, VALUES, S.WHOLE, S),)
        for j in tl.static_range(S.AHEAD):
            token = first + j
            window = of_sequence(loaded[j].to(tl.float32), past, here, j, W, S)
            gradient, of_step = _gradient(raws[j], window, taps, constant, scale, W, VALUES)
            if VALUES:
                store_token(dstep + token * S.VALUES + at.heads, of_step, at.there, token < rows, S.WHOLE)
            if not S.WHOLE:
                gradient = tl.where(token < rows, gradient, 0.0)
            added = (sums[0] + gradient,)
            for lag in tl.static_range(W):
                added = added + (sums[lag + 1] + gradient * window[lag],)
            longer = _passed_back(gradient, grads, taps, here, masks_of(j, S), W)
            complete = token - (W - 1)
            own = (complete >= at.start) & (complete < end)
            store_token(dx + complete * stride_dx + at.channels, longer[W - 1], at.inside, own, S.WHOLE and j >= W - 1)
            past, grads, sums = window[: W - 1], longer[: W - 1], added
            if S.ALIGNED < S.TOKENS:
                here = next_place(here, x.place, at.start + i + j + 1, T, rows)
    if S.ALIGNED >= S.TOKENS:
        here = place_of(x.place, at.start + S.TOKENS, T, rows)
    for j in tl.static_range(W - 1):
        token = (at.start + S.TOKENS + j).to(tl.int64)
        there = (token < rows) & (here > j)  # and of the sequence of a token of the span
        now = load_token(x.x + token * x.stride_x + at.channels, at.inside, there, False).to(tl.float32)
        window = (now,) + past
        raw = _given(x, given, token, at, there, VALUES, False, S)
        gradient, _ = _gradient(raw, window, taps, constant, scale, W, VALUES)
        longer = _passed_back(tl.where(there, gradient, 0.0), grads, taps, here, masks_of(j, S), W)
        complete = token - (W - 1)
        own = (complete >= at.start) & (complete < end)
        store_token(dx + complete * stride_dx + at.channels, longer[W - 1], at.inside, own, False)
        past, grads = window[: W - 1], longer[: W - 1]
        here = next_place(here, x.place, at.start + S.TOKENS + j + 1, T, rows)
    span = (at.start // S.TOKENS).to(tl.int64)
    for lag in tl.static_range(W):
        tl.store(dweight + (span * width + at.channels) * W + (W - 1 - lag), sums[lag + 1], mask=at.inside)
    if dbias is not None:
        tl.store(dbias + span * width + at.channels, sums[0], mask=at.inside)


@triton.jit(do_not_specialize=["T", "rows"])
def convolution_grads_kernel(x, dx, dstep, dweight, dbias, stride_dx, T, rows, width, W: tl.constexpr, S: tl.constexpr):
    """dx ``[rows, width]``, the gradients of the steps ``dstep [rows, VALUES]``, and for each span those of the weights,
    ``dweight [spans, width, W]`` and ``dbias [spans, width]``.
    """
    start, block = program_of(width, S)
    if S.VALUES > 0:
        if block * S.HEADS < S.VALUES:
            at = block_of(start, block * (S.HEADS * S.WIDTH), S.VALUES * S.WIDTH, 0, S.WIDTH, S)
            _differentiate(
                x, Given(x.dy, x.stride_dy), dx, dstep, dweight, dbias, stride_dx, at, T, rows, width, W, True, S
            )
        else:
            at, second = block_behind(start, block, S)
            dy = x.dfirst
            if second:
                dy = x.dsecond
            _differentiate(x, Given(dy, S.KEYS), dx, dstep, dweight, dbias, stride_dx, at, T, rows, width, W, False, S)
    else:
        at = block_of(start, block * (S.HEADS * S.COLUMNS), width, 0, S.COLUMNS, S)
        _differentiate(
            x, Given(x.dy, x.stride_dy), dx, dstep, dweight, dbias, stride_dx, at, T, rows, width, W, False, S
        )


def _sizes(
    x: Tensor, weight: Tensor, place: Tensor | None, ahead: int, heads: int = 0, columns: int = 0
) -> tuple[dict, int]:
    """(Constants, programs) of a launch, with heads that have values of ``columns`` channels, or with 0 heads."""
    batch, length, width = x.shape
    rows, wide = batch * length, padded(columns) if heads else CHANNELS
    parts, keys = max(CHANNELS // wide, 1), (width - heads * columns) // 2 if heads else 0
    blocks = cdiv(heads, parts) + 2 * cdiv(keys, parts * wide) if heads else cdiv(width, wide)
    whole = heads % parts == 0 and wide == columns and keys % (parts * wide) == 0 if heads else width % wide == 0
    aligned = 1 if place is not None else next((n for n in (SPAN, ahead) if length % n == 0), 1)
    span = SPAN, ahead, parts, wide, columns if heads else wide, aligned, whole and rows % SPAN == 0, heads, keys
    sizes = dict(W=weight.shape[1], S=constants(Span, *span), num_warps=max(parts * wide // (32 * THREAD), 1))
    return sizes, cdiv(rows, SPAN) * blocks


def _launch(
    kernel, x: Tensor, dy: tuple, weight: Tensor, bias, place, others: tuple, made: tuple, sizes: tuple
) -> None:
    """A kernel whose programs have a span of tokens and a block of channels."""
    batch, length, width = x.shape
    options, programs = sizes
    if programs:
        inputs = Inputs(*with_strides(x, *dy), weight.contiguous(), bias, place, *others)
        cap = registers(REGISTERS) if kernel is convolution_grads_kernel else {}
        launching.launch(kernel, programs, inputs, *made, length, batch * length, width, **options, **cap)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor | None) -> Tensor:
    """y ``[B, T, channels]``, contiguous, in the dtype of x.

    Args:
        x: ``[B, T, channels]``, at most 32 bits. weight: ``[channels, W]``, W <= 7. bias: ``[channels]`` or None.
        place: int32 ``[T]``, for packed sequences (B = 1): how many tokens of its sequence come before each token. None
        stands for B sequences of T tokens.
    """
    y, sizes = scratch_like(x), _sizes(x, weight, place, AHEAD)
    _launch(convolution_kernel, x, (None, None), weight, bias, place, (), (y, None), sizes)
    return y


def with_values(
    x: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor | None, step: Tensor, columns: int
) -> tuple[Tensor, Tensor]:
    """y of ``forward``, and v ``[B, T, H, columns]``, its first channels times the step ``[B, T, H]`` of their head."""
    y, v = scratch_like(x), launching.scratch((*step.shape, columns), x.dtype, x.device)
    sizes = _sizes(x, weight, place, AHEAD, step.shape[2], columns)
    _launch(convolution_kernel, x, (None, None), weight, bias, place, (step,), (y, v), sizes)
    return y, v


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, dweight, dbias) in the dtypes of x, weight and bias; arguments as in ``forward``. The same bits on every run."""
    dx, sizes = scratch_like(x), _sizes(x, weight, place, GRADS_AHEAD)
    partial = _partial(x, weight, bias)
    _launch(convolution_grads_kernel, x, (dy, None), weight, bias, place, (), (dx, None, *partial, dx.stride(1)), sizes)
    return dx, *_of_spans(partial, weight, bias)


def backward_with_values(
    dv: Tensor,
    dskip: Tensor,
    dfirst: Tensor,
    dsecond: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    place: Tensor | None,
    step: Tensor,
    skip_scale: Tensor,
    into: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dstep ``[B, T, H]``, float32, dweight, dbias) from gradients of all that is made of y; dx is written into ``into``.

    Args:
        dv: ``[B, T, H, V]``, of the values. dskip: ``[B, T, H·V]``: times skip_scale ``[H]`` it is a gradient of the first
        channels. dfirst, dsecond: ``[B, T, G, K]``, of the two halves of the others. The other arguments as in ``with_values``.
    """
    dv, heads, columns = dv.flatten(2), *dv.shape[2:]
    sizes = _sizes(x, weight, place, GRADS_AHEAD, heads, columns)
    partial, dstep = _partial(x, weight, bias), launching.scratch(tuple(step.shape), torch.float32, x.device)
    others = step, skip_scale.contiguous(), dfirst.contiguous(), dsecond.contiguous()
    made = into, dstep, *partial, into.stride(1)
    _launch(convolution_grads_kernel, x, (dv, dskip), weight, bias, place, others, made, sizes)
    return dstep, *_of_spans(partial, weight, bias)


def _partial(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
    """Memory for the gradients of weight and bias by span."""
    spans = cdiv(x.shape[0] * x.shape[1], SPAN)
    return [
        None if y is None else launching.scratch((spans, *y.shape), torch.float32, x.device) for y in (weight, bias)
    ]


def _of_spans(partial: list[Tensor | None], *weights: Tensor | None) -> list[Tensor | None]:
    """The gradients of weight and bias."""
    pairs = zip(partial, weights, strict=True)
    return [None if sums is None or y is None else sums.sum(0).to(y.dtype) for sums, y in pairs]
