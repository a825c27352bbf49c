"""STEPS: time steps and decays of all heads of a mixer, where another kernel multiplies values by the steps.

A program takes all heads of some tokens. gates.py has the same formulas for one head, with its values.

Legend: rows are the tokens of all sequences, one behind the other. float32: everything inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.pointwise.functions import softplus
from loglinear.kernels.pointwise.rows import Tile, scratch_like, with_strides
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import constants
from loglinear.kernels.tree.problem import cdiv, padded

NUMBERS = 4096  # of a tile: 16 for each thread


@triton.jit
def _tile(rows, S: tl.constexpr):
    """(Tokens ``[ROWS, 1]``, heads ``[1, COLUMNS]``, which heads and numbers there are) of a program. Grid: blocks of rows."""
    tokens = (tl.program_id(0) * S.ROWS + tl.arange(0, S.ROWS)).to(tl.int64)[:, None]
    heads = tl.arange(0, S.COLUMNS)[None, :]
    there = heads < S.HEADS
    return tokens, heads, there, there & (tokens < rows)


@triton.jit
def _totals(rate, stride_rate, dt_bias, A_log, tokens, heads, there, inside):
    """(rate + bias ``[ROWS, COLUMNS]``, A ``[1, COLUMNS]``)."""
    total = tl.load(rate + tokens * stride_rate + heads, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(dt_bias + heads, mask=there, other=0.0).to(tl.float32)
    return total, tl.exp(tl.load(A_log + heads, mask=there, other=0.0).to(tl.float32))


@triton.jit(do_not_specialize=["rows"])
def steps_kernel(rate, stride_rate, dt_bias, A_log, g, step, rows, S: tl.constexpr):
    """g and step ``[rows, HEADS]``."""
    tokens, heads, there, inside = _tile(rows, S)
    total, A = _totals(rate, stride_rate, dt_bias, A_log, tokens, heads, there, inside)
    opened = softplus(total)
    tl.store(g + tokens * S.HEADS + heads, -A * opened, mask=inside)
    tl.store(step + tokens * S.HEADS + heads, opened, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def steps_grads_kernel(
    rate, stride_rate, dt_bias, A_log, dg, stride_dg, dstep, step, drate, partial, stride_drate, rows, S: tl.constexpr
):
    """drate ``[rows, HEADS]`` and the sums over a program's tokens, ``partial [blocks, 2, HEADS]``, of ddt_bias and dA_log."""
    tokens, heads, there, inside = _tile(rows, S)
    total, A = _totals(rate, stride_rate, dt_bias, A_log, tokens, heads, there, inside)
    dlog = -A * tl.load(dg + tokens * stride_dg + heads, mask=inside, other=0.0).to(tl.float32)
    decay = dlog * tl.load(step + tokens * S.HEADS + heads, mask=inside, other=0.0)
    dtotal = (dlog + tl.load(dstep + tokens * S.HEADS + heads, mask=inside, other=0.0)) * tl.sigmoid(total)
    tl.store(drate + tokens * stride_drate + heads, dtotal.to(drate.dtype.element_ty), mask=inside)
    base = partial + tl.program_id(0).to(tl.int64) * (2 * S.HEADS) + tl.arange(0, S.COLUMNS)
    known = tl.arange(0, S.COLUMNS) < S.HEADS
    tl.store(base, tl.sum(tl.where(inside, dtotal, 0.0), 0), mask=known)
    tl.store(base + S.HEADS, tl.sum(decay, 0), mask=known)


def _sizes(rate: Tensor) -> tuple[int, dict, int]:
    """(Number of rows, constants, programs) of a launch."""
    rows, heads = rate.shape[0] * rate.shape[1], rate.shape[2]
    columns = padded(heads)
    block = max(NUMBERS // columns, 1)
    return rows, dict(S=constants(Tile, block, columns, heads), num_warps=8), cdiv(rows, block)


def forward(rate: Tensor, dt_bias: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor]:
    """(g, step) ``[B, T, H]``, float32, contiguous: ``step = softplus(rate + dt_bias)``, ``g = -e^A_log · step``.

    Args:
        rate: ``[B, T, H]``, at most 32 bits. dt_bias, A_log: ``[H]``.
    """
    rows, sizes, programs = _sizes(rate)
    g, step = scratch_like(rate, torch.float32), scratch_like(rate, torch.float32)
    if programs:
        given = *with_strides(rate), dt_bias.contiguous(), A_log.contiguous()
        launching.launch(steps_kernel, programs, *given, g, step, rows, **sizes)
    return g, step


def backward(
    dg: Tensor, dstep: Tensor, step: Tensor, rate: Tensor, dt_bias: Tensor, A_log: Tensor, into: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of dt_bias and A_log in their dtypes; that of rate is written into ``into``, columns of wider rows.

    dstep: ``[B, T, H]``, contiguous: the step's gradient from elsewhere. step: as ``forward`` has made it. The same bits on
    every run.
    """
    rows, sizes, programs = _sizes(rate)
    partial = launching.scratch((programs, 2, rate.shape[2]), torch.float32, rate.device)
    if programs:
        given = *with_strides(rate), dt_bias.contiguous(), A_log.contiguous(), *with_strides(dg), dstep, step
        launching.launch(steps_grads_kernel, programs, *given, into, partial, into.stride(1), rows, **sizes)
    ddt_bias, dA_log = partial.sum(0)
    return ddt_bias.to(dt_bias.dtype), dA_log.to(A_log.dtype)
