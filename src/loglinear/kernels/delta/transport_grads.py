"""TRANSPORT GRADIENTS: gradients of the states carried to the start of an octet, and of the transitions that carried them.

Every chunk of an octet reads the state ``T_j S_j`` of entry j on the octet's path with its queries Q at the start of the
octet: its gradient is the sum of ``Qᵀ (λ ∘ dO)``. From the oldest entry to the nearest, ``dT_j = d(T_j S_j) S_jᵀ +
dT_{j+1} A_jᵀ``. Both stand side by side, ``[dT_{j+1} | d(T_j S_j)]``, as the gradient of ``T_j [A_j | S_j]``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.delta.entry_grads import weighted_values
from loglinear.kernels.delta.path_states import path_start
from loglinear.kernels.delta.products import times_transposed
from loglinear.kernels.tree.place import OCTET, bit_length, locate, log2_of_power, lowbit, set_bits
from loglinear.kernels.tree.tiles import load_part, store_part


@triton.jit(do_not_specialize=["T", "N", "NG", "paths", "L", "longest"])
def path_state_grads_kernel(
    x, L, octet_queries, path_grads, path_starts, table, T, N, NG, paths, longest, S: tl.constexpr
):
    """d(T S) of ``path_grads [slots, H, K, K+V]``.

    Grid: octets x H x entries of the longest path x tiles, tiles fastest. float32: accumulator, weights.
    """
    TILES_N: tl.constexpr = (S.V + S.BN - 1) // S.BN
    TILES: tl.constexpr = (S.K + S.BK - 1) // S.BK * TILES_N
    pid = tl.program_id(0)
    first_n = pid % TILES_N * S.BN
    first_k = pid % TILES // TILES_N * S.BK
    j = pid // TILES % longest
    h = pid // (TILES * longest) % S.H
    octet = pid // (TILES * longest * S.H)
    at = locate(octet, table, T, N, NG, NG, S.PACKED)
    m = octet - at.octet0
    if (at.length < 0) | (j >= set_bits(m)):
        return
    f = m
    for _ in range(j):
        f &= f - 1
    scale_level = tl.minimum(log2_of_power(lowbit(f * OCTET)) + S.LOG_C + 1, L - 1)
    count = tl.minimum((at.length + S.C - 1) // S.C - m * OCTET, OCTET)
    total = tl.zeros([S.BK, S.BN], tl.float32)
    for i in range(count):
        n = m * OCTET + i
        place = ((at.chunk0 + n).to(tl.int64) * S.H + h) * (S.C * S.K)
        queries = load_part(octet_queries + place, S.K, 0, first_k, S.C, S.K, S.C, S.BK)
        right = weighted_values(x, at, n, h, scale_level, first_n, L, S)
        total = tl.dot(tl.trans(queries), right, total, input_precision=S.PRECISION)
    slot = path_start(m, at, path_starts, paths, S.PACKED) + j
    target = path_grads + (slot.to(tl.int64) * S.H + h) * (S.K * (S.K + S.V))
    store_part(target + S.K, S.K + S.V, total, first_k, first_n, S.K, S.V, S.BK, S.BN)


@triton.jit
def state_product(total, gradient, entry, first_k, BM: tl.constexpr, S: tl.constexpr):
    """Add rows ``[BM, BK]`` of ``d(T S) Sᵀ``, over tiles of V."""
    for first in range(0, S.V, S.BV):
        left = load_part(gradient + S.K, S.K + S.V, first_k, first, S.K, S.V, BM, S.BV)
        right = load_part(entry + S.K, S.K + S.V, 0, first, S.K, S.V, S.BK, S.BV)
        total = tl.dot(left, tl.trans(right), total, input_precision=S.PRECISION)
    return total


@triton.jit(do_not_specialize=["T", "N", "NG", "paths"])
def transport_grads_kernel(entries, path_grads, path_starts, table, T, N, NG, paths, S: tl.constexpr, BM: tl.constexpr):
    """Reads d(T_j S_j) of ``path_grads [slots, H, K, K+V]``, writes dT_{j+1}; none at the last entry of a path.

    Grid: octets x H x blocks of BM rows of T, blocks fastest. float32: accumulators; dT is rounded before each product.
    """
    SIZE: tl.constexpr = S.K * (S.K + S.V)
    BLOCKS: tl.constexpr = (S.K + BM - 1) // BM
    pid = tl.program_id(0)
    first_k = pid % BLOCKS * BM
    h = pid // BLOCKS % S.H
    octet = pid // (BLOCKS * S.H)
    at = locate(octet, table, T, N, NG, NG, S.PACKED)
    m = octet - at.octet0
    count = set_bits(m)
    if (at.length < 0) | (count < 2):
        return
    slot = path_start(m, at, path_starts, paths, S.PACKED) + count - 1
    target = path_grads + (slot.to(tl.int64) * S.H + h) * SIZE
    rest = m - (1 << (bit_length(m) - 1))  # the bits of the entries after the next one, which has the other bits
    entry = entries + ((at.chunk0 + (m - rest) * OCTET - 1).to(tl.int64) * S.HEADS + h) * SIZE
    acc = tl.zeros([BM, S.BK], tl.float32)
    acc = state_product(acc, target, entry, first_k, BM, S)
    for _ in range(count - 2):
        after = acc.to(path_grads.dtype.element_ty)
        target -= S.H * SIZE
        store_part(target, S.K + S.V, after, first_k, 0, S.K, S.K, BM, S.BK)
        rest -= 1 << (bit_length(rest) - 1)
        entry = entries + ((at.chunk0 + (m - rest) * OCTET - 1).to(tl.int64) * S.HEADS + h) * SIZE
        acc = times_transposed(after, entry, S.K + S.V, BM, S)
        acc = state_product(acc, target, entry, first_k, BM, S)
    store_part(target - S.H * SIZE, S.K + S.V, acc, first_k, 0, S.K, S.K, BM, S.BK)
