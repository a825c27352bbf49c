"""POINTWISE: the kernels around the attention op: convolution, gates, norms, unit lengths, products of an MLP, the loss."""

from loglinear.kernels.pointwise import (
    channel_gates,
    convolution,
    cross_entropy,
    elementwise,
    gated_norm,
    gates,
    level_scales,
    steps,
    unit_length,
)

__all__ = [
    "channel_gates",
    "convolution",
    "cross_entropy",
    "elementwise",
    "gated_norm",
    "gates",
    "level_scales",
    "steps",
    "unit_length",
]
