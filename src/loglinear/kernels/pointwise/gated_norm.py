"""GATED NORM: a root-mean-square norm, an addition before it, and a gate before or after it, or none. One kernel each way.

Only the inputs are saved for backward. A program holds whole rows in registers, so the backward pass computes the sums of the
norm again without a second pass over memory. A program writes gradients of the weights as partial sums over its rows.

Legend: a row holds the numbers of one mean; a token has ``heads`` rows of ``width`` numbers. float32: everything inside.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.pointwise.functions import gate_of, gate_slope
from loglinear.kernels.pointwise.rows import Tile, load_rows, rows_from, scratch_like, store_rows, with_strides
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import constants
from loglinear.kernels.tree.problem import cdiv, padded

NUMBERS = 1024  # of a tile: 8 for each thread of 4 warps, one load of 16 bits; a wider row is a tile of its own
PROGRAMS_FORWARD, PROGRAMS = 8192, 1024  # about; in a backward pass each leaves a row of partial sums


class Inputs(NamedTuple):
    """The inputs and the gradient of the result, with the distance of two tokens of each; None where absent."""

    x: Any
    gate: Any
    skip: Any
    dout: Any
    stride_x: Any
    stride_gate: Any
    stride_skip: Any
    stride_dout: Any
    weight: Any
    skip_scale: Any


@triton.jit
def _of_columns(numbers, S: tl.constexpr, SHARE: tl.constexpr):
    """The number of each column ``[1, COLUMNS]``, of which SHARE columns have one."""
    columns = tl.arange(0, S.COLUMNS)
    return tl.load(numbers + columns // SHARE, mask=columns < S.WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _load(x, at, S: tl.constexpr, SHARE: tl.constexpr):
    """(The skip's input, x with its skip, gate, its sigmoid) of a tile. Absent inputs are replaced by x."""
    value = load_rows(x.x, x.stride_x, at)
    skipped = value
    if x.skip is not None:
        skipped = load_rows(x.skip, x.stride_skip, at)
        value += skipped * _of_columns(x.skip_scale, S, SHARE)
    z = value
    opening = value
    if x.gate is not None:
        z = load_rows(x.gate, x.stride_gate, at)
        opening = tl.sigmoid(z)
    return skipped, value, z, opening


@triton.jit
def _inverse(squares, at, eps, S: tl.constexpr):
    """1 / rms ``[ROWS, 1]`` of rows with these sums of squares; a row outside may have eps = 0."""
    return tl.rsqrt(tl.where(at.valid, squares / S.WIDTH + eps, 1.0))[:, None]


@triton.jit
def _two_sums(a, b, c, d):
    return a + c, b + d


@triton.jit(do_not_specialize=["rows", "tiles", "eps"])
def gated_norm_kernel(
    x, out, rows, tiles, eps, S: tl.constexpr, SHARE: tl.constexpr, GATE_FIRST: tl.constexpr, SILU: tl.constexpr
):
    """out ``[rows, WIDTH]``, ``tiles`` blocks of rows a program. SHARE: columns that share a skip_scale.
    Grid: parts of the blocks of rows.
    """
    scale = _of_columns(x.weight, S, 1)
    for i in range(tiles):
        at = rows_from((tl.program_id(0) * tiles + i) * S.ROWS, rows, S)
        _, value, z, opening = _load(x, at, S, SHARE)
        if GATE_FIRST:
            value *= gate_of(z, opening, SILU)
        result = value * _inverse(tl.sum(value * value, 1), at, eps, S) * scale
        if x.gate is not None and not GATE_FIRST:
            result *= gate_of(z, opening, SILU)
        store_rows(out, result, at, S)


@triton.jit(do_not_specialize=["rows", "tiles", "eps"])
def gated_norm_grads_kernel(
    x,
    dx,
    dgate,
    dskip,
    partial,
    stride_dgate,
    rows,
    tiles,
    eps,
    S: tl.constexpr,
    SHARE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    SILU: tl.constexpr,
):
    """dx, dgate, dskip ``[rows, WIDTH]``, and sums over ``tiles`` blocks of rows, ``partial [programs, 1 or 2, WIDTH]``: of
    dweight, and of dskip_scale before it is summed over the columns of a head. Grid: parts of the blocks of rows.
    """
    columns = tl.arange(0, S.COLUMNS)
    scale = _of_columns(x.weight, S, 1)
    sums = tl.zeros([S.ROWS, S.COLUMNS], tl.float32)
    skip_sums = tl.zeros([S.ROWS, S.COLUMNS], tl.float32)
    for i in range(tiles):
        at = rows_from((tl.program_id(0) * tiles + i) * S.ROWS, rows, S)
        skipped, value, z, opening = _load(x, at, S, SHARE)
        gradient = load_rows(x.dout, x.stride_dout, at)
        if x.gate is not None:
            factor = gate_of(z, opening, SILU)
            slope = gate_slope(z, opening, SILU)
            if GATE_FIRST:  # the gate belongs to the numbers that are normalised
                dz = value * slope
                value *= factor
            else:
                dz = gradient * scale * slope
                gradient *= factor
        squares, product = tl.reduce((value * value, gradient * scale * value), 1, _two_sums)
        inverse = _inverse(squares, at, eps, S)
        normed = value * inverse
        sums += gradient * normed
        gradient = inverse * (gradient * scale - normed * (inverse * product[:, None] / S.WIDTH))
        if GATE_FIRST:
            dz *= gradient
            gradient *= factor
        elif x.gate is not None:
            dz *= normed
        if x.gate is not None:
            tl.store(dgate + at.tokens * stride_dgate + at.inner, dz.to(dgate.dtype.element_ty), mask=at.inside)
        store_rows(dx, gradient, at, S)
        if x.skip is not None:
            store_rows(dskip, gradient * _of_columns(x.skip_scale, S, SHARE), at, S)
            skip_sums += gradient * skipped
    base = partial + tl.program_id(0).to(tl.int64) * (S.WIDTH if x.skip is None else 2 * S.WIDTH)
    tl.store(base + columns, tl.sum(sums, 0), mask=columns < S.WIDTH)
    if x.skip is not None:
        tl.store(base + S.WIDTH + columns, tl.sum(skip_sums, 0), mask=columns < S.WIDTH)


def _arguments(
    tensors: list, weight: Tensor, skip_scale: Tensor | None, gate_first: bool, silu: bool
) -> tuple[Inputs, int, dict]:
    """(bundle of x, gate, skip and dout and the weights, number of rows, constants) of a launch."""
    x, width = tensors[0], weight.shape[0]
    columns = padded(width)
    heads = x.shape[2] if x.dim() == 4 else 1
    share = 1 if skip_scale is None else width // skip_scale.shape[0]
    weights = weight.contiguous(), None if skip_scale is None else skip_scale.contiguous()
    S = constants(Tile, max(NUMBERS // columns, 1), columns, heads, width)
    flags = dict(GATE_FIRST=gate_first, SILU=silu)
    return Inputs(*with_strides(*tensors), *weights), x.numel() // width, dict(S=S, SHARE=share, **flags)


def _parts(rows: int, columns: int, programs: int) -> tuple[int, int]:
    """(blocks of rows of a program, programs): about as many programs as wanted."""
    blocks = cdiv(rows, max(NUMBERS // columns, 1))
    tiles = max(cdiv(blocks, programs), 1)
    return tiles, cdiv(blocks, tiles)


def forward(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    skip: Tensor | None,
    skip_scale: Tensor | None,
    eps: float,
    gate_first: bool,
    silu: bool = True,
) -> Tensor:
    """``norm(y · act(gate)) · weight`` or ``norm(y) · weight · act(gate)``, contiguous, of x's shape and dtype.

    ``y = x``, or ``x + skip_scale · skip``. Without a gate ``norm(y) · weight``. act is SiLU, or the sigmoid.

    Args:
        x, gate, skip: ``[B, T, heads, width]`` or ``[B, T, width]``, at most 32 bits, skip only the second. gate may be None.
        weight: ``[width]``. skip_scale: ``[n]``, one number for every ``width / n`` columns. gate_first: the gate comes first.
    """
    inputs, rows, sizes = _arguments([x, gate, skip, None], weight, skip_scale, gate_first, silu)
    columns = padded(weight.shape[0])
    out, warps = scratch_like(x), min(max(columns // 256, 4), 8)
    tiles, programs = _parts(rows, columns, PROGRAMS_FORWARD)
    if programs:
        launching.launch(gated_norm_kernel, programs, inputs, out, rows, tiles, eps, **sizes, num_warps=warps)
    return out


def backward(
    dout: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    skip: Tensor | None,
    skip_scale: Tensor | None,
    eps: float,
    gate_first: bool,
    silu: bool = True,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, gate, weight, skip and skip_scale, in their dtypes; arguments as in ``forward``. The same bits on
    every run. The gate's gradient is written into ``into``, columns of wider rows, where it is given.
    """
    inputs, rows, sizes = _arguments([x, gate, skip, dout], weight, skip_scale, gate_first, silu)
    grads = dx, dgate, dskip = scratch_like(x), scratch_like(gate) if into is None else into, scratch_like(skip)
    # Few columns a thread: its registers hold sums and gradients besides, and few programs fit on a multiprocessor.
    columns = padded(weight.shape[0])
    warps = min(max(columns // 128, 4), 32)
    tiles, programs = _parts(rows, columns, PROGRAMS)
    partial = launching.scratch((programs, 1 if skip is None else 2, weight.shape[0]), torch.float32, x.device)
    if programs:
        launched = inputs, *grads, partial, 0 if gate is None else dgate.stride(1), rows, tiles, eps
        launching.launch(gated_norm_grads_kernel, programs, *launched, **sizes, num_warps=warps)
    sums = partial.sum(0)
    dscale = None if skip_scale is None else sums[1].view(skip_scale.shape[0], -1).sum(1).to(skip_scale.dtype)
    return dx, dgate, sums[0].to(weight.dtype), dskip, dscale
