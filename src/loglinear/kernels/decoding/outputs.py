"""OUTPUTS of a mixer's step: the skip, the gate and the norm in one launch, which also advances the positions of the rows.

A position may change only after the last program of the step has read it. This launch is the last one of the step, so one of
its programs for each row adds the tokens to the position. This saves a separate launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.decoding.host import row_stride
from loglinear.kernels.decoding.open_chunk import held_row
from loglinear.kernels.pointwise.functions import gate_of
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.dependent import dependent_launch, launch_dependents, wait


@triton.jit
def root_mean_square_norm(x, weight, columns, inside, eps, N: tl.constexpr):
    """Float32 x ``[BLOCK]``, zero outside, over its root mean square, times the weight."""
    mean = tl.sum(x * x, axis=0) / N
    return x * tl.rsqrt(mean + eps) * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def step_outputs_kernel(
    o,  # [B, T, GROUPS, N]
    x,
    D,
    gate,
    weight,
    position,
    rows,
    y,  # [B, T, GROUPS, N]
    T,
    stride_x,
    stride_gate,
    stride_position,
    eps,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    V: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: tokens x groups of N columns that are normed together. float32: gate and norm; the skip rounds as plain code."""
    if EARLY:
        launch_dependents()
        wait()
    token = (tl.program_id(0) // GROUPS).to(tl.int64)
    group = tl.program_id(0) % GROUPS
    columns = tl.arange(0, BLOCK)
    inside = columns < N
    place = group * N + columns
    value = tl.load(o + token * (GROUPS * N) + place, mask=inside, other=0.0)
    if x is not None:
        strength = tl.load(D + place // V, mask=inside, other=0.0).to(value.dtype).to(tl.float32)
        passed = tl.load(x + token * stride_x + place, mask=inside, other=0.0).to(tl.float32) * strength
        value = (value.to(tl.float32) + passed.to(value.dtype).to(tl.float32)).to(value.dtype)
    wide = value.to(tl.float32)
    z = tl.load(gate + token * stride_gate + place, mask=inside, other=0.0).to(tl.float32)
    opening = gate_of(z, tl.sigmoid(z), SILU)
    if GATE_FIRST:
        out = root_mean_square_norm(wide * opening, weight, columns, inside, eps, N)
    else:
        out = root_mean_square_norm(wide, weight, columns, inside, eps, N) * opening
    tl.store(y + token * (GROUPS * N) + place, out.to(y.dtype.element_ty), mask=inside)
    if (group == 0) & (token % T == 0):
        row = position + held_row(rows, token // T) * stride_position
        tl.store(row, tl.load(row) + T)


def step_outputs(
    o: Tensor,
    x: Tensor | None,
    D: Tensor | None,
    gate: Tensor,
    weight: Tensor,
    position: Tensor,
    eps: float,
    gate_first: bool,
    silu: bool = True,
    rows: Tensor | None = None,
) -> Tensor:
    """``norm(o + D x, gate)`` ``[B, T, H·V]`` as ``GatedRMSNorm`` has it; T is added to ``position``, int64.

    Args:
        o: ``[B, T, H, V]``, contiguous. x, D: the skip, ``[B, T, H·V]`` and ``[H]``, or None. gate: ``[B, T, H·V]``. The
            rows of x, and the rows of gate, may be any one distance apart.
        weight: of the norm, ``[H·V]`` or ``[V]``. gate_first: whether the gate comes before the norm. silu: whether the gate is
            SiLU's, and not the sigmoid's. rows: int64 ``[B]``, the place in ``position`` of each row; None: they are the same.
    """
    return launching.replay(run_step_outputs, [o, x, D, gate, weight, position, rows], eps, gate_first, silu)[0]


def run_step_outputs(inputs: list, eps: float, gate_first: bool, silu: bool) -> tuple[Tensor]:
    """The launch of ``step_outputs``."""
    o, x, _, gate, weight, position, _ = inputs
    batch, length, heads, width = o.shape
    y = launching.scratch((batch, length, heads * width), o.dtype, o.device)
    normed = weight.shape[0]
    groups, block = heads * width // normed, triton.next_power_of_2(normed)
    strides = [0 if part is None else row_stride(part.shape, part.stride()) for part in (x, gate)]
    if y.numel():
        sizes = dict(N=normed, GROUPS=groups, V=width, GATE_FIRST=gate_first, SILU=silu, BLOCK=block)
        launching.launch(
            step_outputs_kernel,
            batch * length * groups,
            *inputs,
            y,
            length,
            *strides,
            position.stride(0),
            eps,
            **sizes,
            num_warps=warps_for(block),
            **dependent_launch(o.device),
        )
    return (y,)


def warps_for(block: int) -> int:
    """Sixteen numbers a thread, in at most eight warps."""
    return min(max(block // 512, 1), 8)
