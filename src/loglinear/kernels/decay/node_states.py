"""NODE STATES: the entries of more than one group, all in parallel, each as a sum of the states of its groups.

An entry of 2^m groups reads 2^m group states instead of m children, so one launch builds every level. Only one chunk in
sixteen ends such an entry. A float32 accumulator carries the sum from end to end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.place import GROUP, locate, lowbit


@triton.jit(do_not_specialize=["T", "N", "NG"])
def node_states_kernel(
    group_states,
    group_log,
    entries,
    entry_log,
    group_sequence,
    sequences,
    T,
    N,
    NG,
    H: tl.constexpr,
    STATE: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid: groups x H x blocks of BLOCK elements of [K, V], blocks fastest. float32: accumulator, logs."""
    BLOCKS: tl.constexpr = (STATE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    block = pid % BLOCKS
    h = pid // BLOCKS % H
    group = pid // (BLOCKS * H)
    _, length, row0, group0, n0, _ = locate(group, group_sequence, sequences, T, N, NG, NG, PACKED)
    if length < 0:
        return
    first = n0 // GROUP
    last = first + group - group0
    entry = (last + 1) * GROUP
    span = lowbit(last + 1)
    if (span == 1) | (entry - n0 > (length + C - 1) // C):
        return
    elements = block * BLOCK + tl.arange(0, BLOCK)
    inside = elements < STATE
    total = tl.zeros([BLOCK], tl.float32)
    total_log = 0.0
    oldest = tl.maximum(last + 1 - span, first)
    for i in range(last + 1 - oldest):
        unit = (group0 + oldest + i - first).to(tl.int64) * H + h
        log = tl.load(group_log + unit)
        state = tl.load(group_states + unit * STATE + elements, mask=inside, other=0.0).to(tl.float32)
        total = total * tl.exp2(log) + state
        total_log += log
    row = (row0 + entry - 1 - n0).to(tl.int64) * H + h
    tl.store(entries + row * STATE + elements, total.to(entries.dtype.element_ty), mask=inside)
    if block == 0:
        tl.store(entry_log + row, total_log)
