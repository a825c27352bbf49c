"""GATES PER CHANNEL: decay and writing strength of a mixer whose gate has a number for every channel. One kernel each way.

Only the inputs are saved for backward. A program has one head; it writes gradients of shared parameters as partial sums over
its tokens. The legend is that of gates.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.pointwise.functions import softplus
from loglinear.kernels.pointwise.gates import Inputs, columns_of, place_of, store_strength, store_strength_grads
from loglinear.kernels.pointwise.rows import Tile, scratch_like, with_strides
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import constants
from loglinear.kernels.tree.problem import cdiv

TOKENS, COLUMNS = 32, 64  # of a tile


@triton.jit
def _channel_decays(x, tokens, inner, mask, there, head, BOUND: tl.constexpr, DIVISOR: tl.constexpr):
    """(g, its derivative by f, and by A_log) of a tile of channels; ``there``: the columns there are."""
    total = tl.load(x.rate + tokens[:, None] * x.stride_rate + inner, mask=mask, other=0.0).to(tl.float32)
    if x.A_log is None:
        g, slope = softplus(-total) * (-1 / DIVISOR), tl.sigmoid(-total) * (1 / DIVISOR)
        by_log = g
        if BOUND is not None:
            slope = tl.where(g >= BOUND, slope, 0.0)
            g = tl.maximum(g, BOUND)
    else:
        total += tl.load(x.dt_bias + inner, mask=there, other=0.0).to(tl.float32)
        A = tl.exp(tl.load(x.A_log + head).to(tl.float32))
        if BOUND is None:
            g, slope = -A * softplus(total), -A * tl.sigmoid(total)
            by_log = g
        else:
            g = BOUND * tl.sigmoid(A * total)
            slope = A * g * tl.sigmoid(-A * total)
            by_log = slope * total
    return g, slope, by_log


@triton.jit(do_not_specialize=["rows"])
def channel_gates_kernel(x, g, beta, rows, S: tl.constexpr, BOUND: tl.constexpr, DIVISOR: tl.constexpr):
    """g ``[rows, HEADS, WIDTH]``, beta ``[rows, HEADS]``."""
    head, _, tokens, inside = place_of(rows, S)
    store_strength(x, beta, tokens, inside, head, S)
    for first in tl.static_range(0, S.WIDTH, S.COLUMNS):
        inner, mask = columns_of(first, inside, head, S)
        there = (first + tl.arange(0, S.COLUMNS) < S.WIDTH)[None, :]
        value, _, _ = _channel_decays(x, tokens, inner, mask, there, head, BOUND, DIVISOR)
        tl.store(g + tokens[:, None] * (S.HEADS * S.WIDTH) + inner, value, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def channel_gates_grads_kernel(
    x, drate, dstrength, partial, rows, S: tl.constexpr, BOUND: tl.constexpr, DIVISOR: tl.constexpr
):
    """drate ``[rows, HEADS, WIDTH]``, dstrength ``[rows, HEADS]``, and the sums over a program's tokens, ``partial [blocks,
    HEADS * (WIDTH + 1)]``, of ddt_bias and dA_log.
    """
    head, block, tokens, inside = place_of(rows, S)
    partial += block * (S.HEADS * (S.WIDTH + 1))
    decay = tl.zeros([S.ROWS], tl.float32)
    for first in tl.static_range(0, S.WIDTH, S.COLUMNS):
        inner, mask = columns_of(first, inside, head, S)
        there = (first + tl.arange(0, S.COLUMNS) < S.WIDTH)[None, :]
        _, slope, by_log = _channel_decays(x, tokens, inner, mask, there, head, BOUND, DIVISOR)
        dg = tl.load(x.dg + tokens[:, None] * x.stride_dg + inner, mask=mask, other=0.0).to(tl.float32)
        pointers = drate + tokens[:, None] * (S.HEADS * S.WIDTH) + inner
        tl.store(pointers, (dg * slope).to(drate.dtype.element_ty), mask=mask)
        if x.A_log is not None:
            tl.store(partial + inner, tl.sum(dg * slope, 0)[None, :], mask=there)
            decay += tl.sum(dg * by_log, 1)
    if x.A_log is not None:
        tl.store(partial + S.HEADS * S.WIDTH + head, tl.sum(decay, 0))
    store_strength_grads(x, dstrength, tokens, inside, head, S)


def _launch(
    kernel: Any,
    tensors: tuple[Tensor | None, ...],
    dt_bias: Tensor | None,
    A_log: Tensor | None,
    heads: int,
    made: tuple[Any, ...],
    constexprs: dict[str, float | None],
) -> None:
    """Launch a kernel of the gates per channel; ``tensors`` of the bundle's first seven members."""
    batch, length, width = tensors[0].shape  # type: ignore[union-attr]
    if rows := batch * length:
        parameters = (None if y is None else y.contiguous() for y in (dt_bias, A_log))
        inputs = Inputs(*with_strides(*tensors), *parameters)
        S = constants(Tile, TOKENS, COLUMNS, heads, width // heads)
        launching.launch(kernel, cdiv(rows, TOKENS) * heads, inputs, *made, rows, S=S, **constexprs, num_warps=4)


def forward(
    rate: Tensor,
    dt_bias: Tensor | None,
    A_log: Tensor | None,
    strength: Tensor | None,
    heads: int,
    bound: float | None,
    divisor: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """(g, beta) of a gate per channel: ``g = -e^A_log · softplus(rate + dt_bias)``, or with a bound ``g = bound · σ(e^A_log ·
    (rate + dt_bias))``; without A_log and dt_bias ``g = logsigmoid(rate) / divisor``, at least ``bound``.

    Args:
        rate: ``[B, T, H·K]``, strength: ``[B, T, H]`` or None, at most 32 bits. dt_bias: ``[H·K]``, A_log: ``[H]``.

    Returns:
        g ``[B, T, H, K]`` and beta ``[B, T, H] = σ(strength)``, float32, contiguous; None where there is no input.
    """
    batch, length, width = rate.shape
    g = launching.scratch((batch, length, heads, width // heads), torch.float32, rate.device)
    beta = scratch_like(strength, torch.float32)
    tensors, sizes = (rate, None, strength, None, None, None, None), dict(BOUND=bound, DIVISOR=divisor)
    _launch(channel_gates_kernel, tensors, dt_bias, A_log, heads, (g, beta), sizes)
    return g, beta


def backward(
    dg: Tensor,
    dbeta: Tensor | None,
    rate: Tensor,
    dt_bias: Tensor | None,
    A_log: Tensor | None,
    strength: Tensor | None,
    heads: int,
    bound: float | None,
    divisor: float = 1.0,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of rate, dt_bias, A_log and strength in their dtypes, None where there is none. The same bits on every run."""
    width = rate.shape[2]
    drate, dstrength = scratch_like(rate), scratch_like(strength)
    blocks = cdiv(rate.shape[0] * rate.shape[1], TOKENS) if A_log is not None else 0
    partial = launching.scratch((blocks, width + heads), torch.float32, rate.device)
    tensors, sizes = (rate, None, strength, dg, None, None, dbeta), dict(BOUND=bound, DIVISOR=divisor)
    _launch(channel_gates_grads_kernel, tensors, dt_bias, A_log, heads, (drate, dstrength, partial), sizes)
    if dt_bias is None or A_log is None:
        return drate, None, None, dstrength
    ddt_bias, dA_log = partial.sum(0).split([width, heads])
    return drate, ddt_bias.to(dt_bias.dtype), dA_log.to(A_log.dtype), dstrength
