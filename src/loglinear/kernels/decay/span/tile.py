"""TILE: what the roles of a span kernel share: the place of a program, the ring of shared memory and its waits.

A *tile* is 128 queries, a *span* two tiles: 256 tokens, four chunks. A ring has ``SLOTS`` slots of ``[128, 64]`` numbers. One
warp fills them by TMA (the tensor memory accelerator of sm_90) ahead of the warps that multiply.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from loglinear.kernels.tree.place import locate

# Triton 3.9 has other names for the two copies.
load_part = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_part = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

TILE = gl.constexpr(128)  # tokens
WIDTH = gl.constexpr(64)  # columns of a slot, and tokens of a chunk
SLOTS = gl.constexpr(8)
TILES = gl.constexpr(4)  # of an octet
LEAST_ENTRY = gl.constexpr(4)  # chunks of the shortest entry that is read


class Tile(NamedTuple):
    """Tile of a sequence: its first token; tokens from it on; whether it is the second of its span; the entry that ends where
    the span begins, 0 if none; its first chunk, the sequence's first chunk and its octet, of all; its first head.
    """

    origin: Any
    size: Any
    second: Any
    path: Any
    chunk: Any
    chunk0: Any
    octet: Any
    h0: Any


class Ring(NamedTuple):
    """Slots, with the barriers of those that are full and of those that are empty."""

    slots: Any
    full: Any
    empty: Any


@gluon.jit
def tile_of_program(table, T, N, NG, S: gl.constexpr, LAST_FIRST: gl.constexpr = False):
    """The tile of a program in a grid of head blocks x octets x tiles, tiles fastest; of size <= 0 if there is none.

    LAST_FIRST: the last tiles, of the longest paths, come first.
    """
    tiles = gl.num_programs(0) // (S.H // S.HEADS)
    pid = gl.num_programs(0) - 1 - gl.program_id(0) if LAST_FIRST else gl.program_id(0)
    octet = pid % tiles // TILES
    at = locate(octet, table, T, N, NG, NG, S.PACKED)
    tile = (octet - at.octet0) * TILES + pid % TILES
    size = at.length - tile * TILE
    return Tile(
        at.start + tile * TILE,
        size,
        tile % 2,
        tile // 2 * 4,
        at.chunk0 + tile * 2,
        at.chunk0,
        octet,
        pid // tiles * S.HEADS,
    )


@gluon.jit
def slot_of(i, COUNT: gl.constexpr):
    """(slot, parity) of the i-th use of a ring of COUNT slots."""
    return i % COUNT, (i // COUNT) & 1


@gluon.jit
def hidden_zero():
    """A zero that the compiler does not know. Places of operands in shared memory are made again in the loop where they depend
    on it. Otherwise they are made before the loop, and spilled there.
    """
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def put(desc, row, column, ring, i, ROWS: gl.constexpr, COUNT: gl.constexpr = SLOTS):
    """Load ``[ROWS, 64]`` into use i of a ring of COUNT slots as soon as it is empty; the next use."""
    slot, phase = slot_of(i, COUNT)
    mbarrier.wait(ring.empty.index(slot), phase ^ 1)
    mbarrier.expect(ring.full.index(slot), ROWS * WIDTH * 2)
    target = ring.slots.index(slot)
    if ROWS < TILE:
        target = target.slice(0, ROWS)
    load_part(desc, [row, column], ring.full.index(slot), target)
    return i + 1


@gluon.jit
def filled(ring, i, COUNT: gl.constexpr = SLOTS):
    """The slot of use i, once it is full."""
    slot, phase = slot_of(i, COUNT)
    mbarrier.wait(ring.full.index(slot), phase)
    return ring.slots.index(slot)


@gluon.jit
def emptied(ring, i, COUNT: gl.constexpr = SLOTS):
    """Give the slot of use i back; the next use. ``fence_async_shared`` comes first if the slot was loaded into registers."""
    mbarrier.arrive(ring.empty.index(i % COUNT), count=1)
    return i + 1


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each complete after so many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made
