"""PATH STATES: the states of the entries before an octet, carried to its start, where the queries of all its chunks read them.

The *path* of octet m is the list of entries ``e_0 > e_1 > …`` that cover all chunks before it, one for each bit of m.
They end the query path of each chunk of the octet. With ``T_0 = I`` and ``T_{j+1} = T_j A_j``, entry j gives a query Q
at the start of the octet ``λ ∘ (Q T_j S_j)``. So ``T_j S_j`` is computed once for the octet, and its chunks read these
states in any order, without A. ``T_0 S_0`` and ``T_1`` are entry e_0 as it is, and are not stored again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.delta.products import times_memory
from loglinear.kernels.tree.place import OCTET, locate, set_bits, set_bits_before
from loglinear.kernels.tree.tiles import block_of, load_part


@triton.jit
def path_start(m, at, path_starts, paths, PACKED: tl.constexpr):
    """Slot of the first entry on the path of octet m, of the sequence at ``at``, in an array of all paths."""
    if PACKED:
        before = tl.load(path_starts + at.sequence)
    else:
        before = at.sequence * paths
    return before + set_bits_before(m)


@triton.jit(do_not_specialize=["T", "N", "NG", "paths"])
def path_states_kernel(
    entries, states, path_starts, table, T, N, NG, paths, S: tl.constexpr, BM: tl.constexpr, MAPS: tl.constexpr
):
    """States ``[slots, H, K, V]``: T_j S_j, or if MAPS ``[slots, H, K, K+V]``: [T_j | T_j S_j]; none for j = 0.

    Grid: octets x H x blocks of BM rows of T, blocks fastest. float32: accumulators; T is rounded before each product.
    """
    WIDTH: tl.constexpr = S.K + S.V
    STRIDE: tl.constexpr = WIDTH if MAPS else S.V
    BLOCKS: tl.constexpr = (S.K + BM - 1) // BM
    TILES: tl.constexpr = (S.V + S.BK - 1) // S.BK  # tiles of S, each as wide as A; A and these tiles take turns
    pid = tl.program_id(0)
    first_k = pid % BLOCKS * BM
    h = pid // BLOCKS % S.H
    octet = pid // (BLOCKS * S.H)
    at = locate(octet, table, T, N, NG, NG, S.PACKED)
    m = octet - at.octet0
    count = set_bits(m)
    if (at.length < 0) | (count < 2):
        return
    slot = path_start(m, at, path_starts, paths, S.PACKED)
    nearest = entries + ((at.chunk0 + m * OCTET - 1).to(tl.int64) * S.HEADS + h) * (S.K * WIDTH)
    x = load_part(nearest, WIDTH, first_k, 0, S.K, S.K, BM, S.BK)
    f = m & (m - 1)
    for step in range((count - 1) * (TILES + 1) - 1):
        j = step // (TILES + 1) + 1
        tile = step % (TILES + 1)
        jump = tile == TILES
        source = entries + ((at.chunk0 + f * OCTET - 1).to(tl.int64) * S.HEADS + h) * (S.K * WIDTH)
        first = tl.where(jump, 0, S.K + tile * S.BK)
        end = tl.where(jump, S.K, WIDTH)
        MASKED: tl.constexpr = (S.K % S.BK != 0) or (S.V % S.BK != 0)
        result = times_memory(x, source, WIDTH, first, end, BM, MASKED, S).to(x.dtype)
        target = states + ((slot + j + jump.to(tl.int32)).to(tl.int64) * S.H + h) * (S.K * STRIDE)
        first = tl.where(jump, 0, STRIDE - S.V + tile * S.BK)
        end = tl.where(jump, STRIDE - S.V, STRIDE)  # without MAPS a jump stores nothing
        pointers, inside = block_of(target, STRIDE, first_k, first, 0, end, S.K, BM, S.BK)
        tl.store(pointers, result, mask=inside)
        x = tl.where(jump, result, x)
        f = tl.where(jump, f & (f - 1), f)
