"""GATE GRADIENTS: dq, dk and dg, from the gradients of scores, of decayed queries and of decayed keys.

A gate lies between the keys before its token and the queries from its token on. Per channel, dg is the sum over these pairs.
They are pairs of one block of 16 tokens, level by level as the scores were made, of two blocks of a chunk, and of two chunks.
For those with one token in this block, the gains of queries and of keys are added up, from the farthest pairs to the nearest.
All are sums; no difference is taken.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from loglinear.kernels.channel.decays import (
    between,
    either_way,
    in_odd_block,
    level_ends,
    load_log,
    load_rows,
    load_sums,
    meet,
    settled,
    store_rows,
)
from loglinear.kernels.tree.decays import GATE_FLOOR
from loglinear.kernels.tree.levels import LOG_SUB, SUB
from loglinear.kernels.tree.place import chunk_of, locate


class Block(NamedTuple):
    """Block b of 16 tokens of a chunk, of head h, and a tile of channels from ``first`` on. Tensors are ``[BK, SUB]``, float32.

    q, k, high, low: queries, keys, running sums of gates and their rounding errors. matrix: the gradient of the chunk's scores.
    """

    h: Any
    b: Any
    first: Any
    matrix: Any
    q: Any
    k: Any
    high: Any
    low: Any


@triton.jit
def load_turned(base, stride, here, t, first, S: tl.constexpr):
    """``decays.load_rows`` ``[BK, SUB]``, float32: with channels as rows, a product's result is another one's left operand."""
    return settled(tl.trans(load_rows(base, stride, here, t, first, S)), S)


@triton.jit
def load_own(base, place, first, S: tl.constexpr):
    """The same of the tokens from ``place`` on of one chunk's ``[C, K]``."""
    rows, columns = place + tl.arange(0, SUB)[:, None], first + tl.arange(0, S.BK)[None, :]
    return settled(tl.trans(tl.load(base + (rows * S.K + columns), mask=columns < S.K, other=0.0)), S)


@triton.jit
def turned_sums(sums, here, h, t, first, S: tl.constexpr):
    """``decays.load_sums`` ``[BK, SUB]``."""
    high, low = load_sums(sums, here, h, t, first, S)
    return settled(tl.trans(high), S), tl.trans(low)


@triton.jit
def sums_at(sums, here, h, place, first, S: tl.constexpr):
    """The same ``[BK, 1]`` of one place."""
    high, low = load_sums(sums, here, h, tl.arange(0, 1) + place, first, S)
    return tl.trans(high), tl.trans(low)


@triton.jit
def load_pairs(matrix, later, earlier, C: tl.constexpr):
    """The pairs ``[SUB, SUB]`` of two blocks of a matrix ``[C, C]``, from their first places."""
    rows, columns = later + tl.arange(0, SUB)[:, None], earlier + tl.arange(0, SUB)[None, :]
    return tl.load(matrix + (rows * C + columns))


@triton.jit
def earlier_keys(x, sums, here, h, place, high, low, first, S: tl.constexpr):
    """The keys of a block as seen from a later token, whose sums are given, in their own dtype."""
    t = place + tl.arange(0, SUB)
    k = load_turned(x.k + h // (S.H // S.G) * S.K, x.stride_k, here, t, first, S)
    own_high, own_low = turned_sums(sums, here, h, t, first, S)
    return (k * between(own_high, own_low, high, low, S)).to(x.k.dtype.element_ty)


@triton.jit
def block_pairs(found, block, x, sums, here, S: tl.constexpr):
    """(``found``, with the pairs of two blocks of a chunk, gains ``[BK]`` of those around the block).

    found: dq, dk, and the gains of queries and of keys, ``[BK, SUB]`` float32.

    A query meets the keys of earlier blocks at the start of its block, a key its later queries at the end of its own.
    """
    dq, dk, own_queries, own_keys = found
    h, b, first, matrix, q, k, high, low = block
    DELTA: tl.constexpr = x.beta is not None
    place, overlaps = b * SUB, matrix + S.C * S.C
    low_type = x.q.dtype.element_ty
    head = h // (S.H // S.G) * S.K
    start_high, start_low = sums_at(sums, here, h, place - 1, first, S)
    end_high, end_low = sums_at(sums, here, h, place + SUB - 1, first, S)
    from_queries = tl.zeros([S.BK, SUB], tl.float32)
    from_keys = from_queries
    for j in tl.range(0, b, num_stages=1):
        keys = earlier_keys(x, sums, here, h, j * SUB, start_high, start_low, first, S)
        pairs = tl.trans(load_pairs(matrix, place, j * SUB, S.C))
        from_queries = tl.dot(keys, pairs, from_queries, input_precision=S.PRECISION)
        if DELTA:
            pairs = tl.trans(load_pairs(overlaps, place, j * SUB, S.C))
            from_keys = tl.dot(keys, pairs, from_keys, input_precision=S.PRECISION)
    decay = between(start_high, start_low, high, low, S)
    dq += from_queries * decay
    gains = from_queries * q
    if DELTA:
        dk += from_keys * decay
        gains += from_keys * k
    own_queries += gains * decay

    around = tl.zeros([S.BK], tl.float32)
    to_keys = tl.zeros([S.BK, SUB], tl.float32)
    blocks = (tl.minimum(here.size, S.C) + SUB - 1) // SUB
    for i in tl.range(b + 1, blocks, num_stages=1):
        t = i * SUB + tl.arange(0, SUB)
        later_high, later_low = turned_sums(sums, here, h, t, first, S)
        decay = between(end_high, end_low, later_high, later_low, S)
        later_q = load_turned(x.q + head, x.stride_q, here, t, first, S) * decay
        pairs = load_pairs(matrix, i * SUB, place, S.C)
        to_keys = tl.dot(later_q.to(low_type), pairs, to_keys, input_precision=S.PRECISION)
        if DELTA:
            later_k = load_turned(x.k + head, x.stride_k, here, t, first, S) * decay
            pairs = load_pairs(overlaps, i * SUB, place, S.C)
            to_keys = tl.dot(later_k.to(low_type), pairs, to_keys, input_precision=S.PRECISION)
        for j in tl.range(0, b, num_stages=1):
            keys = earlier_keys(x, sums, here, h, j * SUB, start_high, start_low, first, S)
            pairs = tl.trans(load_pairs(matrix, i * SUB, j * SUB, S.C))
            gains = tl.dot(keys, pairs, input_precision=S.PRECISION) * later_q
            if DELTA:
                pairs = tl.trans(load_pairs(overlaps, i * SUB, j * SUB, S.C))
                gains += tl.dot(keys, pairs, input_precision=S.PRECISION) * later_k
            around += tl.sum(gains, axis=1)
    to_keys *= between(high, low, end_high, end_low, S)
    dk += to_keys
    own_keys += to_keys * k
    around *= tl.reshape(between(start_high, start_low, end_high, end_low, S), [S.BK])
    return (dq, dk, own_queries, own_keys), around


@triton.jit
def both_ways(matrix, place, C: tl.constexpr):
    """The gradient of a pair of a block for both of its tokens; what is stored is zero above the diagonal."""
    stored = load_pairs(matrix, place, place, C)
    return stored + tl.trans(stored)


@triton.jit(do_not_specialize=["T", "N", "NG", "part_stride"])
def gate_grads_kernel(
    x, sums, score_grads, grads, out, part_stride, table, T, N, NG, S: tl.constexpr, PLANES: tl.constexpr
):
    """x: the inputs of the call, not the decayed ones. score_grads: ``[chunks, H, PLANES, C, C]``, with the delta rule those of
    overlaps behind those of scores. grads: with the delta rule q and k in the layout of its kernels. part_stride: of dq and dk.

    Grid: blocks of SUB tokens of a chunk x tiles of K x H x chunks, blocks fastest. float32: accumulators, logs, gains.

    A program has one warp and waits for no other: 16 tokens and few channels fit into its registers.
    """
    PARTS: tl.constexpr = S.H // S.G
    DELTA: tl.constexpr = x.beta is not None
    BLOCKS: tl.constexpr = S.C // SUB
    TILES: tl.constexpr = (S.K + S.BK - 1) // S.BK
    pid = tl.program_id(0)
    b = pid % BLOCKS
    first = pid // BLOCKS % TILES * S.BK
    h = pid // (BLOCKS * TILES) % S.H
    chunk = pid // (BLOCKS * TILES * S.H)
    at = locate(chunk, table, T, N, NG, N, S.PACKED)
    here = chunk_of(at, chunk, S.C)
    if (at.length < 0) | (b * SUB >= here.size):
        return
    t = b * SUB + tl.arange(0, SUB)
    head = h // PARTS * S.K
    site = chunk.to(tl.int64) * S.H + h
    matrix = score_grads + site * (PLANES * S.C * S.C)
    q = load_turned(x.q + head, x.stride_q, here, t, first, S)
    k = load_turned(x.k + head, x.stride_k, here, t, first, S)
    high, low = turned_sums(sums, here, h, t, first, S)

    # Pairs of two chunks: a query meets its keys at the start of the chunk, a key its queries at the end.
    end_high, end_low = sums_at(sums, here, h, S.C, first, S)
    late, early = tl.exp2(high), between(high, low, end_high, end_low, S)
    if DELTA:
        SIZE: tl.constexpr = S.C * S.K
        starts = load_own(grads.k + 2 * site * SIZE, b * SUB, first, S) * late
        dq = load_own(grads.q + site * SIZE, b * SUB, first, S) * late
        dk = load_own(grads.k + (2 * site + 1) * SIZE, b * SUB, first, S) * early
        own_keys = dk * k
        own_queries = dq * q + starts * k
        dk += starts
    else:
        dq = load_turned(grads.q + h * S.K, S.H * S.K, here, t, first, S) * late
        dk = load_turned(grads.k + h * S.K, S.H * S.K, here, t, first, S) * early
        own_keys = dk * k
        own_queries = dq * q
    block = Block(h, b, first, matrix, q, k, high, low)
    found, around = block_pairs((dq, dk, own_queries, own_keys), block, x, sums, here, S)
    dq, dk, own_queries, own_keys = found
    around += load_log(grads.around, site * BLOCKS + b, first, S)
    gain = tl.zeros([S.BK, SUB], tl.float32) + around[:, None]

    # Pairs of a block: from the longest to the shortest, after which no gate lies between a token and its own place.
    pairs = both_ways(matrix, b * SUB, S.C)
    itself = tl.load(matrix + t * (S.C + 1)).to(tl.float32)[None, :]
    dq += itself * k
    dk += itself * q
    if DELTA:
        overlaps = both_ways(matrix + S.C * S.C, b * SUB, S.C)
    low_type = x.q.dtype.element_ty
    for i in tl.range(0, LOG_SUB, num_stages=1):  # not unrolled: the loads of all levels at once would spill
        level = LOG_SUB - 1 - i
        odd, partners = in_odd_block(level, t)[None, :], meet(level, t)
        passing = tl.where(odd, own_queries, own_keys).to(low_type)
        gain = tl.dot(passing, tl.where(partners, 1.0, 0.0).to(low_type), acc=gain, input_precision=S.PRECISION)
        edge_high, edge_low = turned_sums(sums, here, h, level_ends(level, t), first, S)
        decay = either_way(high, low, edge_high, edge_low, S)
        of_query = tl.where(odd, decay, 0.0)
        of_key = decay - of_query
        mixed = tl.where(odd, q, k)
        own = tl.where(partners, pairs, 0.0).to(low_type)
        gradient = tl.dot((mixed * decay).to(low_type), own, input_precision=S.PRECISION)
        dq += gradient * of_query
        dk += gradient * of_key
        shares = gradient * mixed
        if DELTA:
            own = tl.where(partners, overlaps, 0.0).to(low_type)
            gradient = tl.dot((k * decay).to(low_type), own, input_precision=S.PRECISION)
            dk += gradient * decay
            shares += gradient * k
        own_queries += shares * of_query
        own_keys += shares * of_key
    gain += own_queries

    part = (h % PARTS).to(tl.int64) * part_stride + head
    store_rows(out.dq + part, out.stride_dq, here, t, tl.trans(dq), first, S)
    store_rows(out.dk + part, out.stride_dk, here, t, tl.trans(dk), first, S)
    raw = load_rows(x.g + h * S.K, x.stride_g, here, t, first, S).to(tl.float32)
    gain = tl.where(raw > GATE_FLOOR, tl.trans(gain), 0.0)
    store_rows(out.dg + h * S.K, out.stride_dg, here, t, gain, first, S)
