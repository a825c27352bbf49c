"""HEAD SUMS: a group's heads share the gradients of q and k. Programs leave partial sums; this kernel adds them in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.tree import launching
from loglinear.kernels.tree.problem import Problem


@triton.jit(do_not_specialize=["size"])
def head_sums_kernel(partial, total, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """``total [size] = sum of partial [PARTS, size]``, in order. Grid: blocks of ``size``. float32: accumulator."""
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = elements < size
    acc = tl.zeros([BLOCK], tl.float32)
    for i in range(PARTS):
        acc += tl.load(partial + i * size.to(tl.int64) + elements, mask=inside, other=0.0)
    tl.store(total + elements, acc.to(total.dtype.element_ty), mask=inside)


def partial_sums(problem: Problem, like: Tensor) -> Tensor:
    """Memory ``[H/G, B*T, G, K]`` for the shares of all heads in dq or dk, or for the result itself if H == G."""
    parts = problem.heads_per_group
    shape = (parts, problem.tokens, problem.groups, problem.key_width)
    return launching.scratch(shape, like.dtype if parts == 1 else torch.float32, like.device)


def sum_heads(partial: Tensor, like: Tensor) -> Tensor:
    """The gradient itself, of like's shape and dtype, from ``partial [parts, …]``; the same memory if there is one part."""
    if partial.shape[0] == 1:
        return partial.view(like.shape)
    total = launching.scratch(tuple(like.shape), like.dtype, like.device)
    size, block = total.numel(), 1024
    programs = -(-size // block)
    launching.launch(head_sums_kernel, programs, partial, total, size, PARTS=partial.shape[0], BLOCK=block, num_warps=4)
    return total
