"""LINEAR CROSS-ENTROPY: the loss of an output layer and its gradients, a block of tokens at a time.

The logits of all tokens are never in memory together. A matrix product makes the logits of one block. One kernel turns them in
place into the gradient of the loss. Two more products use this gradient at once, for the gradients of the hidden states and of
the weight. The backward pass only multiplies these gradients by the incoming gradient.

Legend: N tokens, D width of the hidden states; a row is the logits of one token, padded in memory to a multiple of 16.
float32: everything inside the kernel, the losses, and the sum over blocks of the weight's gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.tree import launching

LOGITS_BYTES = 256 << 20  # of one block: products of thousands of rows, and some gigabytes less than all logits
ROWS = 128  # a block has a multiple of this
TILE, WARPS = 4096, 8  # logits that a program holds at once
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: a first difference of two maxima is never inf - inf


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_kernel(
    logits, targets, losses, stride, vocab, ignore_index, GRADIENT: tl.constexpr, TILE: tl.constexpr
):
    """losses ``[rows]`` from logits ``[rows, vocab]`` of row stride ``stride``, which become ``softmax - onehot``.

    Where targets ``[rows]`` are ``ignore_index`` both are zero; where they are no column, both are NaN. Grid: rows.
    """
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    columns = tl.arange(0, TILE)
    target = tl.load(targets + row)
    if target == ignore_index:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            zeros = tl.zeros([TILE], logits.dtype.element_ty)
            for first in range(0, vocab, TILE):
                tl.store(base + first + columns, zeros, mask=first + columns < vocab)
    else:
        known = (target >= 0) & (target < vocab)
        own = tl.load(base + target, mask=known, other=float("nan")).to(tl.float32)
        peak = LOWEST
        total = 0.0
        for first in range(0, vocab, TILE):
            x = tl.load(base + first + columns, mask=first + columns < vocab, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(peak, tl.max(x, 0))
            total = total * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher), 0)
            peak = higher
        tl.store(losses + row, tl.log(total) + (peak - own))
        if GRADIENT:
            share = tl.where(known, 1 / total, float("nan"))
            for first in range(0, vocab, TILE):
                inside = first + columns < vocab
                x = tl.load(base + first + columns, mask=inside, other=float("-inf")).to(tl.float32)
                gradient = tl.exp(x - peak) * share - tl.where(first + columns == target, 1.0, 0.0)
                tl.store(base + first + columns, gradient.to(logits.dtype.element_ty), mask=inside)


def loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, hidden_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(sum of the losses, float32; its gradient for hidden; its gradient for weight, float32). The same bits on every run.

    Args:
        hidden: ``[N, D]`` and weight ``[vocab, D]``: contiguous, of one dtype of at most 32 bits, which the logits take too.
        targets: int64 ``[N]``, columns of the logits or ``ignore_index``; the loss is NaN if one is neither.
        hidden_grad, weight_grad: which gradients are wanted; a gradient that is not wanted is None.
    """
    (count, width), vocab = hidden.shape, weight.shape[0]
    device = hidden.device
    losses = launching.scratch((count,), torch.float32, device)
    dhidden = launching.scratch((count, width), hidden.dtype, device) if hidden_grad else None
    dweight = torch.zeros(vocab, width, dtype=torch.float32, device=device) if weight_grad else None
    stride = -(-vocab // 16) * 16
    rows = block_rows(count, stride * hidden.element_size())
    memory = launching.scratch((rows, stride), hidden.dtype, device)
    memory[:, vocab:] = 0  # a product may read the padding and multiply it by zero
    sizes = dict(GRADIENT=hidden_grad or weight_grad, TILE=min(TILE, triton.next_power_of_2(vocab)), num_warps=WARPS)
    for first in range(0, count, rows):
        part = slice(first, first + rows)
        block = hidden[part]
        logits = memory[: len(block), :vocab]
        torch.mm(block, weight.T, out=logits)
        given = logits, targets[part], losses[part], stride, vocab, ignore_index
        launching.launch(cross_entropy_kernel, len(block), *given, **sizes)
        if dhidden is not None:
            torch.mm(logits, weight, out=dhidden[part])
        if dweight is not None:
            dweight += _product_in_float32(logits.T, block)
    return losses.sum(), dhidden, dweight


def block_rows(count: int, row_bytes: int) -> int:
    """Tokens of a block: as equal as multiples of ``ROWS`` allow, and as many as ``LOGITS_BYTES`` take (``ROWS`` at least)."""
    most = max(LOGITS_BYTES // row_bytes // ROWS, 1) * ROWS
    blocks = max(-(-count // most), 1)
    return max(-(-count // (blocks * ROWS)), 1) * ROWS


def _product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, not rounded to the operands' 16 bits: a sum over blocks would show the rounding."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())
