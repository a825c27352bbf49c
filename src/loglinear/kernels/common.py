"""Functions that every kernel shares: the place of a chunk, bit arithmetic, decays, and the λ mask inside a chunk.

A kernel computes a level from the bits of two positions, in registers. There is no table of levels.

Legend of all kernels: B batch, T tokens, C chunk, N chunks, H value heads, G q/k groups, K, V widths, L levels. A *row* is
one chunk of one sequence, numbered through the batch; a *group* is ``GROUP`` consecutive chunks, aligned in the sequence.
Logs of decays are float32 in base 2. Offsets that can pass 2^31 elements are int64.

Decays. A gate is clamped at ``GATE_FLOOR``, where exp has underflowed to zero in float32, so that a hard reset (-inf)
acts as one and every sum of logs stays finite: a difference of two sums is never inf - inf. Differences are taken only
inside a chunk. Float32 inputs keep the sums as a pair (value, rounding error), so that they stay exact to 2^-30 after
a reset too; 16-bit inputs keep the value alone.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from loglinear.kernels.replay import recording

GROUP = tl.constexpr(8)  # chunks per group: three levels of the tree are built in registers
LOG_GROUP = tl.constexpr(3)
SUB = tl.constexpr(16)  # tokens per sub-block of the mask: pairs in two sub-blocks share one level
LOG_SUB = tl.constexpr(4)
GATE_FLOOR = tl.constexpr(-128.0)  # exp(-128) < 2^-149, the smallest float32
LOG2_E = tl.constexpr(1.4426950408889634)


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory for results and intermediates. Tests replace it by memory full of NaN."""
    memory = torch.empty(shape, dtype=dtype, device=device)
    note = recording()
    if note is not None:
        note.allocated(memory)
    return memory


def launch(kernel, programs: int, *arguments, **constants) -> None:
    """Start ``programs`` programs of a kernel; ``constants`` are its compile-time arguments and launch options."""
    device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        compiled = kernel[(programs,)](*arguments, **constants)
    note = recording()
    if note is not None:
        values = [constants[name] for name in kernel.arg_names[len(arguments) :]]
        note.launched(compiled, programs, [*arguments, *values])


@triton.jit
def log2_of_power(x):
    """Exponent of a power of two (int32 scalar or tensor)."""
    return (x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def bit_length(x):
    """Bits needed to write 0 <= x < 2^24: the level at which two positions with this XOR see each other."""
    return tl.maximum((x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126, 0)


@triton.jit
def lowbit(e):
    return e & -e


@triton.jit
def path_length(n, n0):
    """Number of entries above n0 on the query path of chunk n."""
    count = 0
    e = n
    while e > n0:
        e = e & (e - 1)
        count += 1
    return count


@triton.jit
def locate(unit, unit_sequence, sequences, T, N, NG, units, PACKED: tl.constexpr):
    """Where a row or group lies: (first token of its sequence, tokens, first row, first group, n0, sequence).

    n0 is the absolute number of the sequence's first chunk: 0 unless it continues an earlier one.

    PACKED reads them from tables (see problem.py); otherwise all sequences have T tokens, N chunks and NG groups, and
    ``units`` is N or NG. tokens = -1 marks a unit past the last one.
    """
    if PACKED:
        index = tl.load(unit_sequence + unit)
        entry = sequences + tl.maximum(index, 0) * 5
        start = tl.load(entry)
        length = tl.where(index < 0, -1, tl.load(entry + 1))
        row0 = tl.load(entry + 2)
        group0 = tl.load(entry + 3)
        n0 = tl.load(entry + 4)
    else:
        index = unit // units
        start = index * T
        length = T
        row0 = index * N
        group0 = index * NG
        n0 = index * 0
    return start, length, row0, group0, n0, index


@triton.jit
def load_tile(base, stride, valid, C: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, first):
    """Tile ``[C, TILE]`` of columns from ``first`` on; ``base`` points at the chunk's first token, column 0 of a head.

    Offsets inside a chunk are int32: as int64 they would hold registers through every loop.
    """
    columns = first + tl.arange(0, TILE)
    pointers = base + (tl.arange(0, C)[:, None] * stride + columns[None, :])
    if WIDTH % TILE == 0:
        tile = tl.load(pointers, mask=valid[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=valid[:, None] & (columns < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(base, stride, valid, tile, C: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, first):
    """Write a tile where ``load_tile`` reads one."""
    columns = first + tl.arange(0, TILE)
    pointers = base + (tl.arange(0, C)[:, None] * stride + columns[None, :])
    value = tile.to(base.dtype.element_ty)
    if WIDTH % TILE == 0:
        tl.store(pointers, value, mask=valid[:, None])
    else:
        tl.store(pointers, value, mask=valid[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def state_tile(base, first_k, first_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Pointers and mask of tile ``[BK, BV]`` of one state ``[K, V]``."""
    rows = first_k + tl.arange(0, BK)
    columns = first_v + tl.arange(0, BV)
    mask = (rows < K)[:, None] & (columns < V)[None, :]
    return base + (rows[:, None] * V + columns[None, :]), mask


@triton.jit
def load_state(base, first_k, first_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    pointers, mask = state_tile(base, first_k, first_v, K, V, BK, BV)
    if K % BK == 0 and V % BV == 0:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def store_state(
    base, tile, active, first_k, first_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
):
    pointers, mask = state_tile(base, first_k, first_v, K, V, BK, BV)
    if active:
        if K % BK == 0 and V % BV == 0:
            tl.store(pointers, tile.to(base.dtype.element_ty))
        else:
            tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def at_most_zero(x):
    """``min(x, 0)``; NaN where x is NaN."""
    return tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_gates(g, stride, valid, HAS_GATE: tl.constexpr, EXACT: tl.constexpr, C: tl.constexpr):
    """Log2-decays of a chunk ``[C]``, clamped; NaN for NaN and for an infinite growth."""
    if EXACT:
        gate = tl.zeros([C], tl.float64)
    else:
        gate = tl.zeros([C], tl.float32)
    if HAS_GATE:
        raw = tl.load(g + tl.arange(0, C) * stride, mask=valid, other=0.0).to(gate.dtype)
        gate += tl.where(raw < float("inf"), tl.maximum(raw, GATE_FLOOR), float("nan")) * LOG2_E
    return gate


@triton.jit
def gate_sums(gate):
    """Cumulative log2-decay of a chunk ``[C]``: (value, rounding error, decay to the end, total)."""
    sums = tl.cumsum(gate, axis=0)
    total = tl.sum(gate, axis=0)
    high = sums.to(tl.float32)
    low = (sums - high.to(sums.dtype)).to(tl.float32)
    to_end = tl.exp2(at_most_zero((total - sums).to(tl.float32)))
    return high, low, to_end, total.to(tl.float32)


@triton.jit
def load_sum(sums, offsets, valid, plane, EXACT: tl.constexpr):
    """Cumulative log-decay at ``offsets``, zero where not valid: (value, its rounding error or 0)."""
    high = tl.load(sums + offsets, mask=valid, other=0.0)
    low = tl.load(sums + plane + offsets, mask=valid, other=0.0) if EXACT else 0.0
    return high, low


@triton.jit
def decay_between(late_high, late_low, early_high, early_low, EXACT: tl.constexpr):
    """exp2 of the log-decay from an earlier to a later token of a chunk. Capped at 1, for rows that are masked later."""
    difference = late_high - early_high
    if EXACT:
        difference += late_low - early_low
    return tl.exp2(at_most_zero(difference))


@triton.jit
def to_chunk_end(sums, size, plane, C: tl.constexpr, EXACT: tl.constexpr):
    """Decay from each token of a chunk of ``size`` tokens to its end ``[C]``."""
    in_chunk = tl.arange(0, C)
    high, low = load_sum(sums, in_chunk, in_chunk < size, plane, EXACT)
    last_high, last_low = load_sum(sums, tl.minimum(size, C) - 1, True, plane, EXACT)
    return decay_between(last_high, last_low, high, low, EXACT)


@triton.jit
def local_levels(C: tl.constexpr):
    """Levels inside a chunk of C tokens: (``[C, SUB]`` in a row's own sub-block, ``[C, C/SUB]`` towards whole others)."""
    t = tl.arange(0, C)
    own = bit_length((t % SUB)[:, None] ^ tl.arange(0, SUB)[None, :])
    other = LOG_SUB + bit_length((t // SUB)[:, None] ^ tl.arange(0, C // SUB)[None, :])
    return own, other


@triton.jit
def local_scales(scales, valid, stride, factor, L, C: tl.constexpr):
    """λ of a row towards its own sub-block ``[C, SUB]`` and towards the earlier ones ``[C, C/SUB]``, times ``factor``.

    ``scales`` points at the first token of the chunk, level 0. Zero above the diagonal and for rows that are not valid.
    """
    t = tl.arange(0, C)
    own, other = local_levels(C)
    below = (tl.arange(0, SUB)[None, :] <= (t % SUB)[:, None]) & valid[:, None]
    before = (tl.arange(0, C // SUB)[None, :] < (t // SUB)[:, None]) & valid[:, None]
    row = t[:, None] * stride
    near = tl.load(scales + (row + tl.minimum(own, L - 1)), mask=below, other=0.0).to(tl.float32) * factor
    far = tl.load(scales + (row + tl.minimum(other, L - 1)), mask=before, other=0.0).to(tl.float32) * factor
    return near, far


@triton.jit
def local_decays(sums, size, plane, C: tl.constexpr, EXACT: tl.constexpr):
    """Decays inside a chunk of ``size`` tokens, as (near ``[C, SUB]``, far ``[C, C/SUB]``, column ``[C/SUB, SUB]``).
    From token s to t: near in one sub-block; otherwise far[t, block of s] * column[s], over the end of s's sub-block.
    Both factors are at most 1, and there are C + C²/SUB + C·SUB exponentials instead of C².
    """
    t = tl.arange(0, C)
    block = tl.arange(0, C // SUB)
    inner = tl.arange(0, SUB)
    # Each view of the sums is loaded anew: to move one between register layouts costs more than the cache does.
    row_high, row_low = load_sum(sums, t, t < size, plane, EXACT)
    near = (t // SUB * SUB)[:, None] + inner[None, :]
    near_high, near_low = load_sum(sums, near, near < size, plane, EXACT)
    end = block * SUB + SUB - 1
    end_high, end_low = load_sum(sums, end, end < size, plane, EXACT)
    column = block[:, None] * SUB + inner[None, :]
    column_high, column_low = load_sum(sums, column, column < size, plane, EXACT)
    if EXACT:
        near_decay = decay_between(row_high[:, None], row_low[:, None], near_high, near_low, True)
        far_decay = decay_between(row_high[:, None], row_low[:, None], end_high[None, :], end_low[None, :], True)
        column_decay = decay_between(end_high[:, None], end_low[:, None], column_high, column_low, True)
    else:
        near_decay = decay_between(row_high[:, None], 0.0, near_high, 0.0, False)
        far_decay = decay_between(row_high[:, None], 0.0, end_high[None, :], 0.0, False)
        column_decay = decay_between(end_high[:, None], 0.0, column_high, 0.0, False)
    return near_decay, far_decay, column_decay


@triton.jit
def assemble_mask(near, far, column, C: tl.constexpr):
    """``[C, C/SUB, SUB]`` mask from its parts: ``near`` in a row's own sub-block, ``far * column`` in the others."""
    own = (tl.arange(0, C) // SUB)[:, None] == tl.arange(0, C // SUB)[None, :]
    return tl.where(own[:, :, None], near[:, None, :], far[:, :, None] * column[None, :, :])


@triton.jit
def path_weights(scales, stride_s, valid, row_sums, entry_log, rows, n, n0, h, L, H: tl.constexpr, C: tl.constexpr,
                 LOG_C: tl.constexpr, TREE: tl.constexpr):  # fmt: skip
    """``λ exp2(log-decay)`` ``[C, TREE]`` of each row towards the entry of every tree level on the path of chunk n.

    Everything that a walk needs, except the states, is loaded at once. No product of the walk waits for its weight.
    """
    m = tl.arange(0, TREE)
    on_path = ((n >> m) & 1 == 1) & ((n >> m << m) > n0)
    # The logs of the entries before: a cumulative sum minus the entry's own log would lose the logs behind a reset.
    below = tl.maximum(m - 1, 0)
    before = (m > 0) & ((n >> below) & 1 == 1) & ((n >> below << below) > n0)
    unit = (rows + (n >> below << below) - 1).to(tl.int64) * H + h
    since = tl.cumsum(tl.load(entry_log + unit, mask=before, other=0.0), axis=0)
    level = tl.minimum(m + (LOG_C + 1), L - 1)
    pointers = scales + tl.arange(0, C)[:, None] * stride_s + level[None, :]
    scale = tl.load(pointers, mask=valid[:, None] & on_path[None, :], other=0.0).to(tl.float32)
    return scale * tl.exp2(row_sums[:, None] + since[None, :])


@triton.jit
def column(matrix, m, WIDTH: tl.constexpr):
    """Column m of ``[C, WIDTH]``."""
    return tl.sum(tl.where(tl.arange(0, WIDTH)[None, :] == m, matrix, 0.0), axis=1)


@triton.jit
def pair_decays(high, low, EXACT: tl.constexpr):
    """Decay ``[C, C]`` from a token (column) to a later one (row) of a chunk, from its sums; 1 above the diagonal."""
    if EXACT:
        decays = decay_between(high[:, None], low[:, None], high[None, :], low[None, :], True)
    else:
        decays = decay_between(high[:, None], 0.0, high[None, :], 0.0, False)
    return decays


@triton.jit
def set_bits_before(n):
    """Bits set in 0, 1, … n - 1 together, n < 2^24: the lengths of the paths of the n groups before group n."""
    count = 0
    for bit in range(bit_length(n)):
        block = 1 << bit
        count += (n >> (bit + 1) << bit) + tl.maximum((n & (2 * block - 1)) - block, 0)
    return count


@triton.jit
def set_bits(x):
    """Number of bits set in 0 <= x < 2^24. A loop here would keep the loop around it from being pipelined."""
    x = x - (x >> 1 & 0x555555)
    x = (x & 0x333333) + (x >> 2 & 0x333333)
    x = x + (x >> 4) & 0x0F0F0F
    return (x * 0x010101 >> 16) & 0xFF


@triton.jit
def softplus(x):
    """``log(1 + e^x)``, in float32, exact to float32 on either side of zero.

    ``log(1 + e) = 2 artanh(s)`` with ``s = e / (2 + e) <= 1/3``: the ninth term of the series is below 2^-28 of the sum.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    square = s * s
    series = 1.0 / 15
    for i in tl.static_range(7):
        series = series * square + 1.0 / (13 - 2 * i)
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def silu_slope(x, opening):
    """Derivative of ``x · opening``, where ``opening`` is the sigmoid of x."""
    return opening * (1 + x * (1 - opening))


@triton.jit
def inverse_length(rows, axis: tl.constexpr):
    """``1 / sqrt(Σ x² + 1e-6)`` along an axis: the factor of queries and keys of the delta rule."""
    return tl.rsqrt(tl.sum(rows * rows, axis=axis) + 1e-6)
