"""HEAD SUMS: gradients of q and k are shared by the heads of a group; programs leave partial sums, this adds them in order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["size"])
def head_sums_kernel(partial, total, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """``total [size] = sum of partial [PARTS, size]``, in order. Grid: blocks of ``size``. float32: accumulator."""
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = elements < size
    acc = tl.zeros([BLOCK], tl.float32)
    for i in range(PARTS):
        acc += tl.load(partial + i * size.to(tl.int64) + elements, mask=inside, other=0.0)
    tl.store(total + elements, acc.to(total.dtype.element_ty), mask=inside)
