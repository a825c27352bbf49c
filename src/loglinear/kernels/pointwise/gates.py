"""GATES: decay, time step, writing strength and λ of a mixer, from its small projections. One kernel each way.

Only the inputs are saved for backward. A program of the gates has one head, and it also multiplies the values of this head by
the time step. A program writes gradients of shared parameters as partial sums over its tokens.

Legend: rows are the tokens of all sequences, one behind the other; HEADS heads with values, or gates per channel, of WIDTH
columns. float32: everything inside.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.pointwise.functions import softplus
from loglinear.kernels.pointwise.rows import Tile, scratch_like, with_strides
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import constants
from loglinear.kernels.tree.problem import cdiv, token_rows

TOKENS, TOKENS_OF_VALUES = 128, 32  # of a program with one number a token, and of one with values
COLUMNS = 64  # of a tile
SCALE_TOKENS = 32  # of a tile of λ
PROGRAMS = 1024  # of λ's backward, about


class Inputs(NamedTuple):
    """The inputs of the gates, the gradients of g, v, β and of x from elsewhere, and the distance of two tokens of each; None
    where absent.
    """

    rate: Any
    x: Any
    strength: Any
    dg: Any
    dv: Any
    dskip: Any
    dbeta: Any
    stride_rate: Any
    stride_x: Any
    stride_strength: Any
    stride_dg: Any
    stride_dv: Any
    stride_dskip: Any
    stride_dbeta: Any
    dt_bias: Any
    A_log: Any


@triton.jit
def _numbers(x, stride, tokens, inside, head):
    """Numbers ``[tokens]`` of one head."""
    return tl.load(x + tokens * stride + head, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _place(rows, S: tl.constexpr):
    """(head, block of tokens, the tokens, which there are) of a program. Grid: blocks of rows x heads, heads fastest."""
    block = (tl.program_id(0) // S.HEADS).to(tl.int64)
    tokens = block * S.ROWS + tl.arange(0, S.ROWS)
    return tl.program_id(0) % S.HEADS, block, tokens, tokens < rows


@triton.jit
def _rates(x, tokens, inside, head):
    """(rate + bias, time step, A) of one head."""
    total = _numbers(x.rate, x.stride_rate, tokens, inside, head) + tl.load(x.dt_bias + head).to(tl.float32)
    return total, softplus(total), tl.exp(tl.load(x.A_log + head).to(tl.float32))


@triton.jit
def _columns(first, inside, head, S: tl.constexpr):
    """(columns of the values of a head ``[1, COLUMNS]`` among those of all heads, mask ``[tokens, COLUMNS]``)."""
    columns = first + tl.arange(0, S.COLUMNS)
    return head * S.WIDTH + columns[None, :], inside[:, None] & (columns < S.WIDTH)[None, :]


@triton.jit
def _store_strength(x, beta, tokens, inside, head, S: tl.constexpr):
    """β of one head, if there is one."""
    if x.strength is not None:
        b = _numbers(x.strength, x.stride_strength, tokens, inside, head)
        tl.store(beta + tokens * S.HEADS + head, tl.sigmoid(b), mask=inside)


@triton.jit
def _store_strength_grads(x, dstrength, tokens, inside, head, S: tl.constexpr):
    """The gradient of its raw strength."""
    if x.strength is not None:
        b = _numbers(x.strength, x.stride_strength, tokens, inside, head)
        db = _numbers(x.dbeta, x.stride_dbeta, tokens, inside, head)
        share = tl.sigmoid(b)
        db *= share * (1 - share)
        tl.store(dstrength + tokens * S.HEADS + head, db.to(dstrength.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def gates_kernel(x, g, v, beta, rows, S: tl.constexpr):
    """g, beta ``[rows, HEADS]`` and v ``[rows, HEADS, WIDTH]``; WIDTH = 0: no values."""
    head, _, tokens, inside = _place(rows, S)
    _, step, A = _rates(x, tokens, inside, head)
    tl.store(g + tokens * S.HEADS + head, -A * step, mask=inside)
    _store_strength(x, beta, tokens, inside, head, S)
    for first in tl.static_range(0, S.WIDTH, S.COLUMNS):
        inner, mask = _columns(first, inside, head, S)
        value = tl.load(x.x + tokens[:, None] * x.stride_x + inner, mask=mask, other=0.0).to(tl.float32) * step[:, None]
        tl.store(v + tokens[:, None] * (S.HEADS * S.WIDTH) + inner, value.to(v.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def gates_grads_kernel(x, drate, dx, dstrength, partial, stride_drate, stride_dx, rows, S: tl.constexpr):
    """drate, dstrength ``[rows, HEADS]``, ``dx [rows, HEADS, WIDTH] = dv · step + dskip``, and the sums over a program's
    tokens, ``partial [blocks, 2, HEADS]``, of ddt_bias and dA_log.
    """
    head, block, tokens, inside = _place(rows, S)
    total, step, A = _rates(x, tokens, inside, head)
    dstep = -A * _numbers(x.dg, x.stride_dg, tokens, inside, head)
    decay = tl.sum(dstep * step, 0)
    for first in tl.static_range(0, S.WIDTH, S.COLUMNS):
        inner, mask = _columns(first, inside, head, S)
        dvalue = tl.load(x.dv + tokens[:, None] * x.stride_dv + inner, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x.x + tokens[:, None] * x.stride_x + inner, mask=mask, other=0.0).to(tl.float32)
        dstep += tl.sum(dvalue * value, 1)
        both = dvalue * step[:, None]
        if x.dskip is not None:
            both += tl.load(x.dskip + tokens[:, None] * x.stride_dskip + inner, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + tokens[:, None] * stride_dx + inner, both.to(dx.dtype.element_ty), mask=mask)
    dtotal = dstep * tl.sigmoid(total)
    tl.store(drate + tokens * stride_drate + head, dtotal.to(drate.dtype.element_ty), mask=inside)
    tl.store(partial + block * (2 * S.HEADS) + head, tl.sum(tl.where(inside, dtotal, 0.0), 0))
    tl.store(partial + block * (2 * S.HEADS) + S.HEADS + head, decay)
    _store_strength_grads(x, dstrength, tokens, inside, head, S)


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
    head, _, tokens, inside = _place(rows, S)
    _store_strength(x, beta, tokens, inside, head, S)
    for first in tl.static_range(0, S.WIDTH, S.COLUMNS):
        inner, mask = _columns(first, inside, head, S)
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
    head, block, tokens, inside = _place(rows, S)
    partial += block * (S.HEADS * (S.WIDTH + 1))
    decay = tl.zeros([S.ROWS], tl.float32)
    for first in tl.static_range(0, S.WIDTH, S.COLUMNS):
        inner, mask = _columns(first, inside, head, S)
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
    _store_strength_grads(x, dstrength, tokens, inside, head, S)


@triton.jit
def _scale_columns(L, width, S: tl.constexpr):
    """(part of the rows of a program, columns, their L ``[1, COLUMNS]``). Grid: parts of the rows x blocks of columns."""
    blocks = tl.cdiv(width, S.COLUMNS)
    columns = (tl.program_id(0) % blocks) * S.COLUMNS + tl.arange(0, S.COLUMNS)
    factor = tl.load(L + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    return tl.program_id(0) // blocks, columns, factor


@triton.jit(do_not_specialize=["rows"])
def level_scales_kernel(dl, L, scales, stride, rows, width, S: tl.constexpr, OFFSET: tl.constexpr):
    """``scales [rows, width] = softplus(L · dl + OFFSET)``."""
    part, columns, factor = _scale_columns(L, width, S)
    tokens = part.to(tl.int64) * S.ROWS + tl.arange(0, S.ROWS)
    mask = (tokens < rows)[:, None] & (columns < width)[None, :]
    product = factor * tl.load(dl + tokens[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    pointers = scales + tokens[:, None] * width + columns[None, :]
    tl.store(pointers, softplus(product + OFFSET).to(scales.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tiles"])
def level_scales_grads_kernel(
    dscales,
    dl,
    stride_dscales,
    stride,
    L,
    ddl,
    partial,
    stride_ddl,
    rows,
    width,
    tiles,
    S: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """ddl ``[rows, width]``, and the sums of dL over ``tiles`` blocks of rows, ``partial [programs, width]``."""
    part, columns, factor = _scale_columns(L, width, S)
    sums = tl.zeros([S.ROWS, S.COLUMNS], tl.float32)
    for i in range(tiles):
        tokens = (part * tiles + i).to(tl.int64) * S.ROWS + tl.arange(0, S.ROWS)
        mask = (tokens < rows)[:, None] & (columns < width)[None, :]
        x = tl.load(dl + tokens[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        pointers = dscales + tokens[:, None] * stride_dscales + columns[None, :]
        gradient = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) * tl.sigmoid(factor * x + OFFSET)
        sums += gradient * x
        pointers = ddl + tokens[:, None] * stride_ddl + columns[None, :]
        tl.store(pointers, (gradient * factor).to(ddl.dtype.element_ty), mask=mask)
    tl.store(partial + part.to(tl.int64) * width + columns, tl.sum(sums, 0), mask=columns < width)


def _arguments(dt_bias: Tensor, A_log: Tensor, *tensors: Tensor | None) -> tuple[Inputs, int, Tile, int]:
    """(bundle of rate, x, strength, dg, dv, dskip and dbeta, number of rows, sizes, blocks of rows) of a launch."""
    rate, x = tensors[:2]
    batch, length, heads = rate.shape  # type: ignore[union-attr]
    block, width = (TOKENS, 0) if x is None else (TOKENS_OF_VALUES, x.shape[3])
    inputs = Inputs(*with_strides(*tensors), dt_bias.contiguous(), A_log.contiguous())
    rows = batch * length
    return inputs, rows, constants(Tile, block, COLUMNS, heads, width), cdiv(rows, block)


def forward(
    rate: Tensor, dt_bias: Tensor, A_log: Tensor, x: Tensor | None, strength: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(g, v, beta): ``step = softplus(rate + dt_bias)``, ``g = -e^A_log · step``, ``v = x · step``, ``beta = σ(strength)``.

    Args:
        rate, strength: ``[B, T, H]``, x: ``[B, T, H, W]``, at most 32 bits; x or strength may be None. dt_bias, A_log: ``[H]``.

    Returns:
        g and beta ``[B, T, H]``, float32; v of x's shape and dtype; None where there is no input. Contiguous.
    """
    inputs, rows, S, blocks = _arguments(dt_bias, A_log, rate, x, strength, None, None, None, None)
    made = scratch_like(rate, torch.float32), scratch_like(x), scratch_like(strength, torch.float32)
    if rows:
        launching.launch(gates_kernel, blocks * rate.shape[2], inputs, *made, rows, S=S, num_warps=4)
    return made


def backward(
    dg: Tensor,
    dv: Tensor | None,
    dskip: Tensor | None,
    dbeta: Tensor | None,
    rate: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    x: Tensor | None,
    strength: Tensor | None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of rate, dt_bias, A_log, x and strength in their dtypes, None where there is no input.

    dskip ``[B, T, H, W]`` or None is the gradient of x from elsewhere; it is added. The gradients of rate and x are written
    into ``into``, columns of wider rows, if given. The other arguments are as in ``forward``. The same bits on every run.
    """
    inputs, rows, S, blocks = _arguments(dt_bias, A_log, rate, x, strength, dg, dv, dskip, dbeta)
    drate, dx = into or (scratch_like(rate), scratch_like(x))
    made, strides = (drate, dx, scratch_like(strength)), (drate.stride(1), 0 if x is None else dx.stride(1))
    heads = rate.shape[2]
    partial = launching.scratch((blocks, 2, heads), torch.float32, rate.device)
    if blocks:
        launching.launch(gates_grads_kernel, blocks * heads, inputs, *made, partial, *strides, rows, S=S, num_warps=4)
    ddt_bias, dA_log = partial.sum(0)
    return drate, ddt_bias.to(dt_bias.dtype), dA_log.to(A_log.dtype), *made[1:]


def _channel_launch(
    kernel: Any,
    tensors: tuple[Tensor | None, ...],
    dt_bias: Tensor | None,
    A_log: Tensor | None,
    heads: int,
    made: tuple[Any, ...],
    constexprs: dict[str, float | None],
) -> None:
    """Launch a kernel of the gates per channel; ``tensors`` as in ``_arguments``."""
    batch, length, width = tensors[0].shape  # type: ignore[union-attr]
    if rows := batch * length:
        parameters = (None if y is None else y.contiguous() for y in (dt_bias, A_log))
        inputs = Inputs(*with_strides(*tensors), *parameters)
        S = constants(Tile, TOKENS_OF_VALUES, COLUMNS, heads, width // heads)
        launching.launch(
            kernel, cdiv(rows, TOKENS_OF_VALUES) * heads, inputs, *made, rows, S=S, **constexprs, num_warps=4
        )


def channel_forward(
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
    _channel_launch(channel_gates_kernel, tensors, dt_bias, A_log, heads, (g, beta), sizes)
    return g, beta


def channel_backward(
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
    blocks = cdiv(rate.shape[0] * rate.shape[1], TOKENS_OF_VALUES) if A_log is not None else 0
    partial = launching.scratch((blocks, width + heads), torch.float32, rate.device)
    tensors, sizes = (rate, None, strength, dg, None, None, dbeta), dict(BOUND=bound, DIVISOR=divisor)
    _channel_launch(channel_gates_grads_kernel, tensors, dt_bias, A_log, heads, (drate, dstrength, partial), sizes)
    if dt_bias is None or A_log is None:
        return drate, None, None, dstrength
    ddt_bias, dA_log = partial.sum(0).split([width, heads])
    return drate, ddt_bias.to(dt_bias.dtype), dA_log.to(A_log.dtype), dstrength


def level_scales(dl: Tensor, L: Tensor, offset: float) -> Tensor:
    """λ ``[B, T, H, levels]``, contiguous, in the dtype of dl ``[B, T, H · levels]``; L ``[H, levels]``."""
    dl = token_rows(dl)
    batch, length, width = dl.shape
    scales = launching.scratch((batch, length, *L.shape), dl.dtype, dl.device)
    if programs := cdiv(batch * length, SCALE_TOKENS) * cdiv(width, COLUMNS):
        sizes = dict(S=constants(Tile, SCALE_TOKENS, COLUMNS), OFFSET=offset, num_warps=4)
        given = dl, L.contiguous(), scales, dl.stride(1), batch * length, width
        launching.launch(level_scales_kernel, programs, *given, **sizes)
    return scales


def level_scales_backward(
    dscales: Tensor, dl: Tensor, L: Tensor, offset: float, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of dl (in ``into``, if given) and L, in their dtypes; else as ``level_scales``. The same bits every run."""
    (batch, length, width), ddl = dl.shape, scratch_like(dl) if into is None else into
    tiles = max(cdiv(blocks := cdiv(batch * length, SCALE_TOKENS), PROGRAMS), 1)
    parts = cdiv(blocks, tiles)
    partial = launching.scratch((parts, width), torch.float32, dl.device)
    if parts * width:
        sizes = dict(S=constants(Tile, SCALE_TOKENS, COLUMNS), OFFSET=offset, num_warps=4)
        given = *with_strides(dscales, dl), L.contiguous(), ddl, partial, ddl.stride(1), batch * length, width, tiles
        launching.launch(level_scales_grads_kernel, parts * cdiv(width, COLUMNS), *given, **sizes)
    return ddl, partial.sum(0).view(L.shape).to(L.dtype)
