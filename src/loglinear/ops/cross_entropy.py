"""``linear_cross_entropy``: the loss of an output layer without the logits of all tokens in memory.

On CUDA the forward pass computes the gradients too (``kernels/pointwise/cross_entropy.py``), so no logit is computed twice. The
backward pass only scales these gradients. Elsewhere, and in float64, the op is plain torch and holds all logits.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear.ops import dispatch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """``cross_entropy(hidden @ weight.T, targets)`` in nats, a float32 scalar (float64 for float64 inputs).

    The mean over no target at all is NaN with gradients of zero, as torch's. Differentiable once on CUDA.

    Args:
        hidden: ``[..., D]``. weight: ``[vocab, D]``, of the same dtype; under autocast both are cast as a linear layer's, and
            the weight's gradient is summed in float32.
        targets: int64 ``[...]``: the column that is right, or ``ignore_index`` where no loss is wanted. Any other number
            is an error on the CPU and makes the loss NaN on CUDA.
        reduction: "mean" over the targets that are not ignored, or "sum".

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what came and what is needed.
    """
    _check(hidden, weight, targets, reduction)
    device = hidden.device.type
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(device)
    elif hidden.dtype != weight.dtype:
        raise TypeError(f"weight must have the dtype of hidden ({hidden.dtype}): got {weight.dtype}")
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    count = (targets != ignore_index).sum()
    if has_kernel(hidden):
        wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
        total = summed_loss(hidden, weight, targets, ignore_index, dtype, *wanted)[0]
    else:
        logits = F.linear(hidden.to(dtype), weight.to(dtype))
        wide = torch.promote_types(dtype, torch.float32)
        total = F.cross_entropy(logits.to(wide), targets, ignore_index=ignore_index, reduction="sum")
    # Where all are ignored a division by their number would send inf * 0 back.
    total = total.masked_fill(count == 0, 0)
    return total if reduction == "sum" else total / count


def has_kernel(hidden: Tensor) -> bool:
    """Whether the kernel takes these hidden states: CUDA, at most 32 bits."""
    return dispatch.on_kernels("linear_cross_entropy", hidden)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> None:
    for name, tensor in {"hidden": hidden, "weight": weight}.items():
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16: got {tensor.dtype}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64: got {targets.dtype}")
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or not weight.shape[0]:
        need = f"[vocab, D] with D = {hidden.shape[-1] if hidden.dim() else '?'}, the last axis of hidden"
        raise ValueError(f"weight must have shape {need}: got {list(weight.shape)}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must have shape {list(hidden.shape[:-1])}: got {list(targets.shape)}")
    for name, tensor in {"weight": weight, "targets": targets}.items():
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden ({hidden.device}): got {tensor.device}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum': got {reduction!r}")


def _kernels() -> Any:
    """Imported on first use: importing loglinear imports no Triton."""
    return import_module("loglinear.kernels.pointwise.cross_entropy")


@torch.library.custom_op("loglinear::linear_cross_entropy", mutates_args=())
def summed_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, and its gradients for hidden ``[N, D]`` in ``dtype`` and weight in float32, empty where not wanted."""
    low, matrix = hidden.to(dtype).contiguous(), weight.to(dtype).contiguous()
    total, *grads = _kernels().loss_and_gradients(
        low, matrix, targets.contiguous(), ignore_index, hidden_grad, weight_grad
    )
    return total, *(low.new_empty(0) if x is None else x for x in grads)


@summed_loss.register_fake
def _(hidden, weight, targets, ignore_index, dtype, hidden_grad, weight_grad):
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape if hidden_grad else 0, dtype=dtype),
        hidden.new_empty(weight.shape if weight_grad else 0, dtype=torch.float32 if weight_grad else dtype),
    )


@torch.library.custom_op("loglinear::linear_cross_entropy_backward", mutates_args=())
def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient · factor`` as a ``dtype``. An operator, so that a second derivative is an error, not a wrong number."""
    wide = torch.promote_types(gradient.dtype, dtype)
    return (gradient.to(wide) * factor).to(dtype)


@scaled.register_fake
def _(gradient, factor, dtype):
    return gradient.new_empty(gradient.shape, dtype=dtype)


def _save(ctx, inputs, output):
    ctx.dtypes = [x.dtype for x in inputs[:2]]
    _, *grads = output
    ctx.mark_non_differentiable(*grads)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads)


def _backward(ctx, factor, *_):
    wanted = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad)
    grads = [scaled(gradient, factor, dtype) if needed else None for gradient, dtype, needed in wanted]
    return *grads, None, None, None, None, None


summed_loss.register_autograd(_backward, setup_context=_save)
