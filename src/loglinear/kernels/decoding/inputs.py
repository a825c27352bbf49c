"""INPUTS of a mixer's step: the short convolution against its state, the gates and λ, in one launch.

The kernel reads the rows of the projections where they lie and writes the inputs of the step kernels. The programs of one row
share no output: each owns some channels of the convolution (with their places in its state), some heads, or some λ. All
arithmetic is float32. It rounds where the plain code of the mixers rounds, except inside the convolution, which rounds
like its own kernel.

Legend: N channels of the convolution, of which the first SCALED are v still to be multiplied by the time step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.decoding.host import row_stride
from loglinear.kernels.pointwise.functions import softplus
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.problem import cdiv
from loglinear.kernels.tree.replay import replay

BLOCK, WARPS = 256, 4  # numbers that a program owns


@triton.jit
def time_steps(rates, dt_bias, heads, inside):
    """``softplus(rate + bias)`` of some heads."""
    rate = tl.load(rates + heads, mask=inside, other=0.0).to(tl.float32)
    return softplus(rate + tl.load(dt_bias + heads, mask=inside, other=0.0).to(tl.float32))


@triton.jit
def convolve(x, stride, rates, tail, weight, bias, dt_bias, mixed, v, channels, T, N: tl.constexpr, H: tl.constexpr,
             SCALED: tl.constexpr, W: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """Outputs of some channels for T tokens, scaled ones too, and then their next tail.

    x and rates point at the row's first token, tail ``[W - 1, N]`` at the row; a token before the call is read from the tail.
    """
    inside = channels < N
    for t in range(T):
        total = tl.zeros([channels.shape[0]], tl.float32)
        if BIAS:
            total += tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
        for lag in tl.static_range(W):
            tap = tl.load(weight + channels * W + (W - 1 - lag), mask=inside, other=0.0).to(tl.float32)
            source = tl.where(t >= lag, x + (t - lag) * stride + channels, tail + (W - 1 + t - lag) * N + channels)
            total += tap * tl.load(source, mask=inside, other=0.0).to(tl.float32)
        y = (total * tl.sigmoid(total)).to(mixed.dtype.element_ty)
        tl.store(mixed + t * N + channels, y, mask=inside)
        if SCALED > 0:
            part = channels < SCALED
            step = time_steps(rates + t * stride, dt_bias, channels // (SCALED // H), part)
            tl.store(v + t * SCALED + channels, (y.to(tl.float32) * step).to(v.dtype.element_ty), mask=part)
    if W > 1:
        rows = tl.arange(0, KEEP)
        token = rows + T - (W - 1)
        from_call = x + (token[:, None] * stride + channels[None, :])
        from_tail = tail + ((rows + T)[:, None] * N + channels[None, :])
        valid = (rows < W - 1)[:, None] & inside[None, :]
        kept = tl.load(tl.where((token >= 0)[:, None], from_call, from_tail), mask=valid, other=0.0)
        tl.debug_barrier()  # another thread may still have to read the numbers that are overwritten
        tl.store(tail + (rows[:, None] * N + channels[None, :]), kept, mask=valid)


@triton.jit(do_not_specialize=["T"])
def step_inputs_kernel(
    projected,
    dl,
    tail,  # [B, W - 1, N]
    weight,  # [N, W]
    bias,
    dt_bias,
    A_log,
    level_weights,  # [H, L]
    mixed,  # [B, T, N]
    v,  # [B, T, SCALED]
    g,
    beta,
    level_scales,  # [B, T, H, L]
    T,
    stride,
    stride_l,
    CONV: tl.constexpr,  # first columns of ``projected``
    RATE: tl.constexpr,
    BETA: tl.constexpr,
    SCALED: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    W: tl.constexpr,
    KEEP: tl.constexpr,
    BIAS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: rows x (blocks of channels, then of heads, then of λ). float32: everything.

    Races: the state of a channel is read and written by the one program that owns the channel.
    """
    CHANNEL_BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    HEAD_BLOCKS: tl.constexpr = (H + BLOCK - 1) // BLOCK
    PARTS: tl.constexpr = CHANNEL_BLOCKS + HEAD_BLOCKS + (H * L + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    token = row * T
    projected += token * stride
    if part < CHANNEL_BLOCKS:
        channels = part * BLOCK + tl.arange(0, BLOCK)
        if SCALED > 0:
            v += token * SCALED
        convolve(projected + CONV, stride, projected + RATE, tail + row * ((W - 1) * N), weight, bias, dt_bias,
                 mixed + token * N, v, channels, T, N, H, SCALED, W, KEEP, BIAS)  # fmt: skip
    elif part < CHANNEL_BLOCKS + HEAD_BLOCKS:
        heads = (part - CHANNEL_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        inside = heads < H
        speed = -tl.exp(tl.load(A_log + heads, mask=inside, other=0.0).to(tl.float32))
        for t in range(T):
            row_of_token = projected + t * stride
            step = time_steps(row_of_token + RATE, dt_bias, heads, inside)
            tl.store(g + (token + t) * H + heads, speed * step, mask=inside)
            if BETA >= 0:
                strength = tl.load(row_of_token + BETA + heads, mask=inside, other=0.0).to(tl.float32)
                tl.store(beta + (token + t) * H + heads, tl.sigmoid(strength), mask=inside)
    else:
        if L > 0:
            places = (part - CHANNEL_BLOCKS - HEAD_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
            inside = places < H * L
            factor = tl.load(level_weights + places, mask=inside, other=0.0).to(tl.float32)
            for t in range(T):
                x = tl.load(dl + (token + t) * stride_l + places, mask=inside, other=0.0).to(tl.float32)
                scale = softplus(factor * x + OFFSET).to(level_scales.dtype.element_ty)
                tl.store(level_scales + (token + t) * (H * L) + places, scale, mask=inside)


def step_inputs(
    projected: Tensor,
    dl: Tensor | None,
    tail: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    level_weights: Tensor | None,
    columns: tuple[int, int, int, int],
    offset: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """(mixed, v, g, β, λ) of T tokens of every row; ``tail`` takes the tokens in.

    Args:
        projected: ``[B, T, ...]``, contiguous, at most 32 bits. dl: ``[B, T, H·L]``, rows any one distance apart, or None.
        tail: ``[B, W - 1, N]``, contiguous, dtype of projected. weight: ``[N, W]``. bias: ``[N]`` or None.
        dt_bias, A_log: ``[H]``. level_weights: ``[H, L]``, None as dl.
        columns: the first column in ``projected`` of the convolution's inputs, of the time steps and of β (-1: there is no
            β); then how many outputs of the convolution, from the first on, are v to be multiplied by the time step.
        offset: of λ, ``softplus(level_weights · dl + offset)``.

    Returns:
        mixed ``[B, T, N]`` after the convolution, v ``[B, T, columns[3]]`` (None if that is 0), g and β float32
        ``[B, T, H]``, λ ``[B, T, H, L]`` in the dtype of dl.
    """
    given = [projected, dl, tail, weight, bias, dt_bias, A_log, level_weights]
    return replay(run_step_inputs, given, columns, offset)  # type: ignore[return-value]


def run_step_inputs(inputs: list, columns: tuple[int, int, int, int], offset: float) -> tuple[Tensor | None, ...]:
    """The launch of ``step_inputs``."""
    projected, dl, _, weight, bias, _, A_log, level_weights = inputs
    conv, rate, strength, scaled = columns
    (batch, length, width), device = projected.shape, projected.device
    (channels, taps), heads = weight.shape, A_log.shape[0]
    levels, stride_l = (0, 0) if dl is None else (level_weights.shape[1], row_stride(dl.shape, dl.stride()))
    wide = torch.float32
    mixed = launching.scratch((batch, length, channels), projected.dtype, device)
    v = launching.scratch((batch, length, scaled), projected.dtype, device) if scaled else None
    g = launching.scratch((batch, length, heads), wide, device)
    beta = launching.scratch((batch, length, heads), wide, device) if strength >= 0 else None
    scales = None if dl is None else launching.scratch((batch, length, heads, levels), dl.dtype, device)
    programs = batch * (cdiv(channels, BLOCK) + cdiv(heads, BLOCK) + cdiv(heads * levels, BLOCK))
    if programs and length:
        launching.launch(
            step_inputs_kernel, programs, *inputs, mixed, v, g, beta, scales, length, width, stride_l,
            CONV=conv, RATE=rate, BETA=strength, SCALED=scaled, N=channels, H=heads, L=levels, W=taps,
            KEEP=triton.next_power_of_2(max(taps - 1, 1)), BIAS=bias is not None, OFFSET=offset, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return mixed, v, g, beta, scales
