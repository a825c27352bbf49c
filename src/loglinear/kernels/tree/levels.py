"""LEVELS: λ inside a chunk, as a mask in two parts, and λ towards the entries of a query path."""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.decays import decay_between, load_sum
from loglinear.kernels.tree.place import bit_length

SUB = tl.constexpr(16)  # tokens per sub-block of the mask: pairs in two sub-blocks share one level
LOG_SUB = tl.constexpr(4)


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
def local_decays(sums, size, plane, S: tl.constexpr):
    """Decays inside a chunk of ``size`` tokens, as (near ``[C, SUB]``, far ``[C, C/SUB]``, column ``[C/SUB, SUB]``).
    From token s to t: near in one sub-block; otherwise far[t, block of s] * column[s], over the end of s's sub-block.
    Both factors are at most 1, and there are C + C²/SUB + C·SUB exponentials instead of C².
    """
    t = tl.arange(0, S.C)
    block = tl.arange(0, S.C // SUB)
    inner = tl.arange(0, SUB)
    # Each view of the sums is loaded again: to move one between register layouts costs more than the cache does.
    row_high, row_low = load_sum(sums, t, t < size, plane, S)
    near = (t // SUB * SUB)[:, None] + inner[None, :]
    near_high, near_low = load_sum(sums, near, near < size, plane, S)
    end = block * SUB + SUB - 1
    end_high, end_low = load_sum(sums, end, end < size, plane, S)
    column = block[:, None] * SUB + inner[None, :]
    column_high, column_low = load_sum(sums, column, column < size, plane, S)
    if S.EXACT:
        row_low, end_low_row, end_low_column = row_low[:, None], end_low[None, :], end_low[:, None]
    else:
        end_low_row, end_low_column = 0.0, 0.0
    near_decay = decay_between(row_high[:, None], row_low, near_high, near_low, S)
    far_decay = decay_between(row_high[:, None], row_low, end_high[None, :], end_low_row, S)
    column_decay = decay_between(end_high[:, None], end_low_column, column_high, column_low, S)
    return near_decay, far_decay, column_decay


@triton.jit
def assemble_mask(near, far, column, C: tl.constexpr):
    """``[C, C/SUB, SUB]`` mask from its parts: ``near`` in a row's own sub-block, ``far * column`` in the others."""
    own = (tl.arange(0, C) // SUB)[:, None] == tl.arange(0, C // SUB)[None, :]
    return tl.where(own[:, :, None], near[:, None, :], far[:, :, None] * column[None, :, :])


@triton.jit
def scales_of(x, here, h, L):
    """λ of head h at the first token of a chunk, level 0."""
    return x.scales + here.origin * x.stride_scales + h * L


@triton.jit
def chunk_scales(x, here, h, L, S: tl.constexpr):
    """``local_scales`` of one head, times the factor of o."""
    return local_scales(scales_of(x, here, h, L), here.valid, x.stride_scales, x.factor, L, S.C)


@triton.jit
def level_mask(x, here, h, L, S: tl.constexpr):
    """λ inside a chunk ``[C, C]``, times the factor of o."""
    near, far = chunk_scales(x, here, h, L, S)
    ones = tl.full([S.C // SUB, SUB], 1.0, tl.float32)
    return tl.reshape(assemble_mask(near, far, ones, S.C), [S.C, S.C])


@triton.jit
def local_mask(x, sums, here, h, plane, L, S: tl.constexpr):
    """λ times decay inside a chunk ``[C, C/SUB, SUB]``, times the factor of o; ``sums`` points at its first token."""
    near, far = chunk_scales(x, here, h, L, S)
    near_decay, far_decay, columns = local_decays(sums, here.size, plane, S)
    return assemble_mask(near * near_decay, far * far_decay, columns, S.C)


@triton.jit
def path_weights(x, row_sums, entry_log, at, here, h, L, S: tl.constexpr, TREE: tl.constexpr):
    """``λ exp2(log-decay)`` ``[C, TREE]`` of each row towards the entry of every tree level on the path of a chunk.

    Loads all that a walk needs but the states, at once: inside the walk no product waits for a load of its weight.
    """
    n, n0 = here.n, at.n0
    m = tl.arange(0, TREE)
    on_path = ((n >> m) & 1 == 1) & ((n >> m << m) > n0)
    # Logs of the entries before: a cumulative sum less the entry's own log would lose what a reset hides.
    below = tl.maximum(m - 1, 0)
    before = (m > 0) & ((n >> below) & 1 == 1) & ((n >> below << below) > n0)
    site = (at.chunk0 - n0 + (n >> below << below) - 1).to(tl.int64) * S.H + h
    since = tl.cumsum(tl.load(entry_log + site, mask=before, other=0.0), axis=0)
    level = tl.minimum(m + (S.LOG_C + 1), L - 1)
    pointers = scales_of(x, here, h, L) + tl.arange(0, S.C)[:, None] * x.stride_scales + level[None, :]
    scale = tl.load(pointers, mask=here.valid[:, None] & on_path[None, :], other=0.0).to(tl.float32)
    return scale * tl.exp2(row_sums[:, None] + since[None, :])


@triton.jit
def column(matrix, m, WIDTH: tl.constexpr):
    """Column m of ``[C, WIDTH]``."""
    return tl.sum(tl.where(tl.arange(0, WIDTH)[None, :] == m, matrix, 0.0), axis=1)


@triton.jit
def entry_scales(x, here, h, tree_level, L, S: tl.constexpr):
    """λ ``[C]`` of each token towards an entry of 2^tree_level chunks, times the factor of o."""
    level = tl.minimum(tree_level + (S.LOG_C + 1), L - 1)
    pointers = scales_of(x, here, h, L) + (tl.arange(0, S.C) * x.stride_scales + level)
    return tl.load(pointers, mask=here.valid, other=0.0).to(tl.float32) * x.factor
