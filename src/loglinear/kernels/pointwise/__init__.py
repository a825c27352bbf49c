"""POINTWISE: the kernels around the attention op: convolution, gates, norms, unit lengths, products of an MLP, the loss."""

from loglinear.kernels.pointwise import convolution, cross_entropy, elementwise, gated_norm, gates, unit_length

__all__ = ["convolution", "cross_entropy", "elementwise", "gated_norm", "gates", "unit_length"]
