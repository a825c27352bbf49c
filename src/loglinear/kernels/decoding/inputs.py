"""INPUTS of a mixer's step: the short convolution against its state, the gates and λ, in one launch.

The kernel reads the rows of the projections where they lie and writes the inputs of the step kernels. The programs of one row
share no output: each owns some channels of the convolution (with their places in its state), some heads, or some λ. All
arithmetic is float32. It rounds where the plain code of the mixers rounds, except inside the convolution, which rounds
like its own kernel.

Legend: N channels of the convolution, of which the first SCALED are v still to be multiplied by the time step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.decoding.host import row_stride
from loglinear.kernels.decoding.open_chunk import held_row
from loglinear.kernels.pointwise.functions import softplus
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import constants, hash_of
from loglinear.kernels.tree.dependent import dependent_launch, launch_dependents, wait
from loglinear.kernels.tree.problem import cdiv

BLOCK, WARPS = 256, 4  # numbers that a program owns


class Projections(NamedTuple):
    """The inputs of a step and its parameters; None where absent. The strides are the distances of two tokens."""

    projected: Any
    dl: Any
    tail: Any  # [rows, W - 1, N]
    weight: Any  # [N, W]
    bias: Any
    dt_bias: Any
    A_log: Any
    level_weights: Any  # [H, L]
    rows: Any
    stride: Any
    stride_dl: Any
    stride_tail: Any


class Streams(NamedTuple):
    """The results of a step; None where absent."""

    mixed: Any  # [B, T, N]
    v: Any  # [B, T, SCALED]
    g: Any
    beta: Any
    level_scales: Any  # [B, T, H, L]


class Columns(NamedTuple):
    """Sizes of a launch: first columns of ``projected``, letters of the legend, W taps, padded KEEP to keep, OFFSET of λ."""

    CONV: Any
    RATE: Any
    BETA: Any
    SCALED: Any
    N: Any
    H: Any
    L: Any
    W: Any
    KEEP: Any
    OFFSET: Any
    BLOCK: Any
    __hash__ = hash_of


@triton.jit
def time_steps(rates, dt_bias, heads, inside):
    """``softplus(rate + bias)`` of some heads."""
    rate = tl.load(rates + heads, mask=inside, other=0.0).to(tl.float32)
    return softplus(rate + tl.load(dt_bias + heads, mask=inside, other=0.0).to(tl.float32))


@triton.jit
def convolve(x, y, row, channels, T, S: tl.constexpr):
    """Outputs of some channels of a row for T tokens, scaled ones too, and then their next tail.

    A token before the call is read from the tail.
    """
    token = row * T
    projected = x.projected + token * x.stride
    given, rates = projected + S.CONV, projected + S.RATE
    tail = x.tail + held_row(x.rows, row) * x.stride_tail
    mixed = y.mixed + token * S.N
    v = y.v
    if S.SCALED > 0:
        v += token * S.SCALED
    inside = channels < S.N
    for t in range(T):
        total = tl.zeros([channels.shape[0]], tl.float32)
        if x.bias is not None:
            total += tl.load(x.bias + channels, mask=inside, other=0.0).to(tl.float32)
        for lag in tl.static_range(S.W):
            tap = tl.load(x.weight + channels * S.W + (S.W - 1 - lag), mask=inside, other=0.0).to(tl.float32)
            from_tail = tail + (S.W - 1 + t - lag) * S.N + channels
            source = tl.where(t >= lag, given + (t - lag) * x.stride + channels, from_tail)
            total += tap * tl.load(source, mask=inside, other=0.0).to(tl.float32)
        out = (total * tl.sigmoid(total)).to(mixed.dtype.element_ty)
        tl.store(mixed + t * S.N + channels, out, mask=inside)
        if S.SCALED > 0:
            part = channels < S.SCALED
            step = time_steps(rates + t * x.stride, x.dt_bias, channels // (S.SCALED // S.H), part)
            tl.store(v + t * S.SCALED + channels, (out.to(tl.float32) * step).to(v.dtype.element_ty), mask=part)
    if S.W > 1:
        rows = tl.arange(0, S.KEEP)
        token = rows + T - (S.W - 1)
        from_call = given + (token[:, None] * x.stride + channels[None, :])
        from_tail = tail + ((rows + T)[:, None] * S.N + channels[None, :])
        valid = (rows < S.W - 1)[:, None] & inside[None, :]
        kept = tl.load(tl.where((token >= 0)[:, None], from_call, from_tail), mask=valid, other=0.0)
        tl.debug_barrier()  # another thread may still have to read the numbers that are overwritten
        tl.store(tail + (rows[:, None] * S.N + channels[None, :]), kept, mask=valid)


@triton.jit(do_not_specialize=["T"])
def step_inputs_kernel(x, y, T, S: tl.constexpr, EARLY: tl.constexpr):
    """Grid: rows x (blocks of channels, then of heads, then of λ). float32: everything.

    Races: the state of a channel is read and written by the one program that owns the channel.
    """
    if EARLY:
        launch_dependents()
        wait()
    CHANNEL_BLOCKS: tl.constexpr = (S.N + S.BLOCK - 1) // S.BLOCK
    HEAD_BLOCKS: tl.constexpr = (S.H + S.BLOCK - 1) // S.BLOCK if S.RATE >= 0 else 0
    PARTS: tl.constexpr = CHANNEL_BLOCKS + HEAD_BLOCKS + (S.H * S.L + S.BLOCK - 1) // S.BLOCK
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    token = row * T
    projected = x.projected + token * x.stride
    if S.N > 0 and part < CHANNEL_BLOCKS:
        convolve(x, y, row, part * S.BLOCK + tl.arange(0, S.BLOCK), T, S)
    elif S.RATE >= 0 and part < CHANNEL_BLOCKS + HEAD_BLOCKS:
        heads = (part - CHANNEL_BLOCKS) * S.BLOCK + tl.arange(0, S.BLOCK)
        inside = heads < S.H
        speed = -tl.exp(tl.load(x.A_log + heads, mask=inside, other=0.0).to(tl.float32))
        for t in range(T):
            row_of_token = projected + t * x.stride
            step = time_steps(row_of_token + S.RATE, x.dt_bias, heads, inside)
            tl.store(y.g + (token + t) * S.H + heads, speed * step, mask=inside)
            if S.BETA >= 0:
                strength = tl.load(row_of_token + S.BETA + heads, mask=inside, other=0.0).to(tl.float32)
                tl.store(y.beta + (token + t) * S.H + heads, tl.sigmoid(strength), mask=inside)
    else:
        if S.L > 0:
            places = (part - CHANNEL_BLOCKS - HEAD_BLOCKS) * S.BLOCK + tl.arange(0, S.BLOCK)
            inside = places < S.H * S.L
            factor = tl.load(x.level_weights + places, mask=inside, other=0.0).to(tl.float32)
            for t in range(T):
                dl = tl.load(x.dl + (token + t) * x.stride_dl + places, mask=inside, other=0.0).to(tl.float32)
                scale = softplus(factor * dl + S.OFFSET).to(y.level_scales.dtype.element_ty)
                tl.store(y.level_scales + (token + t) * (S.H * S.L) + places, scale, mask=inside)


def step_inputs(
    projected: Tensor,
    dl: Tensor | None,
    tail: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dt_bias: Tensor | None,
    A_log: Tensor | None,
    level_weights: Tensor | None,
    columns: tuple[int, int, int, int],
    offset: float = 0.0,
    rows: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """(mixed, v, g, β, λ) of T tokens of every row; ``tail`` takes the tokens in.

    Args:
        projected: ``[B, T, ...]``, contiguous, at most 32 bits. dl: ``[B, T, H·L]``, rows any one distance apart, or None.
        tail: ``[rows, W - 1, N]``, each row contiguous, dtype of projected. weight: ``[N, W]``, or None: no convolution. bias:
            ``[N]`` or None. dt_bias, A_log: ``[H]``, None without time steps. level_weights: ``[H, L]``, None as dl.
        columns: the first column in ``projected`` of the convolution's inputs, of the time steps (-1: neither they nor β are
            asked for) and of β (-1: there is no β); then how many outputs of the convolution, from the first on, are v to be
            multiplied by the time step.
        offset: of λ, ``softplus(level_weights · dl + offset)``.
        rows: int64 ``[B]``, the row of ``tail`` for each row of projected; None: they are the same.

    Returns:
        mixed ``[B, T, N]`` after the convolution, v ``[B, T, columns[3]]`` (None if that is 0), g and β float32
        ``[B, T, H]``, λ ``[B, T, H, L]`` in the dtype of dl; None for what is not asked for.
    """
    if weight is None and dl is None and columns[1] < 0:
        return (None,) * 5
    given = [projected, dl, tail, weight, bias, dt_bias, A_log, level_weights, rows]
    return launching.replay(run_step_inputs, given, columns, offset)


def run_step_inputs(inputs: list, columns: tuple[int, int, int, int], offset: float) -> tuple[Tensor | None, ...]:
    """The launch of ``step_inputs``."""
    projected, dl, tail, weight, *_, A_log, level_weights, _ = inputs
    (batch, length, width), device = projected.shape, projected.device
    (channels, taps), (_, rate, strength, scaled) = (0, 0) if weight is None else weight.shape, columns
    levels, stride_dl = (0, 0) if dl is None else (level_weights.shape[1], row_stride(dl.shape, dl.stride()))
    heads = next((x.shape[0] for x in (A_log, level_weights) if x is not None), 0)
    timed = heads if rate >= 0 else 0
    mixed = launching.scratch((batch, length, channels), projected.dtype, device) if channels else None
    v = launching.scratch((batch, length, scaled), projected.dtype, device) if scaled else None
    g = launching.scratch((batch, length, heads), torch.float32, device) if timed else None
    beta = launching.scratch((batch, length, heads), torch.float32, device) if strength >= 0 else None
    scales = None if dl is None else launching.scratch((batch, length, heads, levels), dl.dtype, device)
    made = Streams(mixed, v, g, beta, scales)
    programs = batch * (cdiv(channels, BLOCK) + cdiv(timed, BLOCK) + cdiv(heads * levels, BLOCK))
    if programs and length:
        keep = triton.next_power_of_2(max(taps - 1, 1))
        S = constants(Columns, *columns, channels, heads, levels, taps, keep, offset, BLOCK)
        given = Projections(*inputs, width, stride_dl, tail.stride(0))
        launching.launch(
            step_inputs_kernel, programs, given, made, length, S=S, num_warps=WARPS, **dependent_launch(device)
        )
    return tuple(made)
