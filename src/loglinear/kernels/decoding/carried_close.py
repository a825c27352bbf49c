"""CLOSE where entries are carried: full chunks become entries, and older entries are carried over these chunks.

Each entry of each closing row is a separate piece of work. One row of a batch therefore does not keep the others waiting
through a chain of its entries. Every program finds its pieces from the positions alone. A program without a piece reads the
positions and ends. No K x K matrix is made: ``X <- γ X - K_endᵀ T K_start X`` is computed from right to left, where K_start and
K_end are the keys as the start and the end of the chunk see them. Without a delta rule it is ``X <- γ X``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.decoding.open_chunk import SLOTS, Program, at_head, held_slots
from loglinear.kernels.tree.dependent import wait
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
def sum_of_slots(entries, lowest, count, first_k, first_v, BLOCK: tl.constexpr, S: tl.constexpr):
    """``[BLOCK, BV]`` of the sum of ``count`` slots from ``lowest`` on."""
    state = tl.zeros([BLOCK, S.BV], tl.float32)
    for m in tl.range(lowest, lowest + count, num_stages=1):
        state += load_state(entries + m * (S.K * S.V), first_k, first_v, S.K, S.V, BLOCK, S.BV).to(tl.float32)
    return state


@triton.jit
def closed_keys(keys, gates, rows, END: tl.constexpr, S: tl.constexpr):
    """(keys ``[C, BLOCK]`` of the full chunk at some rows of its states, decay ``[BLOCK, 1]`` of a state over the chunk).

    The keys are as the end of the chunk sees them, or as its start does; under one gate for all rows they are the bare keys.
    """
    place = tl.arange(0, S.C)[:, None]
    inside = (rows < S.K)[None, :]
    block = tl.load(keys + place * S.K + rows[None, :], mask=inside, other=0.0).to(tl.float32)
    if S.GATES == 1:
        decay = tl.exp(tl.sum(tl.load(gates + place), axis=0))[:, None]
    else:
        logs = tl.load(gates + place * S.K + rows[None, :], mask=inside, other=0.0)
        decay = tl.exp(tl.sum(logs, axis=0))[:, None]
        if END:
            later = tl.load(gates + (place + 1) * S.K + rows[None, :], mask=inside & (place < S.C - 1), other=0.0)
            block *= tl.exp(tl.cumsum(later, axis=0, reverse=True))
        else:
            block *= tl.exp(tl.cumsum(logs, axis=0))
    return block, decay


@triton.jit
def carry(held, half, n, M, index, first_v, S: tl.constexpr):
    """Carry one entry over chunk n, ``X -> γ X + K_endᵀ T (V - K_start X)``: number ``index`` of those that only age.

    Index 0 is the entry that is made: only it takes V, and it starts from the sum of those that merge, for the map is linear.
    Keys and entries come in blocks of BLOCK rows: all products are C x C x BV. A slot past the buffers is neither read nor
    written. ``held`` stands at the head.
    """
    BLOCK: tl.constexpr = S.BK if S.BK < 64 else 64
    place = tl.arange(0, S.C)
    columns = first_v + tl.arange(0, S.BV)
    keys, gates = held.open_k + half * S.K, held.open_g + half * S.GATES
    made = index == 0
    slot = nth_set_bit(aged_slots(n, M), index - 1)
    lowest = tl.where(made, 0, slot)
    slot = tl.where(made, log2_of_power(lowbit(n + 1)), slot)
    count = tl.where(made, tl.minimum(slot, M), 1)

    live = columns < tl.where(made, S.V, 0)
    written = tl.load(held.open_v + place[:, None] * S.V + columns[None, :], mask=live[None, :], other=0.0).to(
        tl.float32
    )
    if S.DELTA:
        seen = tl.zeros([S.C, S.BV], tl.float32)
        for first_k in tl.range(0, S.K, BLOCK, num_stages=1):
            block, _ = closed_keys(keys, gates, first_k + tl.arange(0, BLOCK), False, S)
            state = sum_of_slots(held.entries, lowest, count, first_k, first_v, BLOCK, S)
            seen += tl.dot(block, state, input_precision=S.PRECISION)
        if S.GATES == 1:
            seen *= tl.exp(tl.cumsum(tl.load(gates + place), axis=0))[:, None]
        # A row of the inverse is kept up to the diagonal.
        triangle = place[None, :] <= place[:, None]
        inverse = tl.load(
            held.open_solve + half * S.C + place[:, None] * S.C + place[None, :], mask=triangle, other=0.0
        )
        written = tl.dot(inverse, written - seen, input_precision=S.PRECISION)
    if S.GATES == 1:
        later = tl.load(gates + place + 1, mask=place < S.C - 1, other=0.0)
        written *= tl.exp(tl.cumsum(later, axis=0, reverse=True))[:, None]
    for first_k in tl.range(0, S.K, BLOCK, num_stages=1):
        block, decay = closed_keys(keys, gates, first_k + tl.arange(0, BLOCK), True, S)
        state = decay * sum_of_slots(held.entries, lowest, count, first_k, first_v, BLOCK, S)
        state += tl.dot(tl.trans(block), written, input_precision=S.PRECISION)
        store_state(held.entries + slot * (S.K * S.V), state, slot < M, first_k, first_v, S.K, S.V, BLOCK, S.BV)


@triton.jit(do_not_specialize=["B", "T", "M"])
def carried_close_kernel(held, positions, B, T, M, S: tl.constexpr, EARLY: tl.constexpr):
    """Grid: any number of programs, which take turns. The T tokens of the call that are in the open chunk are in the state.

    positions: of the rows of the batch, as ``carried_token_kernel`` leaves them. To gather them took 5% of a step.

    Pieces: tiles of V x H x entries x rows that close, tiles fastest. Races: a piece writes its columns of one slot, which no
    other piece reads: slots that age belong to one piece, and the slot of the entry that is made was dead.
    """
    TILES: tl.constexpr = (S.V + S.BV - 1) // S.BV
    if EARLY:
        wait()
    programs = tl.num_programs(0)
    index = tl.arange(0, ROWS)
    piece = tl.program_id(0)
    for first_row in range(0, B, ROWS):
        there = first_row + index < B
        seen = tl.load(positions + first_row + index, mask=there, other=0)
        aged = (aged_slots(seen // S.C, M)[:, None] >> tl.arange(0, SLOTS)[None, :]) & 1
        pieces = tl.where(seen % S.C + T >= S.C, (1 + tl.sum(aged, axis=1)) * (S.H * TILES), 0)
        pieces = tl.where(there, pieces, 0)
        ends = tl.cumsum(pieces, axis=0)
        total = tl.sum(pieces, axis=0)
        while piece < total:
            local = tl.sum((ends <= piece).to(tl.int32), axis=0)
            rest = piece - tl.max(tl.where(ends <= piece, ends, 0), axis=0)
            h = rest // TILES % S.H
            row = (first_row + local).to(tl.int64)
            own = Program(row, h, h // (S.H // S.G), row * S.H + h, rest % TILES * S.BV)
            n = tl.load(positions + row) // S.C
            carry(at_head(held, own, M, S), n % 2 * S.C, n, M, rest // (TILES * S.H), own.first_v, S)
            piece += programs
        piece -= total
