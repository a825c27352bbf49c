"""FORWARD: o of either op without states, by kernels, by an operator for a graph, or by plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from loglinear.ops import checks, registration, transforms


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    level_scales: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> Tensor:
    """o ``[B, T, H, V]``; arguments as those of the public functions, checked."""
    inputs = q, k, v, g, beta, level_scales
    if not checks.values_are_known(q):  # a graph, or tensors without values: the operator gives their shapes
        return registration.run_compiled(*inputs, scale, cu_seqlens)
    kernel = registration.has_kernel(q, v, beta)
    if cu_seqlens_cpu is not None or not kernel:
        lengths = checks.sequence_lengths(q, cu_seqlens, cu_seqlens_cpu)
    if checks.transforming() and (kernel or transforms.vmapped(*inputs)):
        return transforms.run(*inputs, scale, cu_seqlens)
    if kernel:
        return registration.run_eager(*inputs, scale, cu_seqlens)
    return registration.run(*inputs, scale, lengths)[0]
