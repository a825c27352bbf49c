"""CHUNK STATES: the leaf of every chunk and the entries inside a group of chunks, without a round trip through memory.

A program owns ``GROUP`` chunks of one head and keeps two accumulators: the *prefix* of the group, which is the entry after
1, 2, 4 and 8 chunks, and the *pair*, the last one or two chunks, which is the entry after 3, 5, 6 and 7.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.decays import gate_sums, load_gates
from loglinear.kernels.tree.place import GROUP, locate
from loglinear.kernels.tree.tiles import load_tile, store_state


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride"])
def chunk_states_kernel(
    k,
    v,
    g,
    sums,  # [H, planes, B*T] cumulative log-decay inside each chunk
    chunk_log,  # [rows, H] log-decay of a chunk
    entry_log,  # [rows, H] log-decay of an entry
    group_log,  # [groups, H]
    entries,  # [rows, H, K, V]
    group_states,  # [groups, H, K, V] state of a whole group
    checks,  # [groups, H, tiles] sum of each tile of the group's state: finite if all its tokens are
    group_sequence,
    sequences,
    T,
    N,
    NG,
    all_tokens,
    sums_stride,
    stride_k,
    stride_v,
    stride_g,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_GATE: tl.constexpr,
    LEAVES: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: groups x H x tiles of [K, V], tiles fastest. float32: accumulators, logs.

    LEAVES: whether entries of a single chunk, every other one, are stored; their logs are stored in any case.
    """
    TILES_V: tl.constexpr = (V + BV - 1) // BV
    TILES: tl.constexpr = (K + BK - 1) // BK * TILES_V
    pid = tl.program_id(0)
    tile = pid % TILES
    h = pid // TILES % H
    group = pid // (TILES * H)
    first_k = tile // TILES_V * BK
    first_v = tile % TILES_V * BV
    start, length, row0, group0, n0, _ = locate(group, group_sequence, sequences, T, N, NG, NG, PACKED)
    if length < 0:
        return
    first_chunk = (n0 // GROUP + group - group0) * GROUP
    in_chunk = tl.arange(0, C)
    k_head = k + h // (H // G) * K
    v_head = v + h * V
    prefix = tl.zeros([BK, BV], tl.float32)
    pair = tl.zeros([BK, BV], tl.float32)
    prefix_log = 0.0
    pair_log = 0.0
    for c in range(GROUP):
        local = first_chunk + c - n0
        position = local * C + in_chunk
        valid = (position >= 0) & (position < length)
        active = (local >= 0) & (local * C < length)
        origin = (start + local * C).to(tl.int64)
        k_tile = load_tile(k_head + origin * stride_k, stride_k, valid, C, K, BK, first_k)
        v_tile = load_tile(v_head + origin * stride_v, stride_v, valid, C, V, BV, first_v)
        gate = load_gates(g + origin * stride_g + h, stride_g, valid, HAS_GATE, EXACT, C)
        high, low, to_end, total = gate_sums(gate)
        weighted = (v_tile.to(tl.float32) * to_end[:, None]).to(v_tile.dtype)
        leaf = tl.dot(tl.trans(k_tile), weighted, input_precision=PRECISION)
        decay = tl.exp2(total)
        keep = c % 2  # a new pair starts at every even chunk
        prefix = prefix * decay + leaf
        pair = pair * (decay * keep) + leaf
        prefix_log += total
        pair_log = pair_log * keep + total
        is_prefix = (c & (c + 1)) == 0
        row = (row0 + local).to(tl.int64) * H + h
        # node_states writes the entry that closes a group of a longer entry.
        closes_group = (c + 1 == GROUP) & ((first_chunk // GROUP) % 2 == 1)
        entry = tl.where(is_prefix, prefix, pair)
        stored = active & (not closes_group) & (LEAVES | (c % 2 == 1))
        store_state(entries + row * (K * V), entry, stored, first_k, first_v, K, V, BK, BV)
        if tile == 0:
            head_sums = sums + h.to(tl.int64) * sums_stride + origin + in_chunk
            tl.store(head_sums, high, mask=valid)
            if EXACT:
                tl.store(head_sums + all_tokens, low, mask=valid)
            tl.store(chunk_log + row, total, mask=active)
            tl.store(entry_log + row, tl.where(is_prefix, prefix_log, pair_log), mask=active & (not closes_group))
    whole = group.to(tl.int64) * H + h
    store_state(group_states + whole * (K * V), prefix, True, first_k, first_v, K, V, BK, BV)
    tl.store(checks + whole * TILES + tile, tl.sum(prefix))
    if tile == 0:
        tl.store(group_log + whole, prefix_log)
