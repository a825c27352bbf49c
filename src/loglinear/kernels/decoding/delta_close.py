"""CLOSE of the delta rule: full chunks become entries, and older entries are carried over these chunks.

Each entry of each closing row is a separate piece of work. One row of a batch therefore does not keep the others waiting
through a chain of its entries. Every program finds its pieces from the positions alone. A program without a piece reads the
positions and ends. No K x K matrix is made: ``X <- γ X - K_endᵀ (T diag(γ_j) K) X`` is computed from right to left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.decoding.open_chunk import SLOTS, held_slots
from loglinear.kernels.tree.place import log2_of_power, lowbit
from loglinear.kernels.tree.tiles import load_state, store_state

ROWS = tl.constexpr(64)  # positions looked at together


@triton.jit
def aged_slots(n, M):
    """The bits of n whose entries outlive the closing of chunk n: all but those that merge with it."""
    return held_slots(n & -lowbit(n + 1), M)


@triton.jit
def nth_set_bit(bits, index):
    """The place of set bit number ``index`` from below."""
    for _ in range(index):
        bits = bits & (bits - 1)
    return log2_of_power(lowbit(bits))


@triton.jit
def sum_of_slots(entries, lowest, count, first_k, first_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                 BV: tl.constexpr):  # fmt: skip
    """``[BK, BV]`` of the sum of ``count`` slots from ``lowest`` on."""
    state = tl.zeros([BK, BV], tl.float32)
    for m in tl.range(lowest, lowest + count, num_stages=1):
        state += load_state(entries + m * (K * V), first_k, first_v, K, V, BK, BV).to(tl.float32)
    return state


@triton.jit
def carry(entries, keys, values, gates, solve, n, M, index, first_v, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
          BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Carry one entry over chunk n, ``X -> γ X + K_endᵀ T (V - diag(γ_j) K X)``: number ``index`` of those that only age.

    Index 0 is the entry that is made: only it takes V, and it starts from the sum of those that merge, for the map is linear.
    Keys and entries come in blocks of BLOCK rows: all products are C x C x BV. A slot past the buffers is neither read nor
    written. Pointers stand at the head, and at the chunk's place 0.
    """
    BLOCK: tl.constexpr = BK if BK < 64 else 64
    place = tl.arange(0, C)
    columns = first_v + tl.arange(0, BV)
    through = tl.cumsum(tl.load(gates + place), axis=0)
    after = tl.cumsum(tl.load(gates + place + 1, mask=place < C - 1, other=0.0), axis=0, reverse=True)
    decay = tl.exp(tl.sum(tl.load(gates + place), axis=0))
    made = index == 0
    slot = nth_set_bit(aged_slots(n, M), index - 1)
    lowest = tl.where(made, 0, slot)
    slot = tl.where(made, log2_of_power(lowbit(n + 1)), slot)
    count = tl.where(made, tl.minimum(slot, M), 1)

    seen = tl.zeros([C, BV], tl.float32)
    for first_k in tl.range(0, K, BLOCK, num_stages=1):
        rows = first_k + tl.arange(0, BLOCK)
        block = tl.load(keys + place[:, None] * K + rows[None, :], mask=(rows < K)[None, :], other=0.0).to(tl.float32)
        state = sum_of_slots(entries, lowest, count, first_k, first_v, K, V, BLOCK, BV)
        seen += tl.dot(block, state, input_precision=PRECISION)
    live = columns < tl.where(made, V, 0)
    wanted = tl.load(values + place[:, None] * V + columns[None, :], mask=live[None, :], other=0.0)
    # A row of the inverse is kept up to the diagonal.
    triangle = place[None, :] <= place[:, None]
    inverse = tl.load(solve + place[:, None] * C + place[None, :], mask=triangle, other=0.0)
    wrong = wanted.to(tl.float32) - tl.exp(through)[:, None] * seen
    wrong = tl.dot(inverse, wrong, input_precision=PRECISION) * tl.exp(after)[:, None]
    for first_k in tl.range(0, K, BLOCK, num_stages=1):
        rows = first_k + tl.arange(0, BLOCK)
        block = tl.load(keys + place[:, None] * K + rows[None, :], mask=(rows < K)[None, :], other=0.0).to(tl.float32)
        state = decay * sum_of_slots(entries, lowest, count, first_k, first_v, K, V, BLOCK, BV)
        state += tl.dot(tl.trans(block), wrong, input_precision=PRECISION)
        store_state(entries + slot * (K * V), state, slot < M, first_k, first_v, K, V, BLOCK, BV)


@triton.jit(do_not_specialize=["B", "T", "M"])
def delta_close_kernel(
    position,
    entries,  # [B, H, M, K, V]
    open_k,  # [B, G, 2C, K]
    open_v,  # [B, H, C, V]
    open_g,  # [B, H, 2C]
    open_solve,  # [B, H, 2C, C]
    B,
    T,
    M,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: any number of programs, which take turns. The T tokens of the call that are in the open chunk are in the state.

    Pieces: tiles of V x H x entries x rows that close, tiles fastest. Races: a piece writes its columns of one slot, which no
    other piece reads: slots that age belong to one piece, and the slot of the entry that is made was dead.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    programs = tl.num_programs(0)
    index = tl.arange(0, ROWS)
    piece = tl.program_id(0)
    for first_row in range(0, B, ROWS):
        seen = tl.load(position + first_row + index, mask=first_row + index < B, other=0).to(tl.int32)
        aged = (aged_slots(seen // C, M)[:, None] >> tl.arange(0, SLOTS)[None, :]) & 1
        pieces = tl.where(seen % C + T >= C, (1 + tl.sum(aged, axis=1)) * (H * TILES), 0)
        pieces = tl.where(first_row + index < B, pieces, 0)
        ends = tl.cumsum(pieces, axis=0)
        total = tl.sum(pieces, axis=0)
        while piece < total:
            local = tl.sum((ends <= piece).to(tl.int32), axis=0)
            rest = piece - tl.max(tl.where(ends <= piece, ends, 0), axis=0)
            h = rest // TILES % H
            row = (first_row + local).to(tl.int64)
            n = tl.load(position + row).to(tl.int32) // C
            head = row * H + h
            half = n % 2 * C
            carry(
                entries + head * M * (K * V),
                open_k + ((row * G + h // (H // G)) * 2 * C + half) * K,
                open_v + head * (C * V),
                open_g + head * (2 * C) + half,
                open_solve + (head * 2 * C + half) * C,
                n, M, rest // (TILES * H), rest % TILES * BV, C, K, V, BK, BV, PRECISION,
            )  # fmt: skip
            piece += programs
        piece -= total
