"""PRODUCTS: the precision of a call, and its products of matrices with their gradients."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Numbers(NamedTuple):
    """How a call computes. low, wide: dtypes of the factors of products, and of sums, logs and states. kernels: whether
    a stage runs in Pallas (``pallas.py``).
    """

    low: jnp.dtype
    wide: jnp.dtype
    kernels: bool = False

    def product(self, axes: str, a: Array, b: Array, result: jnp.dtype | None = None) -> Array:
        """An einsum of two factors rounded to ``low``, summed in ``wide``. Its gradients are such products too.

        result: the dtype of the result, ``low`` or ``wide``; None is ``wide``.
        """
        return _product(axes, self, result or self.wide, a, b)

    def as_wide_as(self, x: Array) -> jnp.dtype:
        """The dtype of a gradient of x that products make."""
        return self.low if x.dtype == self.low else self.wide

    def exact(self, axes: str, *factors: Array) -> Array:
        """An einsum in ``wide`` throughout."""
        return einsum(axes, self.wide, self.wide, *factors)


def einsum(axes: str, low: jnp.dtype, result: jnp.dtype, *factors: Array) -> Array:
    """An einsum of factors rounded to ``low``, in the dtype of the result."""
    precision = lax.Precision.DEFAULT if low == jnp.bfloat16 else lax.Precision.HIGHEST  # no TF32, no bfloat16 passes
    names, out = axes.split("->")
    # From the last factor to the first: jnp.einsum then leaves the columns of the last innermost, and transposes less.
    backwards = ",".join(names.split(",")[::-1]) + "->" + out
    return jnp.einsum(
        backwards, *(x.astype(low) for x in factors[::-1]), precision=precision, preferred_element_type=result
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(axes: str, num: Numbers, result: jnp.dtype, a: Array, b: Array) -> Array:
    return einsum(axes, num.low, result, a, b)


def _product_forward(
    axes: str, num: Numbers, result: jnp.dtype, a: Array, b: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _product(axes, num, result, a, b), (a, b)


def _product_backward(
    axes: str, num: Numbers, result: jnp.dtype, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    a, b = kept
    first, second, out = axes.replace("->", ",").split(",")
    d_a = _product(f"{out},{second}->{first}", num, num.as_wide_as(a), gradient, b).astype(a.dtype)
    return d_a, _product(f"{first},{out}->{second}", num, num.as_wide_as(b), a, gradient).astype(b.dtype)


_product.defvjp(_product_forward, _product_backward)


def numbers_of(dtype: jnp.dtype, kernels: bool = False) -> Numbers:
    """float16 is computed in float32: sums of many products leave its range."""
    wide = jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
    return Numbers(jnp.dtype(jnp.bfloat16) if dtype == jnp.bfloat16 else wide, wide, kernels)
