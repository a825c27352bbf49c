"""Linear layers of any width at the speed of a round one, and two of one input at the speed of one.

Special about this file: tensor cores want rows that begin at multiples of 16 bytes, in the weight's gradient and in the output,
which what comes next reads in slices. Widths such as ``4·K·H + 2·H`` give neither.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loglinear.ops import pointwise

MULTIPLE = 16  # outputs: 32 bytes in 16 bits
FEW = 256  # tokens up to which reading the weight is all that takes time, and a copy of it would double that


class AlignedLinear(nn.Linear):
    """``nn.Linear`` without bias, whose products on CUDA are with a weight of a multiple of 16 rows, zeros at the end.

    Its output is the first ``out_features`` columns of theirs, so rows lie further apart than they are wide.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if not input.is_cuda or input.numel() <= FEW * self.in_features:
            return super().forward(input)
        return aligned_product(input, self.weight)


def aligned_product(input: Tensor, weight: Tensor) -> Tensor:
    """``input @ weight.T`` with ``weight [out, in]`` padded to a multiple of ``MULTIPLE`` rows for the product."""
    return F.linear(input, _padded(weight))[..., : weight.shape[0]]


def projections(input: Tensor, first: nn.Linear, second: nn.Linear | None) -> tuple[Tensor, Tensor | None]:
    """Both layers' outputs of ``[..., in_features]``.

    They are one product, with both weights, where ``joins`` says so: the narrower of two products runs far from the
    speed of the other, and one product leaves nothing to add for the input's gradient.
    """
    if second is None:
        return first(input), None
    if joins(input, first, second):
        weights = [_padded(layer.weight) for layer in (first, second)]
        start = weights[0].shape[0]
        both = F.linear(input, torch.cat(weights))
        return both[..., : first.out_features], both[..., start : start + second.out_features]
    one, other = pointwise.twice(input)
    return first(one), second(other)


def joins(input: Tensor, *layers: nn.Linear) -> bool:
    """Whether gradients are recorded for products worth it, of layers that are called for their weights alone."""
    if not _worth_it(input) or not all(_unchanged(layer) for layer in layers):
        return False
    weights = [layer.weight for layer in layers]
    return len({x.dtype for x in weights}) == 1 and all(x.device == input.device for x in weights)


def _worth_it(input: Tensor) -> bool:
    return input.is_cuda and torch.is_grad_enabled() and input.numel() > FEW * input.shape[-1]


def _unchanged(layer: nn.Linear) -> bool:
    """Neither an adapter nor a quantised or sharded layer in its place, and nobody's code before or behind its calls."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    own = type(layer) is AlignedLinear and "forward" not in layer.__dict__
    return own and pointwise.ordinary(layer.weight) and not any(hooks)


def _padded(weight: Tensor) -> Tensor:
    return F.pad(weight, (0, 0, 0, -weight.shape[0] % MULTIPLE))
