"""Products of linear layers of any width at the speed of a round one, and two of one input at the speed of one.

Tensor cores want rows that begin at multiples of 16 bytes, in the weight's gradient and in the output, which what comes next
reads in slices. Widths such as ``4·K·H + 2·H`` give neither. The layers are ``nn.Linear`` itself, the class that quantisers
look for. A layer that is not, or that carries hooks, is called as any module is.
"""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loglinear.layers.norm import RMSNorm
from loglinear.ops import pointwise, products

# Outputs: 128 bytes in 16 bits. The compiler lays rows of its own products out so, and would copy rows that end elsewhere for
# the operators that read them. The second of two projections begins at a multiple of 32 bytes.
MULTIPLE, START = 64, 16
FEW = 256  # tokens up to which reading the weight is all that takes time, and a copy of it would double that


class Normed(NamedTuple):
    """``norm(x)``, x ``[B, T, width]``, for products that make the norm themselves (``ops/products.py``)."""

    x: Tensor
    norm: RMSNorm


def project(input: Tensor, layer: nn.Module) -> Tensor:
    """``layer(input)``. A plain layer's product with many tokens on CUDA is ``aligned_product``."""
    if many(input) and plain(layer):
        return aligned_product(input, layer.weight)
    return layer(input)


def aligned_product(input: Tensor, weight: Tensor) -> Tensor:
    """``input @ weight.T`` with ``weight [out, in]`` padded to a multiple of ``MULTIPLE`` rows for the product.

    The output is the first ``out`` columns of the product's, so rows lie further apart than they are wide.
    """
    return F.linear(input, _padded(weight, _rounded(weight.shape[0], MULTIPLE)))[..., : weight.shape[0]]


def projections(input: Tensor | Normed, first: nn.Module, second: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Both layers' outputs of ``[..., in_features]``.

    They are one product, with both weights, where ``joins`` says so: the narrower of two products runs far from the
    speed of the other, and one product leaves nothing to add for the input's gradient.
    """
    if isinstance(input, Normed):
        other = None if second is None else second.get_parameter("weight")
        return products.projected(input.x, first.get_parameter("weight"), other, input.norm.weight, input.norm.eps)
    if second is None:
        return project(input, first), None
    if joins(input, first, second):
        both, start = beside(input, first, second)
        widths = [layer.get_parameter("weight").shape[0] for layer in (first, second)]
        return both[..., : widths[0]], both[..., start : start + widths[1]]
    one, twin = pointwise.twice(input)
    return project(one, first), project(twin, second)


def beside(input: Tensor, first: nn.Module, second: nn.Module) -> tuple[Tensor, int]:
    """Both outputs in one tensor ``[..., columns]``, of layers that ``joins`` takes, and the first column of the second's."""
    one, other = (layer.get_parameter("weight") for layer in (first, second))
    start, end = joined(one.shape[0], other.shape[0])
    return F.linear(input, torch.cat([_padded(one, start), _padded(other, end - start)])), start


def joined(first: int, second: int) -> tuple[int, int]:
    """(First column of the second of two outputs in one tensor, all columns), of their widths."""
    start = _rounded(first, START)
    return start, _rounded(start + second, MULTIPLE)


def joins(input: Tensor, first: nn.Module, second: nn.Module) -> bool:
    """Whether gradients are recorded for products worth it, of layers that are called for their weights alone."""
    if not (many(input) and torch.is_grad_enabled() and plain(first) and plain(second)):
        return False
    one, other = first.weight, second.weight
    return one.dtype == other.dtype and one.device == other.device == input.device


def many(input: Tensor) -> bool:
    """Whether products with ``input`` take long enough for a copy of the weight to be worth it."""
    return input.is_cuda and input.numel() > FEW * input.shape[-1]


def plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Neither an adapter nor a quantised or sharded layer in its place, and nobody's code before or behind its calls."""
    return type(layer) is nn.Linear and layer.bias is None and pointwise.ordinary(layer.weight) and bare(layer)


def bare(module: nn.Module) -> bool:
    """Whether a call of the module is a call of its class's ``forward``, with nobody's code before or behind it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" not in module.__dict__ and not any(hooks)


def _padded(weight: Tensor, rows: int) -> Tensor:
    return F.pad(weight, (0, 0, 0, rows - weight.shape[0]))


def _rounded(width: int, multiple: int) -> int:
    """Up to a multiple."""
    return -(-width // multiple) * multiple
