"""CHUNK STATES: the leaf of every chunk and the entries inside an octet of chunks, without a round trip through memory.

A program owns ``OCTET`` chunks of one head and keeps two accumulators: the *prefix* of the octet, which is the entry after
1, 2, 4 and 8 chunks, and the *pair*, the last one or two chunks, which is the entry after 3, 5, 6 and 7. For span kernels,
which read no pair, the sums of the gates come from a kernel of their own: a sum over 64 tokens costs six barriers a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.decays import at_most_zero, gate_sums, gates_of, log2_of_gate
from loglinear.kernels.tree.place import OCTET, chunk_of, locate, row_of, row_of_program, tile_of_program
from loglinear.kernels.tree.tiles import load_tile, store_entry


@triton.jit
def chunk_gates(chunk, at, x, h, S: tl.constexpr):
    """Log-decays ``[C]`` of a chunk of the tree, 0 where no token is."""
    position = (chunk - at.n0) * S.C + tl.arange(0, S.C)
    valid = (position >= 0) & (position < at.length)
    return gates_of(x, (at.start + (chunk - at.n0) * S.C).to(tl.int64), h, valid, S)


@triton.jit(do_not_specialize=["T", "N", "NG", "sums_stride"])
def chunk_sums_kernel(x, states, table, T, N, NG, sums_stride, S: tl.constexpr, HEADS: tl.constexpr):
    """``sums`` and ``chunk_log`` for 16-bit inputs, of HEADS heads at once. Grid: blocks of heads x chunks, chunks fastest."""
    at, chunk, block, _ = row_of_program(table, T, N, NG, (S.H + HEADS - 1) // HEADS, S)
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    t, h = tl.arange(0, S.C)[:, None], block * HEADS + tl.arange(0, HEADS)[None, :]
    present = here.valid[:, None] & (h < S.H)
    gate = tl.zeros([S.C, HEADS], tl.float32)
    if x.g is not None:
        raw = tl.load(x.g + here.origin * x.stride_g + (t * x.stride_g + h), mask=present, other=0.0)
        gate = log2_of_gate(raw.to(tl.float32))
    sums = states.sums + here.origin + h.to(tl.int64) * sums_stride
    tl.store(sums + t, tl.cumsum(gate, axis=0), mask=present)
    tl.store(states.chunk_log + chunk.to(tl.int64) * S.H + h, tl.sum(gate, axis=0)[None, :], mask=h < S.H)


@triton.jit
def sums_of_chunk(chunk, at, states, sums, h, S: tl.constexpr):
    """(decay ``[C]`` of the tokens of a chunk of the tree to its end, its log-decay), from what ``chunk_sums_kernel`` wrote."""
    local = chunk - at.n0
    position = local * S.C + tl.arange(0, S.C)
    valid = (position >= 0) & (position < at.length)
    inside = (local >= 0) & (local * S.C < at.length)
    total = tl.load(states.chunk_log + (at.chunk0 + local).to(tl.int64) * S.H + h, mask=inside, other=0.0)
    high = tl.load(sums + (at.start + local * S.C) + tl.arange(0, S.C), mask=valid, other=0.0)
    return tl.exp2(at_most_zero(total - high)), total


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride"])
def chunk_states_kernel(x, states, table, T, N, NG, all_tokens, sums_stride, S: tl.constexpr, LEAST: tl.constexpr):
    """Grid: octets x H x tiles of [K, V], tiles fastest. float32: accumulators, logs. Fills ``states`` but for longer entries.

    LEAST: chunks of the shortest entry that is stored, 1 to 4; the logs of all entries are. Entries of 4 or more have no rows
    for others between them, and ``sums`` and ``chunk_log`` are there before.
    """
    TILES: tl.constexpr = (S.K + S.BK - 1) // S.BK * ((S.V + S.BV - 1) // S.BV)
    part, octet = tile_of_program(S)
    tile, first_k, first_v, h = part
    at = locate(octet, table, T, N, NG, NG, S.PACKED)
    if at.length < 0:
        return
    first_chunk = (at.n0 // OCTET + octet - at.octet0) * OCTET
    in_chunk = tl.arange(0, S.C)
    k_head = x.k + h // (S.H // S.G) * S.K
    v_head = x.v + h * S.V
    prefix = tl.zeros([S.BK, S.BV], tl.float32)
    pair = tl.zeros([S.BK, S.BV], tl.float32)
    prefix_log = 0.0
    pair_log = 0.0
    sums = states.sums + h.to(tl.int64) * sums_stride
    if LEAST == 4:  # those of the next chunk are on their way while one is computed
        next_to_end, next_total = sums_of_chunk(first_chunk, at, states, sums, h, S)
    for c in range(OCTET):
        local = first_chunk + c - at.n0
        position = local * S.C + in_chunk
        valid = (position >= 0) & (position < at.length)
        active = (local >= 0) & (local * S.C < at.length)
        origin = (at.start + local * S.C).to(tl.int64)
        k_tile = load_tile(k_head + origin * x.stride_k, x.stride_k, valid, S.C, S.K, S.BK, first_k)
        v_tile = load_tile(v_head + origin * x.stride_v, x.stride_v, valid, S.C, S.V, S.BV, first_v)
        if LEAST == 4:
            to_end, total = next_to_end, next_total
            next_to_end, next_total = sums_of_chunk(first_chunk + c + 1, at, states, sums, h, S)
        else:
            high, low, to_end, total = gate_sums(chunk_gates(first_chunk + c, at, x, h, S))
        weighted = (v_tile.to(tl.float32) * to_end[:, None]).to(v_tile.dtype)
        decay = tl.exp2(total)
        keep = c % 2  # a new pair starts at every even chunk
        if LEAST < 4:
            leaf = tl.dot(tl.trans(k_tile), weighted, input_precision=S.PRECISION)
            prefix = prefix * decay + leaf
            pair = pair * (decay * keep) + leaf
        else:  # no pair is stored: registers for one accumulator
            prefix = tl.dot(tl.trans(k_tile), weighted, acc=prefix * decay, input_precision=S.PRECISION)
        prefix_log += total
        pair_log = pair_log * keep + total
        is_prefix = (c & (c + 1)) == 0
        site = (at.chunk0 + local).to(tl.int64) * S.H + h
        # The entry that closes an octet of a longer entry is node_states' to write.
        closes_octet = (c + 1 == OCTET) & ((first_chunk // OCTET) % 2 == 1)
        entry = tl.where(is_prefix, prefix, pair) if LEAST < 4 else prefix
        stored = active & (not closes_octet) & ((c + 1) % LEAST == 0)
        row = row_of(at.chunk0 + local, 4 if LEAST == 4 else 1).to(tl.int64) * S.H + h
        store_entry(states.entries, row, entry, stored, first_k, first_v, S)
        if tile == 0:
            if LEAST < 4:
                tl.store(sums + origin + in_chunk, high, mask=valid)
                if S.EXACT:
                    tl.store(sums + origin + in_chunk + all_tokens, low, mask=valid)
                tl.store(states.chunk_log + site, total, mask=active)
            tl.store(
                states.entry_log + site, tl.where(is_prefix, prefix_log, pair_log), mask=active & (not closes_octet)
            )
    whole = octet.to(tl.int64) * S.H + h
    store_entry(states.octet_states, whole, prefix, True, first_k, first_v, S)
    tl.store(states.checks + whole * TILES + tile, tl.sum(prefix))
    if tile == 0:
        tl.store(states.octet_log + whole, prefix_log)
