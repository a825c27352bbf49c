"""PLACE: where a chunk or an octet of chunks lies, and the arithmetic of its position in the tree.

A kernel computes a level from the bits of two positions, in registers. There is no table of levels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

OCTET = tl.constexpr(8)  # chunks per octet: three levels of the tree are built in registers
LOG_OCTET = tl.constexpr(3)


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
def bit(mask, i):
    """Bit i of a constant below 2^31."""
    return (tl.cast(mask, tl.int32) >> i) & 1


@triton.jit
def set_bits(x):
    """Number of bits set in 0 <= x < 2^24. A loop here would keep the loop around it from being pipelined."""
    x = x - (x >> 1 & 0x555555)
    x = (x & 0x333333) + (x >> 2 & 0x333333)
    x = x + (x >> 4) & 0x0F0F0F
    return (x * 0x010101 >> 16) & 0xFF


@triton.jit
def set_bits_before(n):
    """Bits set in 0, 1, … n - 1 together, n < 2^24: the lengths of the paths of the n octets before octet n."""
    count = 0
    for bit in range(bit_length(n)):
        block = 1 << bit
        count += (n >> (bit + 1) << bit) + tl.maximum((n & (2 * block - 1)) - block, 0)
    return count


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
def row_of(chunk, EVERY: tl.constexpr):
    """The row of what stands at a chunk, of all chunks, where a sequence has such a row for every EVERY chunks alone."""
    return (chunk + 1) // EVERY - 1


class Place(NamedTuple):
    """Where the sequence of a chunk or octet lies: first token, tokens, first chunk, first octet, the tree's number of its
    first chunk, its own number. ``length`` is -1 for a unit past the last one, n0 is 0 unless it continues an earlier
    sequence.
    """

    start: Any
    length: Any
    chunk0: Any
    octet0: Any
    n0: Any
    sequence: Any


class Chunk(NamedTuple):
    """Chunk ``local`` of a sequence, chunk n of its tree: tokens from it on, which of its places hold one ``[C]``, its first
    token (int64).
    """

    local: Any
    n: Any
    size: Any
    valid: Any
    origin: Any


class Part(NamedTuple):
    """The part of the states that a program owns: a tile from a chunk and a column on, of a head."""

    tile: Any
    first_k: Any
    first_v: Any
    h: Any


@triton.jit
def locate(unit, table, T, N, NG, units, PACKED: tl.constexpr):
    """The place of a chunk or octet. PACKED reads ``table`` (see problem.py); otherwise all sequences have T tokens, N
    chunks and NG octets, and ``units`` is N or NG.
    """
    if PACKED:
        index = tl.load(table.units + unit)
        entry = table.sequences + tl.maximum(index, 0) * 5
        start = tl.load(entry)
        length = tl.where(index < 0, -1, tl.load(entry + 1))
        chunk0 = tl.load(entry + 2)
        octet0 = tl.load(entry + 3)
        n0 = tl.load(entry + 4)
    else:
        index = unit // units
        start = index * T
        length = T
        chunk0 = index * N
        octet0 = index * NG
        n0 = index * 0
    return Place(start, length, chunk0, octet0, n0, index)


@triton.jit
def chunk_of(at, chunk, C: tl.constexpr):
    """Chunk ``chunk`` of the batch, in a sequence at ``at``."""
    local = chunk - at.chunk0
    n = at.n0 + local
    size = at.length - local * C
    valid = tl.arange(0, C) < size
    origin = (at.start + local * C).to(tl.int64)
    return Chunk(local, n, size, valid, origin)


@triton.jit
def row_of_program(table, T, N, NG, BLOCKS: tl.constexpr, S: tl.constexpr):
    """(place of the sequence, chunk, block, chunks) of a program in a grid of BLOCKS x chunks, chunks fastest.

    A kernel returns where there is no sequence, and only then asks for the chunk: nothing of it is carried over the branch.
    """
    all_chunks = tl.num_programs(0) // BLOCKS
    pid = tl.program_id(0)
    chunk = pid % all_chunks
    return locate(chunk, table, T, N, NG, N, S.PACKED), chunk, pid // all_chunks, all_chunks


@triton.jit
def tile_of_program(S: tl.constexpr):
    """(what a program owns in a grid of … x H x tiles of [K, V], tiles fastest; its number among the …)."""
    TILES_V: tl.constexpr = (S.V + S.BV - 1) // S.BV
    TILES: tl.constexpr = (S.K + S.BK - 1) // S.BK * TILES_V
    pid = tl.program_id(0)
    tile = pid % TILES
    return Part(tile, tile // TILES_V * S.BK, tile % TILES_V * S.BV, pid // TILES % S.H), pid // (TILES * S.H)
