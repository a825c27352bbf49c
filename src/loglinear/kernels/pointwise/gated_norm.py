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

from loglinear.kernels.pointwise.functions import gate_of, gate_slope, sigmoid
from loglinear.kernels.pointwise.rows import load_rows, registers, rows_from, scratch_like, store_rows, with_strides
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import constants, hash_of
from loglinear.kernels.tree.problem import cdiv, padded

NUMBERS = 1024  # of a tile: 8 for each thread of 4 warps, one load of 16 bits; a wider row is a tile of its own
# Wide rows on their way from memory, forward and backward. Without a second one 32,768 rows of 3,072 numbers in 16 bits, with a
# gate and a skip, take 0.194 ms for 0.191, and 0.397 for 0.365 (H200, Triton 3.6, 2026-12-01).
STAGES_FORWARD, STAGES = 2, 3
SHARED = 48 << 10  # bytes that they may take, on any GPU
PROGRAMS_FORWARD, PROGRAMS = 8192, 1024  # about; in a backward pass each leaves a row of partial sums
# Of rows in three parts: two programs a multiprocessor of an H200, which 128 registers a thread allow. 0.312 ms backward, for
# 0.326 with 1,024 programs and 0.353 with as many registers as they take (2026-12-01).
PARTS_PROGRAMS, REGISTERS = 264, 128


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


class Tile(NamedTuple):
    """Sizes of a launch: a program takes tiles of ROWS, in PARTS of COLUMNS. HEADS: rows of a token; WIDTH: numbers of a row;
    STAGES: tiles on their way from memory.
    """

    ROWS: Any
    COLUMNS: Any
    HEADS: Any
    WIDTH: Any
    PARTS: Any
    STAGES: Any
    __hash__ = hash_of


class Taken(NamedTuple):
    """A part of a tile between its two passes: the gate's value and slope stand where they are needed."""

    skipped: Any
    value: Any
    gradient: Any
    factor: Any
    dz: Any


@triton.jit
def _of_columns(numbers, columns, S: tl.constexpr, SHARE: tl.constexpr):
    """The number of each column ``[1, COLUMNS]``, of which SHARE columns have one."""
    return tl.load(numbers + columns // SHARE, mask=columns < S.WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _zeros(S: tl.constexpr):
    """Sums for each part of a tile."""
    sums = ()
    for _ in tl.static_range(S.PARTS):
        sums = sums + (tl.zeros([S.ROWS, S.COLUMNS], tl.float32),)
    return sums


@triton.jit
def _weights(x, S: tl.constexpr, SHARE: tl.constexpr):
    """(weight, skip_scale) of each part of a row; an absent skip_scale is replaced by the weight."""
    weights, scales = (), ()
    for part in tl.static_range(S.PARTS):
        columns = part * S.COLUMNS + tl.arange(0, S.COLUMNS)
        weight = _of_columns(x.weight, columns, S, 1)
        scale = weight
        if x.skip is not None:
            scale = _of_columns(x.skip_scale, columns, S, SHARE)
        weights, scales = weights + (weight,), scales + (scale,)
    return weights, scales


@triton.jit
def _load(x, at, scale):
    """(The skip's input, x with its skip, gate, its sigmoid) of a tile. Absent inputs are replaced by x."""
    value = load_rows(x.x, x.stride_x, at)
    skipped = value
    if x.skip is not None:
        skipped = load_rows(x.skip, x.stride_skip, at)
        value += skipped * scale
    z = value
    opening = value
    if x.gate is not None:
        z = load_rows(x.gate, x.stride_gate, at)
        opening = sigmoid(z)
    return skipped, value, z, opening


@triton.jit
def _inverse(squares, valid, eps, S: tl.constexpr):
    """1 / rms ``[ROWS, 1]`` of rows with these sums of squares; a row outside may have eps = 0."""
    return tl.rsqrt(tl.where(valid, squares / S.WIDTH + eps, 1.0))[:, None]


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
    weights, scales = _weights(x, S, SHARE)
    for i in tl.range(tiles, num_stages=S.STAGES):
        first = (tl.program_id(0) * tiles + i) * S.ROWS
        values, factors = (), ()
        squares = tl.zeros([S.ROWS, S.COLUMNS], tl.float32)
        for part in tl.static_range(S.PARTS):
            _, value, z, opening = _load(x, rows_from(first, rows, S, part), scales[part])
            factor = opening
            if x.gate is not None:
                factor = gate_of(z, opening, SILU)
            if GATE_FIRST:
                value *= factor
            squares += value * value
            values, factors = values + (value,), factors + (factor,)
        inverse = _inverse(tl.sum(squares, 1), first + tl.arange(0, S.ROWS) < rows, eps, S)
        for part in tl.static_range(S.PARTS):
            result = values[part] * inverse * weights[part]
            if x.gate is not None and not GATE_FIRST:
                result *= factors[part]
            store_rows(out, result, rows_from(first, rows, S, part), S)


@triton.jit
def _taken(x, at, weight, scale, GATE_FIRST: tl.constexpr, SILU: tl.constexpr):
    """A part of a tile as the norm's gradient needs it."""
    skipped, value, z, opening = _load(x, at, scale)
    gradient = load_rows(x.dout, x.stride_dout, at)
    factor = value
    dz = value
    if x.gate is not None:
        factor = gate_of(z, opening, SILU)
        slope = gate_slope(z, opening, SILU)
        if GATE_FIRST:  # the gate belongs to the numbers that are normalised
            dz = value * slope
            value *= factor
        else:
            dz = gradient * weight * slope
            gradient *= factor
    return Taken(skipped, value, gradient, factor, dz)


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
    weights, scales = _weights(x, S, SHARE)
    sums, skip_sums = _zeros(S), _zeros(S)
    for i in tl.range(tiles, num_stages=S.STAGES):
        first = (tl.program_id(0) * tiles + i) * S.ROWS
        parts, added, skip_added = (), (), ()
        squares = tl.zeros([S.ROWS, S.COLUMNS], tl.float32)
        products = tl.zeros([S.ROWS, S.COLUMNS], tl.float32)
        for part in tl.static_range(S.PARTS):
            taken = _taken(x, rows_from(first, rows, S, part), weights[part], scales[part], GATE_FIRST, SILU)
            squares += taken.value * taken.value
            products += taken.gradient * weights[part] * taken.value
            parts = parts + (taken,)
        square, product = tl.reduce((squares, products), 1, _two_sums)
        inverse = _inverse(square, first + tl.arange(0, S.ROWS) < rows, eps, S)
        share = inverse * product[:, None] / S.WIDTH
        for part in tl.static_range(S.PARTS):
            at = rows_from(first, rows, S, part)
            skipped, value, gradient, factor, dz = parts[part]
            normed = value * inverse
            added = added + (sums[part] + gradient * normed,)
            gradient = inverse * (gradient * weights[part] - normed * share)
            if GATE_FIRST:
                dz *= gradient
                gradient *= factor
            elif x.gate is not None:
                dz *= normed
            if x.gate is not None:
                tl.store(dgate + at.tokens * stride_dgate + at.inner, dz.to(dgate.dtype.element_ty), mask=at.inside)
            store_rows(dx, gradient, at, S)
            if dskip is not None:  # of dx as it is rounded: the bits that others make of dx
                rounded = gradient.to(dx.dtype.element_ty).to(tl.float32)
                store_rows(dskip, rounded * scales[part], at, S)
            if x.skip is not None:
                skip_added = skip_added + (skip_sums[part] + gradient * skipped,)
            else:
                skip_added = skip_added + (skip_sums[part],)
        sums, skip_sums = added, skip_added
    base = partial + tl.program_id(0).to(tl.int64) * (S.WIDTH if x.skip is None else 2 * S.WIDTH)
    for part in tl.static_range(S.PARTS):
        columns = part * S.COLUMNS + tl.arange(0, S.COLUMNS)
        tl.store(base + columns, tl.sum(sums[part], 0), mask=columns < S.WIDTH)
        if x.skip is not None:
            tl.store(base + S.WIDTH + columns, tl.sum(skip_sums[part], 0), mask=columns < S.WIDTH)


def _has_parts(width: int) -> bool:
    """Whether a row is three parts: it is wide and fits into three quarters of a power of two."""
    return padded(width) > NUMBERS and 4 * width <= 3 * padded(width)


def _tile(width: int, heads: int, size: int, stages: int) -> tuple[Tile, int]:
    """(sizes of a launch, warps), ``size`` bytes of all inputs for each number of a row. Three quarters of a power of two are
    three parts: no thread is without numbers.
    """
    columns = padded(width)
    if columns <= NUMBERS:
        return constants(Tile, NUMBERS // columns, columns, heads, width, 1, 1), 4
    parts = 1
    if _has_parts(width):
        columns, parts = columns // 4, 3
    stages = min(stages, 1 + SHARED // (parts * columns * size))
    warps = min(max(columns // 128, 4), 16 if columns <= 4096 else 32)
    return constants(Tile, 1, columns, heads, width, parts, stages), warps


def _arguments(
    tensors: list, weight: Tensor, skip_scale: Tensor | None, gate_first: bool, silu: bool, stages: int
) -> tuple[Inputs, int, dict]:
    """(bundle of x, gate, skip and dout and the weights, number of rows, constants) of a launch."""
    x, width = tensors[0], weight.shape[0]
    share = 1 if skip_scale is None else width // skip_scale.shape[0]
    weights = weight.contiguous(), None if skip_scale is None else skip_scale.contiguous()
    size = sum(y.element_size() for y in tensors if y is not None)
    S, warps = _tile(width, x.shape[2] if x.dim() == 4 else 1, size, stages)
    flags = dict(GATE_FIRST=gate_first, SILU=silu, num_warps=warps)
    return Inputs(*with_strides(*tensors), *weights), x.numel() // width, dict(S=S, SHARE=share, **flags)


def _parts(rows: int, width: int, programs: int) -> tuple[int, int]:
    """(blocks of rows of a program, programs): about as many programs as wanted."""
    blocks = cdiv(rows, max(NUMBERS // padded(width), 1))
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
    inputs, rows, sizes = _arguments([x, gate, skip, None], weight, skip_scale, gate_first, silu, STAGES_FORWARD)
    out, (tiles, programs) = scratch_like(x), _parts(rows, weight.shape[0], PROGRAMS_FORWARD)
    if programs:
        launching.launch(gated_norm_kernel, programs, inputs, out, rows, tiles, eps, **sizes)
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
    skips: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, gate, weight, skip and skip_scale, in their dtypes; arguments as in ``forward``. The same bits on
    every run. The gate's gradient is written into ``into``, columns of wider rows, where it is given. The gradient of skip is
    that of x, as rounded, times skip_scale; without ``skips`` it is left to the caller and None.
    """
    inputs, rows, sizes = _arguments([x, gate, skip, dout], weight, skip_scale, gate_first, silu, STAGES)
    dx, dgate = scratch_like(x), scratch_like(gate) if into is None else into
    dskip = scratch_like(skip) if skips else None
    parts = _has_parts(weight.shape[0])
    tiles, programs = _parts(rows, weight.shape[0], PARTS_PROGRAMS if parts else PROGRAMS)
    partial = launching.scratch((programs, 1 if skip is None else 2, weight.shape[0]), torch.float32, x.device)
    if programs:
        launched = inputs, dx, dgate, dskip, partial, 0 if gate is None else dgate.stride(1), rows, tiles, eps
        launching.launch(
            gated_norm_grads_kernel, programs, *launched, **sizes, **(registers(REGISTERS) if parts else {})
        )
    sums = partial.sum(0)
    dscale = None if skip_scale is None else sums[1].view(skip_scale.shape[0], -1).sum(1).to(skip_scale.dtype)
    return dx, dgate, sums[0].to(weight.dtype), dskip, dscale
