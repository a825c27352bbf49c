"""``linear_cross_entropy``: the loss of an output layer without the logits of all tokens in memory.

On CUDA the forward pass computes the gradients too (``kernels/pointwise/cross_entropy.py``), so no logit is computed twice. The
backward pass only scales these gradients. Elsewhere, and in float64, the op is plain torch and holds all logits.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear import kernels
from loglinear.ops import checks, dispatch
from loglinear.ops.operators import Operator
from loglinear.state import FLOATS, check_dtype


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
        total = summed_loss(hidden, weight, targets, ignore_index, dtype, *wanted)
    else:
        logits = F.linear(hidden.to(dtype), weight.to(dtype))
        wide = torch.promote_types(dtype, torch.float32)
        total = F.cross_entropy(logits.to(wide), targets, ignore_index=ignore_index, reduction="sum")
    # Where all are ignored a division by their number would send inf * 0 back.
    total = total.masked_fill(count == 0, 0)
    return total if reduction == "sum" else total / count


def has_kernel(hidden: Tensor) -> bool:
    """Whether the kernel takes these hidden states: CUDA, at most 32 bits."""
    return not checks.transforming() and dispatch.on_kernels("linear_cross_entropy", hidden)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> None:
    for name, tensor, dtypes in (
        ("hidden", hidden, FLOATS),
        ("weight", weight, FLOATS),
        ("targets", targets, (torch.int64,)),
    ):
        check_dtype(name, tensor.dtype, dtypes)
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


def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, dtype: torch.dtype, *wanted: bool
) -> list[Tensor]:
    """The sum of the losses, and its gradients for hidden, in ``dtype``, and weight, in float32; empty where not wanted."""
    low, matrix = hidden.to(dtype).contiguous(), weight.to(dtype).contiguous()
    made = kernels.pointwise.cross_entropy.loss_and_gradients
    total, *grads = made(low, matrix, targets.contiguous(), ignore_index, *wanted)
    return [total, *(low.new_empty(0) if x is None else x for x in grads)]


def _backward(factor: Tensor, hidden: Tensor, weight: Tensor, *others: Any) -> list[Tensor]:
    """The gradients that the forward pass has kept, times the incoming gradient, in the dtypes of the inputs."""
    *_, kept = others
    return [_scaled(gradient, factor, x) for gradient, x in zip(kept, (hidden, weight))]


def _scaled(gradient: Tensor, factor: Tensor, x: Tensor) -> Tensor:
    if not gradient.numel():  # nobody wants it
        return x.new_zeros(()).expand(x.shape)
    return (gradient.to(torch.promote_types(gradient.dtype, x.dtype)) * factor).to(x.dtype)


def _fake(hidden: Tensor, weight: Tensor, *others: Any) -> list[Tensor]:
    *_, dtype, hidden_grad, weight_grad = others
    total = hidden.new_empty((), dtype=torch.float32)
    dhidden = hidden.new_empty(hidden.shape if hidden_grad else 0, dtype=dtype)
    dweight = hidden.new_empty(weight.shape if weight_grad else 0, dtype=torch.float32 if weight_grad else dtype)
    return [total, dhidden, dweight]


summed_loss = Operator(
    "linear_cross_entropy",
    "Tensor hidden, Tensor weight, Tensor targets, int ignore_index, ScalarType dtype, bool hidden_grad, bool weight_grad",
    1,
    _forward,
    _backward,
    _fake,
    keeps=True,
)
