"""GATES: decay, time step, writing strength and λ of a mixer, from its small projections. One kernel each way.

Only the inputs are saved for backward. A program of the gates has one head, and it also multiplies the values of this head by
the time step. A program writes gradients of shared parameters as partial sums over its tokens.

Legend: rows are the tokens of all sequences, one behind the other; W the width of a value head. float32: everything inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.pointwise.functions import softplus
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.problem import cdiv, token_rows

TOKENS, TOKENS_OF_VALUES = 128, 32  # of a program with one number a token, and of one with values
COLUMNS = 64  # of a tile
SCALE_TOKENS = 32  # of a tile of λ
PROGRAMS = 1024  # of λ's backward, about


@triton.jit
def _rates(rate, dt_bias, A_log, stride, tokens, inside, head):
    """(rate + bias, time step, A) of one head."""
    total = tl.load(rate + tokens * stride + head, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(dt_bias + head).to(tl.float32)
    return total, softplus(total), tl.exp(tl.load(A_log + head).to(tl.float32))


@triton.jit(do_not_specialize=["rows"])
def gates_kernel(
    rate, dt_bias, A_log, x, strength, g, v, beta, stride_rate, stride_x, stride_strength, rows,
    H: tl.constexpr, W: tl.constexpr, BETA: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """g, beta ``[rows, H]`` and v ``[rows, H, W]``; W = 0: no values. Grid: blocks of rows x heads, heads fastest."""
    head = tl.program_id(0) % H
    tokens = (tl.program_id(0) // H).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = tokens < rows
    _, step, A = _rates(rate, dt_bias, A_log, stride_rate, tokens, inside, head)
    tl.store(g + tokens * H + head, -A * step, mask=inside)
    if BETA:
        b = tl.load(strength + tokens * stride_strength + head, mask=inside, other=0.0).to(tl.float32)
        tl.store(beta + tokens * H + head, tl.sigmoid(b), mask=inside)
    for first in tl.static_range(0, W, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (columns < W)[None, :]
        inner = head * W + columns[None, :]
        value = tl.load(x + tokens[:, None] * stride_x + inner, mask=mask, other=0.0).to(tl.float32) * step[:, None]
        tl.store(v + tokens[:, None] * (H * W) + inner, value.to(v.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def gates_grads_kernel(
    dg, dv, dskip, dbeta, rate, dt_bias, A_log, x, strength, drate, dx, dstrength, partial,
    stride_dg, stride_dv, stride_dskip, stride_dbeta, stride_rate, stride_x, stride_strength, rows,
    H: tl.constexpr, W: tl.constexpr, BETA: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """drate, dstrength ``[rows, H]``, ``dx [rows, H, W] = dv · step + dskip``, and the sums over a program's
    tokens, ``partial [blocks, 2, H]``, of ddt_bias and dA_log. Grid: blocks of rows x heads, heads fastest.
    """
    head = tl.program_id(0) % H
    block = (tl.program_id(0) // H).to(tl.int64)
    tokens = block * TOKENS + tl.arange(0, TOKENS)
    inside = tokens < rows
    total, step, A = _rates(rate, dt_bias, A_log, stride_rate, tokens, inside, head)
    dgate = tl.load(dg + tokens * stride_dg + head, mask=inside, other=0.0).to(tl.float32)
    dstep = -A * dgate
    decay = tl.sum(dstep * step, 0)
    for first in tl.static_range(0, W, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (columns < W)[None, :]
        inner = head * W + columns[None, :]
        dvalue = tl.load(dv + tokens[:, None] * stride_dv + inner, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + tokens[:, None] * stride_x + inner, mask=mask, other=0.0).to(tl.float32)
        dstep += tl.sum(dvalue * value, 1)
        both = dvalue * step[:, None]
        if dskip is not None:
            both += tl.load(dskip + tokens[:, None] * stride_dskip + inner, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + tokens[:, None] * (H * W) + inner, both.to(dx.dtype.element_ty), mask=mask)
    dtotal = dstep * tl.sigmoid(total)
    tl.store(drate + tokens * H + head, dtotal.to(drate.dtype.element_ty), mask=inside)
    tl.store(partial + block * (2 * H) + head, tl.sum(tl.where(inside, dtotal, 0.0), 0))
    tl.store(partial + block * (2 * H) + H + head, decay)
    if BETA:
        b = tl.load(strength + tokens * stride_strength + head, mask=inside, other=0.0).to(tl.float32)
        db = tl.load(dbeta + tokens * stride_dbeta + head, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(b)
        db *= share * (1 - share)
        tl.store(dstrength + tokens * H + head, db.to(dstrength.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def level_scales_kernel(
    dl, L, scales, stride, rows, width, OFFSET: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr
):
    """``scales [rows, width] = softplus(L · dl + OFFSET)``. Grid: blocks of rows x blocks of columns."""
    blocks = tl.cdiv(width, COLUMNS)
    tokens = (tl.program_id(0) // blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (tokens < rows)[:, None] & (columns < width)[None, :]
    factor = tl.load(L + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    product = factor * tl.load(dl + tokens[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    pointers = scales + tokens[:, None] * width + columns[None, :]
    tl.store(pointers, softplus(product + OFFSET).to(scales.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tiles"])
def level_scales_grads_kernel(
    dscales, dl, L, ddl, partial, stride_dscales, stride, rows, width, tiles,
    OFFSET: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ddl ``[rows, width]``, and the sums of dL over ``tiles`` blocks of rows, ``partial [programs, width]``."""
    blocks = tl.cdiv(width, COLUMNS)
    part = tl.program_id(0) // blocks
    columns = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    factor = tl.load(L + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for i in range(tiles):
        tokens = (part * tiles + i).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        mask = (tokens < rows)[:, None] & (columns < width)[None, :]
        x = tl.load(dl + tokens[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        pointers = dscales + tokens[:, None] * stride_dscales + columns[None, :]
        gradient = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) * tl.sigmoid(factor * x + OFFSET)
        sums += gradient * x
        pointers = ddl + tokens[:, None] * width + columns[None, :]
        tl.store(pointers, (gradient * factor).to(ddl.dtype.element_ty), mask=mask)
    tl.store(partial + part.to(tl.int64) * width + columns, tl.sum(sums, 0), mask=columns < width)


def _constants(rate: Tensor, x: Tensor | None, strength: Tensor | None) -> dict:
    return {
        "H": rate.shape[2],
        "W": 0 if x is None else x.shape[3],
        "BETA": strength is not None,
        "TOKENS": TOKENS if x is None else TOKENS_OF_VALUES,
        "COLUMNS": COLUMNS,
        "num_warps": 4,
    }


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(1)


def _like(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if x is None else launching.scratch(tuple(x.shape), dtype or x.dtype, x.device)


def forward(
    rate: Tensor, dt_bias: Tensor, A_log: Tensor, x: Tensor | None, strength: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(g, v, beta): ``step = softplus(rate + dt_bias)``, ``g = -e^A_log · step``, ``v = x · step``, ``beta = σ(strength)``.

    Args:
        rate, strength: ``[B, T, H]``, x: ``[B, T, H, W]``, at most 32 bits; x or strength may be None. dt_bias, A_log: ``[H]``.

    Returns:
        g and beta ``[B, T, H]``, float32; v of x's shape and dtype; None where there is no input. Contiguous.
    """
    rate, x, strength = (None if y is None else token_rows(y) for y in (rate, x, strength))
    dt_bias, A_log = dt_bias.contiguous(), A_log.contiguous()
    g, beta, v = _like(rate, torch.float32), _like(strength, torch.float32), _like(x)
    constants = _constants(rate, x, strength)
    rows = rate.shape[0] * rate.shape[1]
    if rows:
        launching.launch(
            gates_kernel, cdiv(rows, constants["TOKENS"]) * rate.shape[2], rate, dt_bias, A_log, x, strength, g, v, beta,
            rate.stride(1), _stride(x), _stride(strength), rows, **constants,
        )  # fmt: skip
    return g, v, beta


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of rate, dt_bias, A_log, x and strength in their dtypes, None where there is no input.

    dskip ``[B, T, H, W]`` or None is the gradient of x from elsewhere; it is added. The other arguments are as in
    ``forward``. The same bits on every run.
    """
    grads = [None if y is None else token_rows(y) for y in (dg, dv, dskip, dbeta)]
    rate, x, strength = (None if y is None else token_rows(y) for y in (rate, x, strength))
    dt_bias, A_log = dt_bias.contiguous(), A_log.contiguous()
    drate, dx, dstrength = (_like(y) for y in (rate, x, strength))
    constants = _constants(rate, x, strength)
    (batch, length, heads) = rate.shape
    blocks = cdiv(batch * length, constants["TOKENS"])
    partial = launching.scratch((blocks, 2, heads), torch.float32, rate.device)
    if blocks:
        launching.launch(
            gates_grads_kernel, blocks * heads, *grads, rate, dt_bias, A_log, x, strength, drate, dx, dstrength, partial,
            *(_stride(y) for y in grads), rate.stride(1), _stride(x), _stride(strength), batch * length, **constants,
        )  # fmt: skip
    ddt_bias, dA_log = partial.sum(0)
    return drate, ddt_bias.to(dt_bias.dtype), dA_log.to(A_log.dtype), dx, dstrength


def level_scales(dl: Tensor, L: Tensor, offset: float) -> Tensor:
    """λ ``[B, T, H, levels]``, contiguous, in the dtype of dl ``[B, T, H · levels]``; L ``[H, levels]``."""
    dl = token_rows(dl)
    batch, length, width = dl.shape
    scales = launching.scratch((batch, length, *L.shape), dl.dtype, dl.device)
    programs = cdiv(batch * length, SCALE_TOKENS) * cdiv(width, COLUMNS)
    if programs:
        launching.launch(
            level_scales_kernel, programs, dl, L.contiguous(), scales, dl.stride(1), batch * length, width,
            OFFSET=offset, TOKENS=SCALE_TOKENS, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
    return scales


def level_scales_backward(dscales: Tensor, dl: Tensor, L: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """Gradients of dl and L, in their dtypes; arguments as in ``level_scales``. The same bits on every run."""
    dl, dscales = token_rows(dl), token_rows(dscales)
    batch, length, width = dl.shape
    ddl = launching.scratch(tuple(dl.shape), dl.dtype, dl.device)
    blocks = cdiv(batch * length, SCALE_TOKENS)
    tiles = max(cdiv(blocks, PROGRAMS), 1)
    parts = cdiv(blocks, tiles)
    partial = launching.scratch((parts, width), torch.float32, dl.device)
    if parts * width:
        launching.launch(
            level_scales_grads_kernel, parts * cdiv(width, COLUMNS), dscales, dl, L.contiguous(), ddl, partial,
            dscales.stride(1), dl.stride(1), batch * length, width, tiles,
            OFFSET=offset, TOKENS=SCALE_TOKENS, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
    return ddl, partial.sum(0).view(L.shape).to(L.dtype)
