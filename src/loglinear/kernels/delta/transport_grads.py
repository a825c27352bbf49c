"""TRANSPORT GRADIENTS: gradients of the states carried to the start of a group, and of the transitions that carried them.

Every chunk of a group reads the state ``T_j S_j`` of entry j on the group's path with its queries Q at the start of the
group: its gradient is the sum of ``Qᵀ (λ ∘ dO)``. From the oldest entry to the nearest, ``dT_j = d(T_j S_j) S_jᵀ +
dT_{j+1} A_jᵀ``. Both stand side by side, ``[dT_{j+1} | d(T_j S_j)]``, as the gradient of ``T_j [A_j | S_j]``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.delta.entry_grads import weighted_values
from loglinear.kernels.delta.path_states import path_start
from loglinear.kernels.delta.products import times_transposed
from loglinear.kernels.delta.tiles import load_part, store_part
from loglinear.kernels.tree.place import GROUP, bit_length, locate, log2_of_power, lowbit, set_bits


@triton.jit(do_not_specialize=["T", "N", "NG", "paths", "L", "longest"])
def path_state_grads_kernel(
    do,
    level_scales,
    group_queries,  # [rows, H, C, K] queries as seen from the start of their group
    path_grads,  # [slots, H, K, K+V], of which this kernel writes d(T S)
    path_starts,
    group_sequence,
    sequences,
    T,
    N,
    NG,
    paths,
    stride_do,
    stride_s,
    factor,
    L,
    longest,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LOG_C: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: groups x H x entries of the longest path x tiles, tiles fastest. float32: accumulator, weights."""
    TILES_N: tl.constexpr = (V + BN - 1) // BN
    TILES: tl.constexpr = (K + BK - 1) // BK * TILES_N
    pid = tl.program_id(0)
    first_n = pid % TILES_N * BN
    first_k = pid % TILES // TILES_N * BK
    j = pid // TILES % longest
    h = pid // (TILES * longest) % H
    group = pid // (TILES * longest * H)
    start, length, row0, group0, _, sequence = locate(group, group_sequence, sequences, T, N, NG, NG, PACKED)
    m = group - group0
    if (length < 0) | (j >= set_bits(m)):
        return
    f = m
    for _ in range(j):
        f &= f - 1
    level = tl.minimum(log2_of_power(lowbit(f * GROUP)) + LOG_C + 1, L - 1)
    origin = start.to(tl.int64)
    scales = level_scales + origin * stride_s + h * L + level
    values = do + origin * stride_do + h * V
    count = tl.minimum((length + C - 1) // C - m * GROUP, GROUP)
    total = tl.zeros([BK, BN], tl.float32)
    for i in range(count):
        n = m * GROUP + i
        place = ((row0 + n).to(tl.int64) * H + h) * (C * K)
        queries = load_part(group_queries + place, 0, first_k, K, C, K, C, BK)
        right = weighted_values(values, scales, n, length, first_n, stride_do, stride_s, factor, C, V, BN)
        total = tl.dot(tl.trans(queries), right, total, input_precision=PRECISION)
    slot = path_start(m, sequence, path_starts, paths, PACKED) + j
    target = path_grads + (slot.to(tl.int64) * H + h) * (K * (K + V))
    store_part(target + K, total, first_k, first_n, V, K, K + V, BK, BN)


@triton.jit
def state_product(total, gradient, entry, first_k, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
                  BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add rows ``[BM, BK]`` of ``d(T S) Sᵀ``, over tiles of V."""
    for first in range(0, V, BV):
        left = load_part(gradient + K, first_k, first, V, K, K + V, BM, BV)
        right = load_part(entry + K, 0, first, V, K, K + V, BK, BV)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["T", "N", "NG", "paths"])
def transport_grads_kernel(
    entries,  # [rows, H, K, K+V]
    path_grads,  # [slots, H, K, K+V]: reads d(T_j S_j), writes dT_{j+1}; none at the last entry of a path
    path_starts,
    group_sequence,
    sequences,
    T,
    N,
    NG,
    paths,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: groups x H x blocks of BM rows of T, blocks fastest. float32: accumulators; dT is rounded before each product."""
    SIZE: tl.constexpr = K * (K + V)
    BLOCKS: tl.constexpr = (K + BM - 1) // BM
    pid = tl.program_id(0)
    first_k = pid % BLOCKS * BM
    h = pid // BLOCKS % H
    group = pid // (BLOCKS * H)
    _, length, row0, group0, _, sequence = locate(group, group_sequence, sequences, T, N, NG, NG, PACKED)
    m = group - group0
    count = set_bits(m)
    if (length < 0) | (count < 2):
        return
    slot = path_start(m, sequence, path_starts, paths, PACKED) + count - 1
    target = path_grads + (slot.to(tl.int64) * H + h) * SIZE
    rest = m - (1 << (bit_length(m) - 1))  # the bits of the entries after the next one, which has the other bits
    entry = entries + ((row0 + (m - rest) * GROUP - 1).to(tl.int64) * HEADS + h) * SIZE
    acc = tl.zeros([BM, BK], tl.float32)
    acc = state_product(acc, target, entry, first_k, K, V, BM, BK, BV, PRECISION)
    for _ in range(count - 2):
        after = acc.to(path_grads.dtype.element_ty)
        target -= H * SIZE
        store_part(target, after, first_k, 0, K, K, K + V, BM, BK)
        rest -= 1 << (bit_length(rest) - 1)
        entry = entries + ((row0 + (m - rest) * GROUP - 1).to(tl.int64) * HEADS + h) * SIZE
        acc = times_transposed(after, entry, K + V, K, BM, BK, PRECISION)
        acc = state_product(acc, target, entry, first_k, K, V, BM, BK, BV, PRECISION)
    store_part(target - H * SIZE, acc, first_k, 0, K, K, K + V, BM, BK)
