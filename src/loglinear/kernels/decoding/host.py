"""HOST of the step kernels: a tape repeats the launches, ``o`` is the only new tensor, and nothing waits for the device.

Tiles follow from widths alone, never from B, so the bits of a row do not depend on its neighbours. The bits do depend on
the addresses of the inputs: Triton compiles a second kernel for strides and addresses that are not multiples of 16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from loglinear.kernels.decoding.carried_close import carried_close_kernel
from loglinear.kernels.decoding.carried_step import carried_step_kernel
from loglinear.kernels.decoding.carried_token import carried_token_kernel
from loglinear.kernels.decoding.open_chunk import Sizes, held_of
from loglinear.kernels.decoding.scalar_step import Gate, scalar_step_kernel
from loglinear.kernels.pointwise.rows import scratch_like
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import Inputs, constants
from loglinear.kernels.tree.dependent import dependent, dependent_launch
from loglinear.kernels.tree.problem import cdiv, padded
from loglinear.transition import is_per_channel


@dataclass(frozen=True)
class Launch:
    """Columns of V that a program owns, warps, and stages of its loop: one more than the entries on their way to it."""

    block_v: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Close:
    """Columns of V to a piece of work where chunks close, warps, and programs at most: each reads all positions."""

    block_v: int
    warps: int
    programs: int


# By the bytes of a number of the entries. Measured on an H200 (Triton 3.6, 2026-11-30): B = 64 at 16K tokens, B = 16 at 131K,
# B = 1 at a million. Rows of 128 bytes and few warps, which leave room for more programs, serve all three.
SCALAR_GATE = {2: Launch(block_v=32, warps=2, stages=6), 4: Launch(block_v=32, warps=2, stages=4)}
CARRIED = {2: Launch(block_v=64, warps=4, stages=4), 4: Launch(block_v=32, warps=2, stages=3)}
# A row by its index comes one load later. Fewer bytes under way let that load pass: 5 to 7% of a step at B = 256.
CARRIED_BY_INDEX = CARRIED | {2: Launch(block_v=64, warps=4, stages=3)}
MANY_KEYS = {2: Launch(block_v=32, warps=8, stages=3), 4: Launch(block_v=32, warps=8, stages=2)}  # K > 128
TOKEN_STAGES = 3
CLOSE = Close(block_v=32, warps=4, programs=256)


@lru_cache(maxsize=4096)
def row_stride(shape: torch.Size, strides: tuple[int, ...]) -> int | None:
    """The s for which token t of row b begins at (b*T + t) * s and is contiguous; None if no such s exists."""
    batch, length, *inner = shape
    stride = strides[0] if length == 1 else strides[1]
    if batch == length == 1:  # the stride is arbitrary here, and must choose the kernel of a batch
        stride = max(stride, math.prod(inner))
    whole = batch == 1 or length == 1 or strides[0] == length * stride
    packed = all(strides[i + 2] == math.prod(inner[i + 1 :]) or inner[i] == 1 for i in range(len(inner)))
    return stride if whole and packed else None


def gather(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, level_scales: Tensor | None, factor: float
) -> Inputs:
    """Inputs of a step, copied where they have no ``row_stride``."""
    rows: list[Any] = [q, k, v, g, beta, level_scales]
    strides = [0 if x is None else row_stride(x.shape, x.stride()) for x in rows]
    for i, stride in enumerate(strides):
        if stride is None:
            rows[i], strides[i] = rows[i].clone(memory_format=torch.contiguous_format), math.prod(rows[i].shape[2:])
    return Inputs(*rows, None, *strides, None, factor)


@lru_cache(maxsize=1024)
def tiles_of(
    q: torch.Size, v: torch.Size, chunk: int, block_v: int, precision: str = "ieee", gates: int = 1, delta: bool = False
) -> tuple[int, Sizes]:
    """(Tiles of V x H x B, sizes) of a launch for q and v of these shapes, with tiles of ``block_v`` columns at most."""
    tile_v = min(block_v, padded(v[3]))
    letters = v[2], q[2], q[3], v[3], chunk, chunk.bit_length() - 1
    return v[0] * v[2] * cdiv(v[3], tile_v), constants(Sizes, *letters, padded(q[3]), tile_v, precision, gates, delta)


def chosen(launches: dict[int, Launch], q: Tensor, entries: Tensor) -> tuple[Launch, dict]:
    """The launch for keys as wide as these, and its options: one of ``launches`` where K is at most 128."""
    launch = (launches if q.shape[3] <= 128 else MANY_KEYS)[entries.element_size()]
    return launch, dict(STAGES=launch.stages, num_warps=launch.warps)


def float32_products(dtype: torch.dtype) -> str:
    """How products of float32 numbers are taken where the inputs have ``dtype``.

    tf32x3 is three products on tensor cores, exact to 2^-21 or so: enough beside inputs of 16 bits. AMD GPUs do not have it.
    """
    return "ieee" if dtype == torch.float32 or torch.version.hip is not None else "tf32x3"


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    level_scales: Tensor,
    state,
    beta: Tensor | None = None,
    scale: float = 1.0,
    rows: Tensor | None = None,
    normalize: bool = False,
    gate: tuple[Tensor | None, ...] = (None, None, None),
) -> Tensor:
    """o ``[B, T, H, V]`` of T <= C tokens; they are added to ``state`` (``loglinear.DecodingState``), except to its position.

    q, k ``[B, T, G, K]`` and v ``[B, T, H, V]`` of the dtype of ``state.open_k``, 32 or 16 bits; g, beta, level_scales any
    float. rows: int64 ``[B]``, the row of the state for each row of q; None: they are the same. Each one lies in one piece.
    normalize: divide q and k by their lengths first, where there is a β. gate: skip ``[B, T, H·V]``, D ``[H]`` and z
    ``[B, T, H·V]`` of ``(o + D · skip) · silu(z)`` in the place of o, where g is of a head. The rows of skip, and the rows of
    z, may be any one distance apart.
    """
    if state.decay is None and g is not None:  # the kernel takes a token's gates from the call and from the state alike
        g = g.float()
    shared = state.position, state.entries, state.open_k, state.open_v, state.open_g
    inputs = [q, k, v, g, beta, level_scales, *shared, state.decay, state.open_solve, rows]
    if state.decay is not None:
        return launching.replay(run_scalar_step, [*inputs, *gate], state.chunk_size, scale)[0]
    return launching.replay(run_carried_step, inputs, state.chunk_size, scale, normalize)[0]


def run_scalar_step(inputs: list, chunk: int, scale: float) -> tuple[Tensor]:
    """The launch of the scalar gate."""
    x, held, (skip, D, z) = gather(*inputs[:6], scale), held_of(inputs[6:14]), inputs[14:]
    gate = None if z is None else Gate(skip, D, z, *(row_stride(y.shape, y.stride()) for y in (skip, z)))
    q, v = x.q, x.v
    o = scratch_like(v)
    launch, options = chosen(SCALAR_GATE, q, held.entries)
    precision = "ieee" if v.dtype == torch.float32 else "tf32"
    programs, S = tiles_of(q.shape, v.shape, chunk, launch.block_v, precision)
    if o.numel():
        counts = v.shape[1], x.scales.shape[3], held.entries.shape[2]
        options |= dependent_launch(v.device)
        launching.launch(scalar_step_kernel, programs, x, held, gate, o, *counts, S=S, **options)
    return (o,)


def run_carried_step(inputs: list, chunk: int, scale: float, normalize: bool) -> tuple[Tensor]:
    """The launches where entries are carried: weights of the tokens, sums, chunks that close, and sums in the chunk after."""
    per_channel = is_per_channel(inputs[3])
    x, held = gather(*inputs[:6], scale), held_of(inputs[6:])
    q, v = x.q, x.v
    batch, length, heads, width = v.shape
    T, L, M = length, x.scales.shape[3], held.entries.shape[2]
    o = scratch_like(v)
    if not o.numel():
        return (o,)
    reach = launching.scratch((batch, length, heads, q.shape[3]), torch.float32, v.device)
    read = launching.scratch((batch, length, heads, chunk), torch.float32, v.device)
    positions = launching.scratch((batch,), torch.int32, v.device)
    kind = dict(gates=q.shape[3] if per_channel else 1, delta=x.beta is not None)
    programs, S = tiles_of(q.shape, v.shape, chunk, padded(width), **kind)
    early = dependent(v.device)
    options = dict(S=S, NORM=normalize, STAGES=TOKEN_STAGES, EARLY=early, num_warps=1)
    launching.launch(carried_token_kernel, programs, x, held, reach, read, positions, T, **options)
    launch, options = chosen(CARRIED if held.rows is None else CARRIED_BY_INDEX, q, held.entries)
    programs, S = tiles_of(q.shape, v.shape, chunk, launch.block_v, **kind)
    after = dependent_launch(v.device)
    for later in range(min(length, 2)):
        if later:  # entries are those that the launch before has written
            after = dict(EARLY=False)
        launching.launch(
            carried_step_kernel, programs, x, held, o, reach, read, T, L, M, later, S=S, **options, **after
        )
        if later == 0:
            precision = float32_products(v.dtype)
            pieces, own = tiles_of(q.shape, v.shape, chunk, CLOSE.block_v, precision, **kind)
            programs_of_pieces = min(pieces * (M + 1), CLOSE.programs)
            options_of_pieces = dict(S=own, num_warps=CLOSE.warps, **after)
            launching.launch(
                carried_close_kernel, programs_of_pieces, held, positions, batch, T, M, **options_of_pieces
            )
    return (o,)
