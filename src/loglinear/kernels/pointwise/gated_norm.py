"""GATED NORM: a root-mean-square norm, an addition before it, and a SiLU gate before or after it, or none. One kernel each way.

Only the inputs are saved for backward. A program holds whole rows in registers, so the backward pass computes the sums of the
norm again without a second pass over memory. A program writes gradients of the weights as partial sums over its rows.

Legend: a row holds the numbers of one mean; a token has ``heads`` rows of ``width`` numbers. float32: everything inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.pointwise.functions import silu_slope
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.problem import cdiv, padded, token_rows

NUMBERS = 1024  # of a tile: 8 for each thread of 4 warps, one load of 16 bits; a wider row is a tile of its own
PROGRAMS_FORWARD, PROGRAMS = 8192, 1024  # about; in a backward pass each leaves a row of partial sums


@triton.jit
def _load(base, stride, tokens, inner, inside):
    return tl.load(base + tokens[:, None] * stride + inner, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _row_of(weight, columns, WIDTH: tl.constexpr):
    return tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _scale_of(skip_scale, columns, WIDTH: tl.constexpr, SKIP: tl.constexpr):
    return tl.load(skip_scale + columns // SKIP, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _tile(
    first, x, gate, skip, skip_scale, stride_x, stride_gate, stride_skip, rows,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, SKIP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows from ``first`` on: (their tokens, offsets in these, mask, the skip's input, x with its skip, gate, its sigmoid).

    Absent inputs are replaced by x.
    """
    row = first + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (columns < WIDTH)[None, :]
    tokens = (row // HEADS).to(tl.int64)
    inner = (row % HEADS)[:, None] * WIDTH + columns[None, :]
    value = _load(x, stride_x, tokens, inner, inside)
    skipped = value
    if SKIP > 0:
        skipped = _load(skip, stride_skip, tokens, inner, inside)
        value += skipped * _scale_of(skip_scale, columns, WIDTH, SKIP)
    z = value
    opening = value
    if gate is not None:
        z = _load(gate, stride_gate, tokens, inner, inside)
        opening = tl.sigmoid(z)
    return tokens, inner, inside, skipped, value, z, opening


@triton.jit
def _inverse(squares, first, rows, eps, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """1 / rms ``[ROWS, 1]`` of rows with these sums of squares; a row outside may have eps = 0."""
    inside = first + tl.arange(0, ROWS) < rows
    return tl.rsqrt(tl.where(inside, squares / WIDTH + eps, 1.0))[:, None]


@triton.jit
def _offsets(first, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return (first + tl.arange(0, ROWS)).to(tl.int64)[:, None] * WIDTH + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _two_sums(a, b, c, d):
    return a + c, b + d


@triton.jit(do_not_specialize=["rows", "tiles", "eps"])
def gated_norm_kernel(
    x, gate, skip, skip_scale, weight, out, stride_x, stride_gate, stride_skip, rows, tiles, eps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, SKIP: tl.constexpr, GATE_FIRST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out ``[rows, WIDTH]``, ``tiles`` blocks of rows a program. SKIP: columns that share a skip_scale, 0 without skip.
    Grid: parts of the blocks of rows.
    """
    scale = _row_of(weight, tl.arange(0, COLUMNS), WIDTH)
    for i in range(tiles):
        first = (tl.program_id(0) * tiles + i) * ROWS
        _, _, inside, _, value, z, opening = _tile(
            first, x, gate, skip, skip_scale, stride_x, stride_gate, stride_skip, rows, HEADS, WIDTH, SKIP, ROWS, COLUMNS
        )  # fmt: skip
        if GATE_FIRST:
            value *= z * opening
        result = value * _inverse(tl.sum(value * value, 1), first, rows, eps, WIDTH, ROWS) * scale
        if gate is not None and not GATE_FIRST:
            result *= z * opening
        tl.store(out + _offsets(first, WIDTH, ROWS, COLUMNS), result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "tiles", "eps"])
def gated_norm_grads_kernel(
    dout, x, gate, skip, skip_scale, weight, dx, dgate, dskip, partial,
    stride_dout, stride_x, stride_gate, stride_skip, rows, tiles, eps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, SKIP: tl.constexpr, GATE_FIRST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx, dgate, dskip ``[rows, WIDTH]``, and sums over ``tiles`` blocks of rows, ``partial [programs, 1 or 2, WIDTH]``: of
    dweight, and of dskip_scale before it is summed over the columns of a head. Grid: parts of the blocks of rows.
    """
    columns = tl.arange(0, COLUMNS)
    scale = _row_of(weight, columns, WIDTH)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    skip_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(tiles):
        first = (tl.program_id(0) * tiles + i) * ROWS
        tokens, inner, inside, skipped, value, z, opening = _tile(
            first, x, gate, skip, skip_scale, stride_x, stride_gate, stride_skip, rows, HEADS, WIDTH, SKIP, ROWS, COLUMNS
        )  # fmt: skip
        gradient = _load(dout, stride_dout, tokens, inner, inside)
        if gate is not None:
            silu = z * opening
            slope = silu_slope(z, opening)
            if GATE_FIRST:  # the gate belongs to the numbers that are normalised
                dz = value * slope
                value *= silu
            else:
                dz = gradient * scale * slope
                gradient *= silu
        squares, product = tl.reduce((value * value, gradient * scale * value), 1, _two_sums)
        inverse = _inverse(squares, first, rows, eps, WIDTH, ROWS)
        normed = value * inverse
        sums += gradient * normed
        gradient = inverse * (gradient * scale - normed * (inverse * product[:, None] / WIDTH))
        if GATE_FIRST:
            dz *= gradient
            gradient *= silu
        elif gate is not None:
            dz *= normed
        offsets = _offsets(first, WIDTH, ROWS, COLUMNS)
        if gate is not None:
            tl.store(dgate + offsets, dz.to(dgate.dtype.element_ty), mask=inside)
        tl.store(dx + offsets, gradient.to(dx.dtype.element_ty), mask=inside)
        if SKIP > 0:
            factor = _scale_of(skip_scale, columns, WIDTH, SKIP)
            tl.store(dskip + offsets, (gradient * factor).to(dskip.dtype.element_ty), mask=inside)
            skip_sums += gradient * skipped
    rows_of_sums = 2 if SKIP > 0 else 1
    base = partial + tl.program_id(0).to(tl.int64) * (rows_of_sums * WIDTH)
    tl.store(base + columns, tl.sum(sums, 0), mask=columns < WIDTH)
    if SKIP > 0:
        tl.store(base + WIDTH + columns, tl.sum(skip_sums, 0), mask=columns < WIDTH)


def _constants(x: Tensor, weight: Tensor, skip_scale: Tensor | None, gate_first: bool) -> dict:
    width = weight.shape[0]
    columns = padded(width)
    return {
        "HEADS": x.shape[2] if x.dim() == 4 else 1,
        "WIDTH": width,
        "SKIP": 0 if skip_scale is None else width // skip_scale.shape[0],
        "GATE_FIRST": gate_first,
        "ROWS": max(NUMBERS // columns, 1),
        "COLUMNS": columns,
        "num_warps": min(max(columns // 256, 4), 8),
    }


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(1)


def _parts(rows: int, constants: dict, programs: int) -> tuple[int, int]:
    """(blocks of rows of a program, programs): about as many programs as wanted."""
    blocks = cdiv(rows, constants["ROWS"])
    tiles = max(cdiv(blocks, programs), 1)
    return tiles, cdiv(blocks, tiles)


def forward(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    gate_first: bool,
    skip: Tensor | None,
    skip_scale: Tensor | None,
) -> Tensor:
    """``norm(y · silu(gate)) · weight`` or ``norm(y) · weight · silu(gate)``, contiguous, of x's shape and dtype.

    ``y = x``, or ``x + skip_scale · skip``. Without a gate ``norm(y) · weight``.

    Args:
        x, gate, skip: ``[B, T, heads, width]`` or ``[B, T, width]``, at most 32 bits, skip only the second. gate may be None.
        weight: ``[width]``. skip_scale: ``[n]``, one number for every ``width / n`` columns. gate_first: the gate comes first.
    """
    shape = x.shape
    x, gate, skip = (None if y is None else token_rows(y) for y in (x, gate, skip))
    weight, skip_scale = weight.contiguous(), None if skip_scale is None else skip_scale.contiguous()
    constants = _constants(x, weight, skip_scale, gate_first)
    out = launching.scratch(tuple(shape), x.dtype, x.device)
    rows = x.numel() // weight.shape[0]
    tiles, programs = _parts(rows, constants, PROGRAMS_FORWARD)
    if programs:
        launching.launch(
            gated_norm_kernel, programs, x, gate, skip, skip_scale, weight, out,
            x.stride(1), _stride(gate), _stride(skip), rows, tiles, eps, **constants,
        )  # fmt: skip
    return out


def backward(
    dout: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    gate_first: bool,
    skip: Tensor | None,
    skip_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, gate, weight, skip and skip_scale, in their dtypes; arguments as in ``forward``. The same bits on
    every run.
    """
    width = weight.shape[0]
    dout, x, gate, skip = (None if y is None else token_rows(y) for y in (dout, x, gate, skip))
    weight, skip_scale = weight.contiguous(), None if skip_scale is None else skip_scale.contiguous()
    constants = _constants(x, weight, skip_scale, gate_first)
    given = (x, gate, skip)
    dx, dgate, dskip = (None if y is None else launching.scratch(tuple(y.shape), y.dtype, y.device) for y in given)
    rows = x.numel() // width
    # Few columns a thread: its registers hold sums and gradients besides, and few programs fit on a multiprocessor.
    constants["num_warps"] = min(max(constants["COLUMNS"] // 128, 4), 32)
    tiles, programs = _parts(rows, constants, PROGRAMS)
    partial = launching.scratch((programs, 1 if skip is None else 2, width), torch.float32, x.device)
    if programs:
        launching.launch(
            gated_norm_grads_kernel, programs, dout, x, gate, skip, skip_scale, weight, dx, dgate, dskip, partial,
            dout.stride(1), x.stride(1), _stride(gate), _stride(skip), rows, tiles, eps,
            **constants,
        )  # fmt: skip
    sums = partial.sum(0)
    dscale = None if skip_scale is None else sums[1].view(skip_scale.shape[0], -1).sum(1).to(skip_scale.dtype)
    return dx, dgate, sums[0].to(weight.dtype), dskip, dscale
