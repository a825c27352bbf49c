"""SHORT CONVOLUTION: causal, depthwise, a few taps, then SiLU; forward, and the backward in one pass over memory.

Special about this file: nothing is kept but the inputs. A backward program computes the sums before the SiLU again for its own
tokens and for the W - 1 after them; the shifted tiles that this reads come from the cache, not from memory.

Legend: rows are the tokens of all sequences, one behind the other; ``place`` is how many tokens of its sequence stand before
one; lag j is the tap that reads j tokens back, weight column W - 1 - j.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels import common

TOKENS, CHANNELS, WARPS = 16, 64, 4  # of a tile
TILES = 16  # along the tokens, of one backward program


@triton.jit
def _places(place, tokens, T, rows, PACKED: tl.constexpr):
    if PACKED:
        return tl.load(place + tokens, mask=(tokens >= 0) & (tokens < rows), other=-1)
    return tl.where((tokens >= 0) & (tokens < rows), tokens % T, -1)


@triton.jit
def _sums(x, stride, weight, bias, tokens, place, channels, inside, W: tl.constexpr, BIAS: tl.constexpr):
    """What goes into the SiLU at ``tokens``, float32; a token outside (place -1) reads nothing."""
    total = tl.zeros([tokens.shape[0], channels.shape[0]], tl.float32)
    if BIAS:
        total += tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
    for lag in tl.static_range(W):
        tap = tl.load(weight + channels * W + (W - 1 - lag), mask=inside, other=0.0).to(tl.float32)
        pointers = x + (tokens - lag).to(tl.int64)[:, None] * stride + channels[None, :]
        total += tap[None, :] * tl.load(pointers, mask=(place >= lag)[:, None] & inside[None, :], other=0.0).to(
            tl.float32
        )
    return total


@triton.jit(do_not_specialize=["T", "rows"])
def convolution_kernel(
    x, weight, bias, place, y, stride, T, rows, width,
    W: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y ``[rows, width]`` from x ``[rows, width]`` of row stride ``stride``. Grid: blocks of rows x blocks of channels."""
    blocks = tl.cdiv(width, CHANNELS)
    tokens = (tl.program_id(0) // blocks) * TOKENS + tl.arange(0, TOKENS)
    channels = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channels < width
    place_here = _places(place, tokens, T, rows, PACKED)
    total = _sums(x, stride, weight, bias, tokens, place_here, channels, inside, W, BIAS)
    pointers = y + tokens.to(tl.int64)[:, None] * width + channels[None, :]
    tl.store(
        pointers, (total * tl.sigmoid(total)).to(y.dtype.element_ty), mask=(place_here >= 0)[:, None] & inside[None, :]
    )


@triton.jit(do_not_specialize=["T", "rows"])
def convolution_grads_kernel(
    dy, x, weight, bias, place, dx, partial, dy_stride, stride, T, rows, width,
    W: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dx ``[rows, width]``, and for a program's tokens the sums ``partial [programs, W + 1, width]`` (taps by lag, bias)."""
    blocks = tl.cdiv(width, CHANNELS)
    part = tl.program_id(0) // blocks
    channels = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channels < width
    lags = tl.arange(0, 8)  # W + 1 <= 8 rows of ``partial``
    sums = tl.zeros([8, CHANNELS], tl.float32)
    for i in range(TILES):
        tokens = (part * TILES + i) * TOKENS + tl.arange(0, TOKENS)
        place_here = _places(place, tokens, T, rows, PACKED)
        total = tl.zeros([TOKENS, CHANNELS], tl.float32)
        for lag in tl.static_range(W):
            later = tokens + lag
            place_later = _places(place, later, T, rows, PACKED)
            before = _sums(x, stride, weight, bias, later, place_later, channels, inside, W, BIAS)
            gate = tl.sigmoid(before)
            pointers = dy + later.to(tl.int64)[:, None] * dy_stride + channels[None, :]
            # A token less than ``lag`` after its sequence's start does not read this one.
            gradient = tl.load(pointers, mask=(place_later >= lag)[:, None] & inside[None, :], other=0.0).to(tl.float32)
            gradient *= common.silu_slope(before, gate)
            tap = tl.load(weight + channels * W + (W - 1 - lag), mask=inside, other=0.0).to(tl.float32)
            total += tap[None, :] * gradient
            if lag == 0:
                sums += tl.where((lags == W)[:, None], tl.sum(gradient, 0)[None, :], 0.0)
                for back in tl.static_range(W):
                    pointers = x + (tokens - back).to(tl.int64)[:, None] * stride + channels[None, :]
                    past = tl.load(pointers, mask=(place_here >= back)[:, None] & inside[None, :], other=0.0)
                    product = tl.sum(gradient * past.to(tl.float32), 0)
                    sums += tl.where((lags == back)[:, None], product[None, :], 0.0)
        pointers = dx + tokens.to(tl.int64)[:, None] * width + channels[None, :]
        tl.store(pointers, total.to(dx.dtype.element_ty), mask=(place_here >= 0)[:, None] & inside[None, :])
    pointers = partial + part.to(tl.int64) * (W + 1) * width + lags[:, None] * width + channels[None, :]
    tl.store(pointers, sums, mask=(lags <= W)[:, None] & inside[None, :])


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor | None) -> Tensor:
    """y ``[B, T, channels]``, contiguous, in the dtype of x.

    Args:
        x: ``[B, T, channels]``, at most 32 bits. weight: ``[channels, W]``, W <= 7. bias: ``[channels]`` or None.
        place: int32 ``[T]`` of packed sequences (B = 1): tokens of its sequence before each; None: B sequences of T.
    """
    x = _rows(x)
    (batch, length, width), taps = x.shape, weight.shape[1]
    y = common.scratch(tuple(x.shape), x.dtype, x.device)
    programs = -(-batch * length // TOKENS) * -(-width // CHANNELS)
    if programs:
        common.launch(
            convolution_kernel, programs, x, weight.contiguous(), bias, place, y, x.stride(1), length, batch * length, width,
            W=taps, BIAS=bias is not None, PACKED=place is not None, TOKENS=TOKENS, CHANNELS=CHANNELS, num_warps=WARPS,
        )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, dweight, dbias) in the dtypes of x, weight and bias; arguments as in ``forward``. The same bits on every run."""
    x, dy = _rows(x), _rows(dy)
    (batch, length, width), taps = x.shape, weight.shape[1]
    dx = common.scratch(tuple(x.shape), x.dtype, x.device)
    parts = -(-batch * length // (TOKENS * TILES))
    partial = common.scratch((parts, taps + 1, width), torch.float32, x.device)
    programs = parts * -(-width // CHANNELS)
    if programs:
        common.launch(
            convolution_grads_kernel, programs, dy, x, weight.contiguous(), bias, place, dx, partial,
            dy.stride(1), x.stride(1), length, batch * length, width,
            W=taps, BIAS=bias is not None, PACKED=place is not None,
            TOKENS=TOKENS, CHANNELS=CHANNELS, TILES=TILES, num_warps=WARPS,
        )  # fmt: skip
    sums = partial.sum(0)
    dweight = sums[:taps].flip(0).T.to(weight.dtype).contiguous()
    return dx, dweight, None if bias is None else sums[taps].to(bias.dtype)


def _rows(x: Tensor) -> Tensor:
    """x with neighbouring channels side by side and one distance between all rows; copied only if it is not so."""
    regular = x.stride(2) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return x if regular else x.contiguous()
