"""GATES: decay, time step and writing strength of a mixer with one gate a head, from its projections. One kernel each way.

Only the inputs are saved for backward. A program has one head, and it also multiplies the values of this head by the time step.
A program writes gradients of shared parameters as partial sums over its tokens. Gates per channel: channel_gates.py.

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
from loglinear.kernels.tree.problem import cdiv

TOKENS = 128  # of a program with one number a token, of four warps
VALUE_TOKENS, VALUE_GRADS_TOKENS = (
    16,
    8,
)  # of a program with values, of one warp: 0.205 ms backward, where 32 tokens take 0.229
COLUMNS = 64  # of a tile


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
def place_of(rows, S: tl.constexpr):
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
def columns_of(first, inside, head, S: tl.constexpr):
    """(columns of the values of a head ``[1, COLUMNS]`` among those of all heads, mask ``[tokens, COLUMNS]``)."""
    columns = first + tl.arange(0, S.COLUMNS)
    return head * S.WIDTH + columns[None, :], inside[:, None] & (columns < S.WIDTH)[None, :]


@triton.jit
def store_strength(x, beta, tokens, inside, head, S: tl.constexpr):
    """β of one head, if there is one."""
    if x.strength is not None:
        b = _numbers(x.strength, x.stride_strength, tokens, inside, head)
        tl.store(beta + tokens * S.HEADS + head, tl.sigmoid(b), mask=inside)


@triton.jit
def store_strength_grads(x, dstrength, tokens, inside, head, S: tl.constexpr):
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
    head, _, tokens, inside = place_of(rows, S)
    _, step, A = _rates(x, tokens, inside, head)
    tl.store(g + tokens * S.HEADS + head, -A * step, mask=inside)
    store_strength(x, beta, tokens, inside, head, S)
    for first in tl.static_range(0, S.WIDTH, S.COLUMNS):
        inner, mask = columns_of(first, inside, head, S)
        value = tl.load(x.x + tokens[:, None] * x.stride_x + inner, mask=mask, other=0.0).to(tl.float32) * step[:, None]
        tl.store(v + tokens[:, None] * (S.HEADS * S.WIDTH) + inner, value.to(v.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def gates_grads_kernel(x, drate, dx, dstrength, partial, rows, S: tl.constexpr):
    """drate, dstrength ``[rows, HEADS]``, ``dx [rows, HEADS, WIDTH] = dv · step + dskip``, and the sums over a program's
    tokens, ``partial [blocks, 2, HEADS]``, of ddt_bias and dA_log.
    """
    head, block, tokens, inside = place_of(rows, S)
    total, step, A = _rates(x, tokens, inside, head)
    dstep = -A * _numbers(x.dg, x.stride_dg, tokens, inside, head)
    decay = tl.sum(dstep * step, 0)
    for first in tl.static_range(0, S.WIDTH, S.COLUMNS):
        inner, mask = columns_of(first, inside, head, S)
        dvalue = tl.load(x.dv + tokens[:, None] * x.stride_dv + inner, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x.x + tokens[:, None] * x.stride_x + inner, mask=mask, other=0.0).to(tl.float32)
        dstep += tl.sum(dvalue * value, 1)
        both = dvalue * step[:, None]
        if x.dskip is not None:
            pointers = x.dskip + tokens[:, None] * x.stride_dskip + inner
            both += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + tokens[:, None] * (S.HEADS * S.WIDTH) + inner, both.to(dx.dtype.element_ty), mask=mask)
    dtotal = dstep * tl.sigmoid(total)
    tl.store(drate + tokens * S.HEADS + head, dtotal.to(drate.dtype.element_ty), mask=inside)
    tl.store(partial + block * (2 * S.HEADS) + head, tl.sum(tl.where(inside, dtotal, 0.0), 0))
    tl.store(partial + block * (2 * S.HEADS) + S.HEADS + head, decay)
    store_strength_grads(x, dstrength, tokens, inside, head, S)


def _arguments(tokens: int, dt_bias: Tensor, A_log: Tensor, *tensors: Tensor | None) -> tuple[Inputs, int, dict, int]:
    """(bundle of rate, x, strength, dg, dv, dskip and dbeta, number of rows, constants, blocks of rows) of a launch.

    ``tokens``: of a program, if there are values.
    """
    rate, x = tensors[:2]
    batch, length, heads = rate.shape  # type: ignore[union-attr]
    block, width, warps = (TOKENS, 0, 4) if x is None else (tokens, x.shape[3], 1)
    inputs = Inputs(*with_strides(*tensors), dt_bias.contiguous(), A_log.contiguous())
    rows = batch * length
    return inputs, rows, dict(S=constants(Tile, block, COLUMNS, heads, width), num_warps=warps), cdiv(rows, block)


def forward(
    rate: Tensor, dt_bias: Tensor, A_log: Tensor, x: Tensor | None, strength: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(g, v, beta): ``step = softplus(rate + dt_bias)``, ``g = -e^A_log · step``, ``v = x · step``, ``beta = σ(strength)``.

    Args:
        rate, strength: ``[B, T, H]``, x: ``[B, T, H, W]``, at most 32 bits; x or strength may be None. dt_bias, A_log: ``[H]``.

    Returns:
        g and beta ``[B, T, H]``, float32; v of x's shape and dtype; None where there is no input. Contiguous.
    """
    given = rate, x, strength, None, None, None, None
    inputs, rows, sizes, blocks = _arguments(VALUE_TOKENS, dt_bias, A_log, *given)
    made = scratch_like(rate, torch.float32), scratch_like(x), scratch_like(strength, torch.float32)
    if rows:
        launching.launch(gates_kernel, blocks * rate.shape[2], inputs, *made, rows, **sizes)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of rate, dt_bias, A_log, x and strength in their dtypes, None where there is no input.

    dskip ``[B, T, H, W]`` or None is the gradient of x from elsewhere; it is added. The other arguments are as in
    ``forward``. The same bits on every run.
    """
    given = rate, x, strength, dg, dv, dskip, dbeta
    inputs, rows, sizes, blocks = _arguments(VALUE_GRADS_TOKENS, dt_bias, A_log, *given)
    made = scratch_like(rate), scratch_like(x), scratch_like(strength)
    heads = rate.shape[2]
    partial = launching.scratch((blocks, 2, heads), torch.float32, rate.device)
    if blocks:
        launching.launch(gates_grads_kernel, blocks * heads, inputs, *made, partial, rows, **sizes)
    ddt_bias, dA_log = partial.sum(0)
    return made[0], ddt_bias.to(dt_bias.dtype), dA_log.to(A_log.dtype), *made[1:]
