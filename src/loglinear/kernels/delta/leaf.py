"""LEAF: the entry of a single chunk, applied as two thin products and never formed.

Every odd chunk reads the chunk before it as the nearest entry of its path, so leaves are half of all entries. With
``G = Q K_endᵀ`` over the keys of the leaf, ``Q S = G U`` and ``Q A = γ_C Q - G W``. The leaf's W and U are therefore enough.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.channel.decays import load_log
from loglinear.kernels.delta.products import times_tokens
from loglinear.kernels.tree.decays import to_end


@triton.jit
def leaf_scores(queries, keys, stride_k, sums, plane, S: tl.constexpr):
    """``Q K_endᵀ`` ``[C, C]`` float32; keys and sums point at the first token of a whole chunk."""
    everywhere = tl.arange(0, S.C) >= 0
    pairs = times_tokens(queries, keys, stride_k, everywhere, S)
    return pairs * to_end(sums, S.C, plane, S)[None, :]


@triton.jit
def whole_decay(sums, last, logs, site, S: tl.constexpr):
    """Decay of a chunk, one number, or ``[BK]`` for each channel of keys: from its sums, or from the logs of all chunks."""
    if S.CHANNELS:
        decay = tl.exp2(load_log(logs, site, 0, S))
    else:
        decay = tl.exp2(tl.load(sums + last))
    return decay


@triton.jit
def of_columns(decay, S: tl.constexpr):
    """A decay of a chunk beside rows of K columns."""
    return decay[None, :] if S.CHANNELS else decay


@triton.jit
def of_rows(decay, S: tl.constexpr):
    """A decay of a chunk beside K rows."""
    return decay[:, None] if S.CHANNELS else decay


@triton.jit
def jump(queries, pairs, decay, erased, S: tl.constexpr):
    """``Q A`` ``[C, BK]`` in Q's dtype, from ``pairs = Q K_endᵀ``, the chunk's decay and ``erased = W``."""
    passed = queries.to(tl.float32) * of_columns(decay, S)
    return tl.dot(-pairs.to(queries.dtype), erased, passed, input_precision=S.PRECISION).to(queries.dtype)
