"""A linear layer of any width at the speed of a round one.

Special about this file: tensor cores want rows that begin at multiples of 16 bytes, in the weight's gradient and in the output,
which what comes next reads in slices. Widths such as ``4·K·H + 2·H`` give neither.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

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
    width = weight.shape[0]
    return F.linear(input, F.pad(weight, (0, 0, 0, -width % MULTIPLE)))[..., :width]
