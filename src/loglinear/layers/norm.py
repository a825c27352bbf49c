"""Root-mean-square norms, plain and gated. Statistics are float32 whatever the dtype of the input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loglinear.layers.initialization import wide
from loglinear.ops import fused, pointwise


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) · weight`` over the last axis, of size ``width`` (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., width]`` to the same shape and dtype."""
        if x.dtype == self.weight.dtype:  # widens by itself
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # Compiled code makes the norm with what is added before it.
        if not torch.compiler.is_compiling() and pointwise.takes_norm(x, None, self.weight):
            return pointwise.gated_norm(x, None, self.weight, self.eps, gate_first=False)
        return self._normalise(wide(x)).to(x.dtype)

    def _normalise(self, x: Tensor) -> Tensor:
        """One kernel each way on CUDA (torch 2.9): eager steps are bound by their launches."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class SumRMSNorm(RMSNorm):
    """RMSNorm of the sum of a residual stream and an update. It is one kernel on CUDA when nothing is recorded."""

    def forward(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """``x + added`` and its norm, both ``[..., width]``."""
        both = fused.add_norm(x, added, self.weight, self.eps)
        if both is None:
            x = x + added
            both = x, super().forward(x)
        return both


class GatedRMSNorm(RMSNorm):
    """RMSNorm with a SiLU gate, before the norm (Mamba-2: ``norm(x · silu(z))``) or after it (Gated DeltaNet)."""

    def __init__(self, width: int, eps: float = 1e-6, gate_first: bool = False) -> None:
        super().__init__(width, eps)
        self.gate_first = gate_first

    def forward(  # type: ignore[override]
        self, x: Tensor, gate: Tensor, skip: Tensor | None = None, skip_scale: Tensor | None = None
    ) -> Tensor:
        """x and gate ``[..., width]`` to the shape and dtype of x.

        skip: ``[..., width]``, added to x first, its columns in n equal parts that are multiplied by skip_scale ``[n]``.
        """
        if pointwise.takes_norm(x, gate, self.weight, skip, skip_scale):
            return pointwise.gated_norm(x, gate, self.weight, self.eps, self.gate_first, skip, skip_scale)
        if skip is not None and skip_scale is not None:
            parts = skip.unflatten(-1, (skip_scale.shape[0], -1))
            x = x + (parts * skip_scale.to(skip.dtype).unsqueeze(-1)).flatten(-2)
        wide_x, opening = wide(x), F.silu(wide(gate))
        out = self._normalise(wide_x * opening) if self.gate_first else self._normalise(wide_x) * opening
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gate_first={self.gate_first}"
