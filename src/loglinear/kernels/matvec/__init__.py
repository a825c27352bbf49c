"""MATVEC: products of a few rows with weights, whose time is that of reading the weights."""

from loglinear.kernels.matvec.products import products

__all__ = ["products"]
