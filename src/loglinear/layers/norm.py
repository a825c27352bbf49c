"""Root-mean-square norms, plain and gated. Statistics are float32 whatever the dtype of the input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loglinear.layers.activations import ACTIVATIONS, check_activation
from loglinear.layers.initialization import wide
from loglinear.ops import dispatch, fused, pointwise


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

    def unfused(self) -> str | None:
        """The field that kernels of a mixer's outputs do not know; None if they know all."""
        return "a norm without a gate"

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


class OutputGate(nn.Module):
    """``(x + skip) · act(gate)``: an output gate without a norm (Falcon-H1).

    Args:
        activation: one of ``activations.ACTIVATIONS``.
    """

    def __init__(self, activation: str = "silu") -> None:
        super().__init__()
        self.activation = check_activation(activation, "activation")

    def unfused(self) -> str | None:
        """The field that kernels do not know."""
        return "an output gate without a norm"

    def forward(self, x: Tensor, gate: Tensor, skip: Tensor | None = None, skip_scale: Tensor | None = None) -> Tensor:
        """As ``GatedRMSNorm``'s."""
        x = _add_skip(x, skip, skip_scale)
        return (wide(x) * ACTIVATIONS[self.activation](wide(gate))).to(x.dtype)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class GatedRMSNorm(RMSNorm):
    """RMSNorm with a gate, before the norm (Mamba-2: ``norm(x · silu(z))``) or after it (Gated DeltaNet).

    Args:
        width: of x. gate_first: whether the gate stands before the norm.
        groups: equal parts of the width, each with a mean of its own. activation: of the gate, one of
            ``activations.ACTIVATIONS``. The kernels know one group, SiLU and the sigmoid.
    """

    def __init__(
        self, width: int, eps: float = 1e-6, gate_first: bool = False, groups: int = 1, activation: str = "silu"
    ) -> None:
        super().__init__(width, eps)
        if groups < 1 or width % groups:
            raise ValueError(f"groups must divide the width, {width}: got {groups}")
        self.gate_first, self.groups = gate_first, groups
        self.activation = check_activation(activation, "activation")

    def unfused(self) -> str | None:
        """The field that kernels do not know; None if they know all."""
        if self.groups > 1:
            return f"{self.groups} groups"
        return None if self.activation in ("silu", "sigmoid") else f"the activation {self.activation}"

    def forward(  # type: ignore[override]
        self, x: Tensor, gate: Tensor, skip: Tensor | None = None, skip_scale: Tensor | None = None
    ) -> Tensor:
        """x and gate ``[..., width]`` to the shape and dtype of x.

        skip: ``[..., width]``, added to x first, its columns in n equal parts that are multiplied by skip_scale ``[n]``.
        """
        if pointwise.takes_norm(x, gate, self.weight, skip, skip_scale):
            field = self.unfused()
            if field is None:
                options = skip, skip_scale, self.activation == "silu"
                return pointwise.gated_norm(x, gate, self.weight, self.eps, self.gate_first, *options)
            dispatch.plain("a gated norm", field)
        x = _add_skip(x, skip, skip_scale)
        wide_x, opening = wide(x), ACTIVATIONS[self.activation](wide(gate))
        out = self._normalise(wide_x * opening) if self.gate_first else self._normalise(wide_x) * opening
        return out.to(x.dtype)

    def _normalise(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return super()._normalise(x)
        parts = x.unflatten(-1, (self.groups, -1))
        return F.rms_norm(parts, parts.shape[-1:], None, self.eps).flatten(-2) * self.weight.to(x.dtype)

    def extra_repr(self) -> str:
        fields = f"gate_first={self.gate_first}, groups={self.groups}, activation={self.activation!r}"
        return f"{super().extra_repr()}, {fields}"


def _add_skip(x: Tensor, skip: Tensor | None, skip_scale: Tensor | None) -> Tensor:
    """x plus the scaled skip; see ``GatedRMSNorm.forward``."""
    if skip is None or skip_scale is None:
        return x
    parts = skip.unflatten(-1, (skip_scale.shape[0], -1))
    return x + (parts * skip_scale.to(skip.dtype).unsqueeze(-1)).flatten(-2)
