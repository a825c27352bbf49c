"""TILES: the loads and the stores of tokens and of states. Offsets that can pass 2^31 elements are int64."""

from __future__ import annotations

import triton
import triton.language as tl


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
def load_tokens(pointer, stride, head, chunk, C: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, first):
    """``load_tile`` of a chunk's tokens, of one of the heads ``[tokens, heads, WIDTH]`` at ``pointer``."""
    return load_tile(pointer + chunk.origin * stride + head * WIDTH, stride, chunk.valid, C, WIDTH, TILE, first)


@triton.jit
def query_head(x, here, h, S: tl.constexpr):
    """The query of value head h at the first token of a chunk."""
    return x.q + here.origin * x.stride_q + h // (S.H // S.G) * S.K


@triton.jit
def key_head(x, here, h, S: tl.constexpr):
    """Its key."""
    return x.k + here.origin * x.stride_k + h // (S.H // S.G) * S.K


@triton.jit
def store_tokens(pointer, stride, head, chunk, tile, C: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, first):
    """Write where ``load_tokens`` reads."""
    store_tile(pointer + chunk.origin * stride + head * WIDTH, stride, chunk.valid, tile, C, WIDTH, TILE, first)


@triton.jit
def block_of(base, stride, first_row, first, low, high, ROWS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Pointers and mask of tile ``[BR, BC]`` of a matrix with ROWS rows of ``stride`` elements, for columns in [low, high).

    The tile begins in a row of the matrix that is a multiple of BR.
    """
    rows = first_row + tl.arange(0, BR)
    columns = first + tl.arange(0, BC)
    inside = ((columns >= low) & (columns < high))[None, :]
    if (ROWS - BR) % BR != 0:  # the interpreter divides no number by a constant
        inside = inside & (rows < ROWS)[:, None]
    return base + (rows[:, None] * stride + columns[None, :]), inside


@triton.jit
def load_block(
    base,
    stride,
    first_row,
    first,
    low,
    high,
    ROWS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A tile where ``block_of`` says, zero outside if MASKED; otherwise nothing of it is outside."""
    pointers, inside = block_of(base, stride, first_row, first, low, high, ROWS, BR, BC)
    return tl.load(pointers, mask=inside, other=0.0) if MASKED else tl.load(pointers)


@triton.jit
def load_part(
    base, stride, first_row, first, ROWS: tl.constexpr, WIDTH: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """Tile ``[BR, BC]`` of a matrix ``[ROWS, WIDTH]`` whose rows are ``stride`` elements apart, zero outside."""
    return load_block(base, stride, first_row, first, 0, WIDTH, ROWS, BR, BC, ROWS % BR != 0 or WIDTH % BC != 0)


@triton.jit
def store_part(
    base, stride, tile, first_row, first, ROWS: tl.constexpr, WIDTH: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """Write what ``load_part`` reads."""
    store_part_if(True, base, stride, tile, first_row, first, ROWS, WIDTH, BR, BC)


@triton.jit
def store_part_if(
    active,
    base,
    stride,
    tile,
    first_row,
    first,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """The same, if active. The pointers do not depend on this, so a loop has them once."""
    pointers, inside = block_of(base, stride, first_row, first, 0, WIDTH, ROWS, BR, BC)
    if active:
        if ROWS % BR == 0 and WIDTH % BC == 0:
            tl.store(pointers, tile.to(base.dtype.element_ty))
        else:
            tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_state(base, first_k, first_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Tile ``[BK, BV]`` of one state ``[K, V]``."""
    return load_part(base, V, first_k, first_v, K, V, BK, BV)


@triton.jit
def store_state(
    base, tile, active, first_k, first_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
):
    """Write what ``load_state`` reads, if active."""
    store_part_if(active, base, V, tile, first_k, first_v, K, V, BK, BV)


@triton.jit
def load_entry(states, site, first_k, first_v, S: tl.constexpr):
    """Tile ``[BK, BV]`` of state ``site`` (int64) of ``states [sites, K, V]``."""
    return load_state(states + site * (S.K * S.V), first_k, first_v, S.K, S.V, S.BK, S.BV)


@triton.jit
def store_entry(states, site, tile, active, first_k, first_v, S: tl.constexpr):
    """Write what ``load_entry`` reads, if active."""
    store_state(states + site * (S.K * S.V), tile, active, first_k, first_v, S.K, S.V, S.BK, S.BV)


@triton.jit
def square(base, C: tl.constexpr):
    """Pointers to a contiguous matrix ``[C, C]``."""
    return base + tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
