"""OPEN CHUNK: the loads from the open chunk and from the earlier entries that all step kernels share.

Tokens of the running call come from the inputs of the call, and earlier tokens come from the state. A program therefore never
reads a value that another program of the same launch writes. Logs of decays are sums over the range that is needed, in
natural units. No sum is subtracted from another, so -inf needs no special case.

``first`` is the place in the open chunk of the call's first token, negative once a chunk has closed within the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.tree.bundles import hash_of
from loglinear.kernels.tree.place import bit_length, log2_of_power, lowbit, set_bits
from loglinear.kernels.tree.tiles import load_state

SLOTS = tl.constexpr(32)  # a vector over slots: chunks are numbered below 2^24 (tree.place.bit_length)


class Sizes(NamedTuple):
    """Sizes of a launch, compile-time constants: letters of the legend, tiles, precision of products.

    GATES: log decays of a head and token, 1 or K. DELTA: whether there is a delta rule.
    """

    H: Any
    G: Any
    K: Any
    V: Any
    C: Any
    LOG_C: Any
    BK: Any
    BV: Any
    PRECISION: Any
    GATES: Any = 1
    DELTA: Any = False
    __hash__ = hash_of


class Held(NamedTuple):
    """The tensors of a ``DecodingState``, None where a rule has none, and the distances of their rows.

    Each row lies in one piece. ``rows [B]`` has the row of the state for each row of the batch; None: it is the same.
    """

    position: Any  # [rows]
    entries: Any  # [rows, H, M, K, V]
    open_k: Any  # [rows, G, 2C, K]
    open_v: Any  # [rows, H, C, V]
    open_g: Any  # [rows, H, 2C, GATES]
    decay: Any  # [rows, 2, H, M]
    open_solve: Any  # [rows, H, 2C, C]
    rows: Any
    stride_position: Any
    stride_entries: Any
    stride_k: Any
    stride_v: Any
    stride_g: Any
    stride_decay: Any
    stride_solve: Any


class Head(NamedTuple):
    """The tensors of a state at one head of one row."""

    position: Any
    entries: Any
    open_k: Any
    open_v: Any
    open_g: Any
    decay: Any
    open_solve: Any


def held_of(tensors: Sequence[Tensor | None]) -> Held:
    """The bundle of the eight tensors, in its order."""
    return Held(*tensors, *(None if x is None else x.stride(0) for x in tensors[:7]))


class Program(NamedTuple):
    """The share of a program: a row of the batch (int64), a head h of it, ``head`` of all rows, and columns from first_v on."""

    row: Any
    h: Any
    group: Any
    head: Any
    first_v: Any


@triton.jit
def program_of(S: tl.constexpr):
    """Grid: tiles of V x H x B, tiles fastest."""
    TILES: tl.constexpr = (S.V + S.BV - 1) // S.BV
    pid = tl.program_id(0)
    h = pid // TILES % S.H
    row = (pid // (TILES * S.H)).to(tl.int64)
    return Program(row, h, h // (S.H // S.G), row * S.H + h, pid % TILES * S.BV)


@triton.jit
def held_row(rows, row):
    """The row of the state (int64) for a row of the batch."""
    return row if rows is None else tl.load(rows + row)


@triton.jit
def at_head(held, own, M, S: tl.constexpr):
    """``held`` at the head of a program: entries at slot 0, the open chunk at place 0 of its first half.

    Absent tensors are replaced by others, here and in ``at_token``: Triton 3.4 cannot return None.
    """
    row, h = held_row(held.rows, own.row), own.h.to(tl.int64)
    position = held.position + row * held.stride_position
    entries = held.entries + (row * held.stride_entries + h * M * (S.K * S.V))
    open_k = held.open_k + (row * held.stride_k + own.group * (2 * S.C * S.K))
    open_v = held.open_v + (row * held.stride_v + h * (S.C * S.V))
    open_g = held.open_g + (row * held.stride_g + h * (2 * S.C * S.GATES))
    decay = open_g if held.decay is None else held.decay + (row * held.stride_decay + h * M)
    solve = open_g if held.open_solve is None else held.open_solve + (row * held.stride_solve + h * (2 * S.C * S.C))
    return Head(position, entries, open_k, open_v, open_g, decay, solve)


@triton.jit
def at_token(x, own, T, L, S: tl.constexpr):
    """(q, k, v, g, β, λ) of a program's head at the first of the T tokens of a call."""
    token = own.row * T
    q, k = x.q + (token * x.stride_q + own.group * S.K), x.k + (token * x.stride_k + own.group * S.K)
    g = q if x.g is None else x.g + (token * x.stride_g + own.h * S.GATES)
    beta = q if x.beta is None else x.beta + (token * x.stride_beta + own.h)
    return q, k, x.v + (token * x.stride_v + own.h * S.V), g, beta, x.scales + (token * x.stride_scales + own.h * L)


@triton.jit
def open_tile(stored, given, stride, first, last, C: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, column):
    """Tile ``[C, TILE]`` of k, v or gates per channel from ``column`` on: places up to ``last``, zeros after it.

    ``stored`` points at place 0 in the state, ``given`` at the call's first token, whose rows are ``stride`` apart.
    """
    place, columns = tl.arange(0, C)[:, None], column + tl.arange(0, TILE)[None, :]
    there = place <= last
    if WIDTH % TILE != 0:
        there = there & (columns < WIDTH)
    from_call, from_state = given + ((place - first) * stride + columns), stored + (place * WIDTH + columns)
    return tl.load(tl.where(place >= first, from_call, from_state), mask=there, other=0.0)


@triton.jit
def open_gates(place, stored, given, x, first, last):
    """Log decays at ``place`` (a tensor), zero beyond ``last``: later tokens decay nothing yet. x: the call's inputs."""
    gates = tl.load(stored + place, mask=(place < first) & (place <= last), other=0.0)
    if x.g is not None:
        inside = (place >= first) & (place <= last)
        gates += tl.load(given + (place - first) * x.stride_g, mask=inside, other=0.0).to(tl.float32)
    return gates


@triton.jit
def open_decays(stored, given, x, first, last, C: tl.constexpr):
    """Log decays within the open chunk: (from its start through each place, from after each place to ``last``) ``[C]``."""
    place = tl.arange(0, C)
    through = tl.cumsum(open_gates(place, stored, given, x, first, last), axis=0)
    after = tl.cumsum(open_gates(place + 1, stored, given, x, first, last), axis=0, reverse=True)
    return through, after


@triton.jit
def open_scales(scales, last, L, C: tl.constexpr):
    """λ of the token at place ``last`` towards every place ``[C]``, zero after it."""
    place = tl.arange(0, C)
    level = tl.minimum(bit_length(last ^ place), L - 1)
    return tl.load(scales + level, mask=place <= last, other=0.0).to(tl.float32)


@triton.jit
def entry_scales(scales, n, L, LOG_C: tl.constexpr):
    """λ of a token of chunk n towards every slot ``[SLOTS]``, zero where the slot is dead."""
    slot = tl.arange(0, SLOTS)
    level = tl.minimum(slot + (LOG_C + 1), L - 1)
    return tl.load(scales + level, mask=(n >> slot) & 1 == 1, other=0.0).to(tl.float32)


@triton.jit
def held_slots(n, M):
    """The bits of n that have one of M slots. Later bits, of a row past the context, are neither read nor written."""
    return n & ((1 << M) - 1)


@triton.jit
def pick(vector, slot):
    """Element ``slot`` of a vector, ``[1]``."""
    return tl.gather(vector, slot + tl.zeros([1], tl.int32), 0)


@triton.jit
def weighted_entries(entries, weights, held, first_v, S: tl.constexpr, STAGES: tl.constexpr):
    """``Σ_m weights[m] S_m`` ``[BK, BV]`` over the set bits m of ``held``, float32; ``entries`` points at slot 0 of one head.

    The next slot follows from the bits alone: loads run ahead of the sums.
    """
    total = tl.zeros([S.BK, S.BV], tl.float32)
    e = held
    for _ in tl.range(set_bits(held), num_stages=STAGES):
        slot = log2_of_power(lowbit(e))
        state = load_state(entries + slot * (S.K * S.V), 0, first_v, S.K, S.V, S.BK, S.BV)
        total += pick(weights, slot) * state.to(tl.float32)
        e = e & (e - 1)
    return total


@triton.jit
def store_token(base, place, value, columns, WIDTH: tl.constexpr):
    """Write one row of k or v to its place in the state."""
    tl.store(base + (place * WIDTH + columns), value, mask=columns < WIDTH)
