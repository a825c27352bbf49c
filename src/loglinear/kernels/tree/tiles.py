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
def store_tokens(pointer, stride, head, chunk, tile, C: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, first):
    """Write where ``load_tokens`` reads."""
    store_tile(pointer + chunk.origin * stride + head * WIDTH, stride, chunk.valid, tile, C, WIDTH, TILE, first)


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
def load_entry(states, unit, first_k, first_v, S: tl.constexpr):
    """Tile ``[BK, BV]`` of state ``unit`` (int64) of ``states [units, K, V]``."""
    return load_state(states + unit * (S.K * S.V), first_k, first_v, S.K, S.V, S.BK, S.BV)


@triton.jit
def store_entry(states, unit, tile, active, first_k, first_v, S: tl.constexpr):
    """Write what ``load_entry`` reads, if active."""
    store_state(states + unit * (S.K * S.V), tile, active, first_k, first_v, S.K, S.V, S.BK, S.BV)
