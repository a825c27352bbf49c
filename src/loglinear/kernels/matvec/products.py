"""PRODUCTS of one token, or a few, with weights: the time is that of reading the weights.

``y = x @ weightᵀ`` for a few rows of x, with the operations between a decoder's products inside:

* before it, the root-mean-square norm of x. Its factor is one number a row, which multiplies the sums;
* behind it, a sum with the residual stream, or the gate of SwiGLU between two products;
* beside it, the count of the tokens that a step has taken in.

A program owns some rows of the weight. It asks for all of them before it asks for x, and keeps them in registers. On Hopper
GPUs the launches are dependent ones (``tree/dependent.py``): a program starts while the launch before it still runs, and waits
for its results behind the loads of weights, which depend on nothing.

Sums are float32. Their order follows from the weight's sizes and from whether there is one row of x or more.

Legend: B rows of x, K columns of weights, N rows of the first weight, M of the second.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import constants, hash_of
from loglinear.kernels.tree.dependent import dependent_launch, launch_dependents, wait
from loglinear.kernels.tree.problem import cdiv


class Operands(NamedTuple):
    """The tensors of a launch, read and written; None where absent."""

    x: Any  # [B, K]
    first: Any  # [N, K]
    second: Any  # [M, K]
    norm: Any  # [K], the weight of the norm
    added: Any  # [B, N]
    position: Any  # [B / T], counts the tokens of T rows of x each
    y: Any  # [B, N]
    z: Any  # [B, M]


class Sizes(NamedTuple):
    """Sizes of a launch: letters of the legend; a program has ROWS rows of a weight, in BLOCKS of COLUMNS columns.

    GATED: SwiGLU.
    """

    K: Any
    N: Any
    M: Any
    ROWS: Any
    COLUMNS: Any
    BLOCKS: Any
    GATED: Any
    __hash__ = hash_of


@triton.jit
def load_rows(weight, first, count, S: tl.constexpr):
    """Blocks ``[ROWS, COLUMNS]`` of the rows from ``first`` on; rows past ``count`` repeat the last. Each is read once."""
    rows = tl.minimum(first + tl.arange(0, S.ROWS), count - 1)
    start = weight + rows.to(tl.int64)[:, None] * S.K
    blocks = ()
    for i in tl.static_range(S.BLOCKS):
        columns = i * S.COLUMNS + tl.arange(0, S.COLUMNS)[None, :]
        if (i + 1) * S.COLUMNS <= S.K:
            block = tl.load(start + columns, eviction_policy="evict_first")
        else:
            block = tl.load(start + columns, mask=columns < S.K, other=0.0, eviction_policy="evict_first")
        blocks = blocks + (block,)
    return blocks


@triton.jit
def load_row(x, S: tl.constexpr):
    """Blocks ``[COLUMNS]`` of a row; zeros past its end."""
    blocks = ()
    for i in tl.static_range(S.BLOCKS):
        columns = i * S.COLUMNS + tl.arange(0, S.COLUMNS)
        if (i + 1) * S.COLUMNS <= S.K:
            block = tl.load(x + columns)
        else:
            block = tl.load(x + columns, mask=columns < S.K, other=0.0)
        blocks = blocks + (block,)
    return blocks


@triton.jit
def weighed(rows, x, S: tl.constexpr):
    """``[ROWS, COLUMNS]``: blocks of rows times blocks of x, added up over the blocks."""
    total = rows[0].to(tl.float32) * x[0][None, :]
    for i in tl.static_range(1, S.BLOCKS):
        total += rows[i].to(tl.float32) * x[i][None, :]
    return total


@triton.jit
def three_sums(a, b, c):
    """Sums along the columns of three tensors ``[ROWS, COLUMNS]``, by one exchange between the warps."""
    first, c = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, c)), axis=1))
    a, b = tl.split(first)
    return a, b, tl.split(c)[0]


@triton.jit
def move_on(position, count, T):
    """Add T to the positions, in one program."""
    if tl.program_id(0) == 0:
        for row in range(count):
            tl.store(position + row, tl.load(position + row) + T)


@triton.jit(do_not_specialize=["T", "eps"])
def products_kernel(x, B, T, eps, S: tl.constexpr, EARLY: tl.constexpr):
    """y, and z if there are two products. Grid: blocks of rows of the first weight, and then of the second.

    GATED: z is absent, and ``y = silu(x @ firstᵀ) · (x @ secondᵀ)``.
    """
    first = tl.program_id(0) * S.ROWS
    weight, out, count = x.first, x.y, first * 0 + S.N
    if x.z is not None:
        BLOCKS: tl.constexpr = (S.N + S.ROWS - 1) // S.ROWS
        other = tl.program_id(0) >= BLOCKS
        weight, out = tl.where(other, x.second, x.first), tl.where(other, x.z, x.y)
        first, count = tl.where(other, first - BLOCKS * S.ROWS, first), tl.where(other, S.M, S.N)
    rows = load_rows(weight, first, count, S)
    if S.GATED:
        others = load_rows(x.second, first, count, S)
    if x.norm is not None:
        scales = load_row(x.norm, S)
    if EARLY:
        launch_dependents()
        wait()
    if x.position is not None:
        move_on(x.position, B // T, T)
    places = first + tl.arange(0, S.ROWS)
    for b in range(B):
        given = load_row(x.x + b * S.K, S)
        values = ()
        squares = tl.zeros([S.COLUMNS], tl.float32)
        for i in tl.static_range(S.BLOCKS):
            value = given[i].to(tl.float32)
            if x.norm is not None:
                squares += value * value
                value *= scales[i].to(tl.float32)
            values = values + (value,)
        total = weighed(rows, values, S)
        up = total
        if S.GATED:
            up = weighed(others, values, S)
        result, up, norms = three_sums(total, up, tl.broadcast_to(squares[None, :], total.shape))
        if x.norm is not None:
            inverse = tl.rsqrt(norms / S.K + eps)
            result *= inverse
            up *= inverse
        if S.GATED:
            result *= tl.sigmoid(result) * up
        if x.added is not None:
            result += tl.load(x.added + b * S.N + places, mask=places < count, other=0.0).to(tl.float32)
        tl.store(out + b * count + places, result.to(out.dtype.element_ty), mask=places < count)


class Launch(NamedTuple):
    """Rows of a program, columns of a block, warps."""

    rows: int
    columns: int
    warps: int


# Measured, whole tokens of 825M parameters: H200, Triton 3.6, bf16, 2026-11-30. One row: 0.81 ms with one warp a program, which
# exchanges nothing through shared memory, 0.84 with two or four warps. With more rows one warp has too few registers.
ONE = Launch(rows=2, columns=256, warps=1)
FEW = Launch(rows=4, columns=512, warps=2)
NARROW = 2048  # columns up to which a program has all these rows; it has half of them where a row is wider, or for two weights


def launch_of(rows: int, columns: int, gated: bool) -> Launch:
    """The launch for so many rows of x and columns of weights."""
    spills = gated and columns > NARROW  # one warp with two wide weights (sm_90, Triton 3.6)
    launch = ONE if rows == 1 and not spills else FEW
    return launch._replace(rows=max(launch.rows // (2 if gated else 1) // (1 if columns <= NARROW else 2), 1))


def products(
    x: Tensor,
    first: Tensor,
    second: Tensor | None = None,
    norm: Tensor | None = None,
    added: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``x @ firstᵀ`` and ``x @ secondᵀ``, or None without a second; all contiguous, at most 32 bits, of one dtype.

    Args:
        x: ``[..., K]``. first, second: ``[N, K]`` and ``[M, K]``. norm: ``[K]``; x is then divided by its root mean square,
            with eps below the root, and multiplied by ``norm``. added: ``[..., N]``, to be added to the first product.
        gated: the results are ``silu(x @ firstᵀ) · (x @ secondᵀ)`` and None; M is N.
        position: int64 ``[B]``, contiguous, for x ``[B, T, K]``; T is added to it.
    """
    return launching.replay(run_products, [x, first, second, norm, added, position], eps, gated)


def run_products(inputs: list, eps: float, gated: bool) -> tuple[Tensor, Tensor | None]:
    """The launch of ``products``."""
    x, first, second, _, _, position = inputs
    (*leading, K), N, M = x.shape, first.shape[0], 0 if second is None else second.shape[0]
    y = launching.scratch((*leading, N), x.dtype, x.device)
    z = None if second is None or gated else launching.scratch((*leading, M), x.dtype, x.device)
    rows = x.numel() // K
    length = 1 if position is None else rows // position.shape[0]
    launch = launch_of(rows, K, gated)
    S = constants(Sizes, K, N, M, launch.rows, launch.columns, cdiv(K, launch.columns), gated)
    programs = cdiv(N, launch.rows) + (0 if z is None else cdiv(M, launch.rows))
    options = dict(S=S, num_warps=launch.warps, num_stages=1, **dependent_launch(x.device))
    launching.launch(products_kernel, programs, Operands(*inputs, y, z), rows, length, eps, **options)
    return y, z
