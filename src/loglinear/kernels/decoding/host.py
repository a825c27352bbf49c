"""HOST of the step kernels: a tape repeats the launches, ``o`` is the only new tensor, and nothing waits for the device.

Tiles follow from widths alone, never from B, so the bits of a row do not depend on its neighbours. The bits do depend on
the addresses of the inputs: Triton compiles a second kernel for strides and addresses that are not multiples of 16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from loglinear.kernels.decoding.delta_close import delta_close_kernel
from loglinear.kernels.decoding.delta_step import delta_step_kernel
from loglinear.kernels.decoding.delta_token import delta_token_kernel
from loglinear.kernels.decoding.scalar_step import scalar_step_kernel
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.problem import cdiv, padded
from loglinear.kernels.tree.replay import replay


@dataclass(frozen=True)
class Launch:
    """Columns of V that a program owns, warps, and entries in flight at once in one program (of 16 bits; of 32, fewer)."""

    block_v: int
    warps: int
    stages: int
    wide_stages: int


@dataclass(frozen=True)
class Close:
    """Columns of V to a piece of work where chunks close, warps, and programs at most: each reads all positions."""

    block_v: int
    warps: int
    programs: int


# Measured on an H200 (Triton 3.6, 2026-11-22): B = 64 at 16K tokens, B = 16 at 131K, B = 1 at a million. Few columns a program
# keep all multiprocessors busy at B = 1; two warps leave room for more programs at B = 64; deep pipelines serve both.
SCALAR_GATE = Launch(block_v=32, warps=2, stages=6, wide_stages=4)
# Registers and shared memory set the delta rule's numbers: 4 programs of 4 warps that sum entries, 2 of 8 that weigh tokens.
DELTA_RULE = Launch(block_v=32, warps=4, stages=5, wide_stages=4)
MANY_KEYS = Launch(block_v=32, warps=8, stages=3, wide_stages=2)  # K > 128
TOKEN_WARPS = 8
TOKEN_REGISTERS = 128  # without this bound the compiler takes 165; at 128 it spills nothing
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


def rows_of(x: Tensor | None, like: Tensor) -> tuple[Tensor, int]:
    """x, copied if necessary, and its ``row_stride``. ``like`` replaces an absent x."""
    if x is None:
        return like, 0
    stride = row_stride(x.shape, x.stride())
    if stride is not None:
        return x, stride
    return x.clone(memory_format=torch.contiguous_format), math.prod(x.shape[2:])


@lru_cache(maxsize=256)
def constants(q: torch.Size, v: torch.Size, gated: bool, chunk: int, wide: bool, narrow: Launch) -> tuple[int, dict]:
    """Programs to start, and the compile-time arguments and launch options that both kernels share.

    q, v: shapes. wide: whether entries are float32. narrow: the launch where K is at most 128.
    """
    tile_k = padded(q[3])
    launch = narrow if tile_k <= 128 else MANY_KEYS
    tile_v = min(launch.block_v, padded(v[3]))
    programs = v[0] * v[2] * cdiv(v[3], tile_v) if v[1] else 0
    return programs, dict(
        H=v[2], G=q[2], K=q[3], V=v[3], C=chunk, LOG_C=chunk.bit_length() - 1, BK=tile_k, BV=tile_v,
        HAS_GATE=gated, STAGES=launch.wide_stages if wide else launch.stages, num_warps=launch.warps,
    )  # fmt: skip


def float32_products(dtype: torch.dtype) -> str:
    """How products of float32 numbers are taken where the inputs have ``dtype``.

    tf32x3 is three products on tensor cores, exact to 2^-21 or so: enough beside inputs of 16 bits. AMD GPUs do not have it.
    """
    return "ieee" if dtype == torch.float32 or torch.version.hip is not None else "tf32x3"


def scalar_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, level_scales: Tensor, state, scale: float = 1.0
) -> Tensor:
    """o ``[B, T, H, V]`` of T <= C tokens; they are added to ``state`` (``loglinear.DecodingState``), except to its position.

    q, k ``[B, T, G, K]`` and v ``[B, T, H, V]`` of the dtype of ``state.open_k``, 32 or 16 bits; g, level_scales any float.
    """
    held = (state.position, state.entries, state.decay, state.open_k, state.open_v, state.open_g)
    return replay(run_scalar_step, [q, k, v, g, level_scales, *held], state.chunk_size, scale)[0]


def run_scalar_step(inputs: list, chunk: int, scale: float) -> tuple[Tensor]:
    """The launch of ``scalar_step``."""
    (q, k, v, g, level_scales), held = inputs[:5], inputs[5:]
    entries = held[1]
    o = launching.scratch(v.shape, v.dtype, v.device)
    wide = entries.dtype == torch.float32
    programs, options = constants(q.shape, v.shape, g is not None, chunk, wide, SCALAR_GATE)
    rows, strides = zip(*(rows_of(x, v) for x in (q, k, v, g, level_scales)))
    if programs:
        launching.launch(
            scalar_step_kernel, programs,
            *rows, o, *held, v.shape[1], level_scales.shape[3], entries.shape[2], *strides, scale, **options,
            PRECISION="ieee" if v.dtype == torch.float32 else "tf32",
        )  # fmt: skip
    return (o,)


def delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    level_scales: Tensor,
    state,
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """The same with the delta rule; ``normalize`` divides q and k by their lengths first."""
    held = (state.position, state.entries, state.open_k, state.open_v, state.open_g, state.open_solve)
    return replay(run_delta_step, [q, k, v, g, beta, level_scales, *held], state.chunk_size, scale, normalize)[0]


def run_delta_step(inputs: list, chunk: int, scale: float, normalize: bool) -> tuple[Tensor]:
    """The launches of ``delta_step``: weights of its tokens, the sums, chunks that close, and sums in the chunk after."""
    (q, k, v, g, beta, level_scales), held = inputs[:6], inputs[6:]
    position, entries, open_k, open_v, open_g, open_solve = held
    batch, length, heads, width = v.shape
    o = launching.scratch(v.shape, v.dtype, v.device)
    wide = entries.dtype == torch.float32
    programs, options = constants(q.shape, v.shape, g is not None, chunk, wide, DELTA_RULE)
    if not programs:
        return (o,)
    reach = launching.scratch((batch, length, heads, q.shape[3]), torch.float32, v.device)
    read = launching.scratch((batch, length, heads, chunk), torch.float32, v.device)
    rows, strides = zip(*(rows_of(x, v) for x in (q, k, v, g, beta, level_scales)))
    sizes = dict(H=heads, G=q.shape[2], K=q.shape[3], C=chunk, BK=options["BK"])
    cap = {"maxnreg": TOKEN_REGISTERS} if options["BK"] <= 128 and torch.version.hip is None else {}
    launching.launch(
        delta_token_kernel, batch * heads, *rows[:2], *rows[3:], reach, read, position, open_k, open_g, open_solve,
        length, level_scales.shape[3], *strides[:2], *strides[3:], scale, **sizes, HAS_GATE=g is not None,
        NORM=normalize, num_warps=TOKEN_WARPS, **cap,
    )  # fmt: skip
    kept = {name: value for name, value in options.items() if name not in ("G", "HAS_GATE")}
    for later in range(min(length, 2)):
        launching.launch(
            delta_step_kernel, programs, rows[2], rows[5], o, reach, read, position, entries, open_v,
            length, level_scales.shape[3], entries.shape[2], later, strides[2], strides[5], **kept,
        )  # fmt: skip
        if later == 0:
            tile_v = min(CLOSE.block_v, padded(width))
            pieces = batch * heads * cdiv(width, tile_v) * (entries.shape[2] + 1)
            launching.launch(
                delta_close_kernel, min(pieces, CLOSE.programs), *held, batch, length, entries.shape[2],
                **sizes, V=width, BV=tile_v, PRECISION=float32_products(v.dtype), num_warps=CLOSE.warps,
            )  # fmt: skip
    return (o,)
