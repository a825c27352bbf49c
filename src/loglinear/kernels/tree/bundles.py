"""BUNDLES: what a kernel takes together. NamedTuples of pointers with their strides, and one of sizes that the compiler knows.

A number in a bundle that is 1 or a multiple of 16 gets a kernel of its own from Triton. Sizes that change from call to call
(T, N, NG, L and their kin) are therefore parameters of their own: ``do_not_specialize`` does not reach into a bundle.

L, the levels of λ, follows the inputs, whose last member is the factor of o. The order of parameters decides which of them the
assembler reads in pairs, and with it spills: value_grads takes 3% longer where L is apart (H200, Triton 3.6, 2026-11-30).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Inputs(NamedTuple):
    """The inputs of a call and the gradient of its output, with the distance of two tokens of each; None where absent.

    ``scales`` is λ. ``factor`` is the factor of o.
    """

    q: Any
    k: Any
    v: Any
    g: Any
    beta: Any
    scales: Any
    do: Any
    stride_q: Any
    stride_k: Any
    stride_v: Any
    stride_g: Any
    stride_beta: Any
    stride_scales: Any
    stride_do: Any
    factor: Any


def gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scales: Tensor,
    do: Tensor | None,
    factor: float,
) -> Inputs:
    """Inputs that are laid out by ``problem.token_rows``."""
    tensors = q, k, v, g, beta, scales, do
    return Inputs(*tensors, *(None if x is None else x.stride(1) for x in tensors), factor)


class Results(NamedTuple):
    """The gradients of the inputs, with the distance of two tokens of each; None where absent.

    dq and dk are ``[H/G, B*T, G, K]``: float32 partial sums, or the result if H == G.
    """

    dq: Any
    dk: Any
    dv: Any
    dg: Any
    dbeta: Any
    dscales: Any
    stride_dq: Any
    stride_dk: Any
    stride_dv: Any
    stride_dg: Any
    stride_dbeta: Any
    stride_dscales: Any


def results_of(
    dq: Tensor, dk: Tensor, dv: Tensor | None = None, dg: Tensor | None = None, dbeta=None, dscales=None
) -> Results:
    """Gradients that are laid out as their inputs are."""
    tensors = dq, dk, dv, dg, dbeta, dscales
    return Results(*tensors, *(None if x is None else x.stride(1) for x in tensors))


class Table(NamedTuple):
    """Tables of packed sequences, None if not packed: the sequence of all chunks and octets, and the facts of each sequence."""

    units: Any
    sequences: Any


def hash_of(bundle: tuple) -> int:
    """The hash of a bundle of constants. Triton's constants have none of their own in 3.4."""
    return hash(tuple(getattr(x, "value", x) for x in bundle))


class Sizes(NamedTuple):
    """Sizes of a launch, compile-time constants: letters of the legend; BK, BV, BN tiles; EXACT: sums of logs are pairs.

    HEADS: heads of a program; with the delta rule, heads side by side in the maps. LEVELS: levels that a program tells apart.
    CHANNELS: the delta rule with a gate per channel: queries and keys come decayed. PRECISION: of products.
    """

    H: Any
    G: Any
    K: Any
    V: Any
    C: Any
    LOG_C: Any
    BK: Any
    BV: Any
    BN: Any
    HEADS: Any
    LEVELS: Any
    EXACT: Any
    PACKED: Any
    CHANNELS: Any
    PRECISION: Any

    __hash__ = hash_of


@lru_cache(maxsize=1024)
def constants(kind: type[Any], *values: Any) -> Any:
    """A bundle of this kind, of constants of a compilation, in the order of its fields: Triton's constants, which may stand
    in a shape, or the values themselves for the interpreter, which knows no constants.
    """
    return kind(*values) if triton.knobs.runtime.interpret else kind(*(tl.constexpr(x) for x in values))


def members_of(arguments: Sequence) -> list:
    """The arguments, with the members of each bundle in its place. A bundle holds no other bundle."""
    return [member for x in arguments for member in (x if isinstance(x, tuple) else (x,))]
