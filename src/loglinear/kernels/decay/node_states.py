"""NODE STATES: the entries of more than one octet, all in parallel, each as a sum of the states of its octets.

An entry of 2^m octets reads 2^m octet states instead of m children, so one launch builds every level. Only one chunk in
sixteen ends such an entry. A float32 accumulator carries the sum from end to end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.place import OCTET, locate, lowbit, row_of


@triton.jit(do_not_specialize=["T", "N", "NG"])
def node_states_kernel(states, table, T, N, NG, S: tl.constexpr, BLOCK: tl.constexpr, EVERY: tl.constexpr):
    """Grid: octets x H x blocks of BLOCK elements of [K, V], blocks fastest. float32: accumulator, logs.

    EVERY: chunks that share a row of the entries.
    """
    STATE: tl.constexpr = S.K * S.V
    BLOCKS: tl.constexpr = (STATE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    block = pid % BLOCKS
    h = pid // BLOCKS % S.H
    octet = pid // (BLOCKS * S.H)
    at = locate(octet, table, T, N, NG, NG, S.PACKED)
    if at.length < 0:
        return
    first = at.n0 // OCTET
    last = first + octet - at.octet0
    entry = (last + 1) * OCTET
    span = lowbit(last + 1)
    if (span == 1) | (entry - at.n0 > (at.length + S.C - 1) // S.C):
        return
    elements = block * BLOCK + tl.arange(0, BLOCK)
    inside = elements < STATE
    total = tl.zeros([BLOCK], tl.float32)
    total_log = 0.0
    oldest = tl.maximum(last + 1 - span, first)
    for i in range(last + 1 - oldest):
        site = (at.octet0 + oldest + i - first).to(tl.int64) * S.H + h
        log = tl.load(states.octet_log + site)
        state = tl.load(states.octet_states + site * STATE + elements, mask=inside, other=0.0).to(tl.float32)
        total = total * tl.exp2(log) + state
        total_log += log
    site_of_entry = (at.chunk0 + entry - 1 - at.n0).to(tl.int64) * S.H + h
    row = row_of(at.chunk0 + entry - 1 - at.n0, EVERY).to(tl.int64) * S.H + h
    tl.store(states.entries + row * STATE + elements, total.to(states.entries.dtype.element_ty), mask=inside)
    if block == 0:
        tl.store(states.entry_log + site_of_entry, total_log)
