"""Are the kernels right on this device? Forward and all gradients against float64, at the shape that is about to be timed.

The oracle is the chunkwise form in float64, which the tests compare with the dense form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from loglinear.reference.chunkwise import chunkwise
from peers import Shape

# Relative error in norm. Low precision: twice what rounding the operands of plain torch costs (bf16 0.3-0.5%).
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


class Failure(Exception):
    """A result that differs from the oracle by more than its limit."""


def relative(x: Tensor, expected: Tensor) -> float:
    error = (x.double() - expected).norm() / expected.norm()
    return float("inf") if error.isnan() else error.item()


def verify(
    op: Callable,
    inputs: Callable[..., dict[str, Tensor]],
    shape: Shape,
    longest: int = 4096,
    seed: int = 1,
    device: str = "cuda",
) -> str:
    """Compare at the shape itself, cut to ``longest`` tokens and one group of heads; a line with the errors.

    ``inputs``: of a shape, a device and a seed, by the names of the op's arguments. Raises Failure where an error is above
    its limit.
    """
    small = dataclasses.replace(shape, B=1, T=min(shape.T, longest), H=shape.H // shape.G, G=1)
    x = {name: leaf.requires_grad_() for name, leaf in inputs(small, device, seed).items()}
    o = op(**x)[0]
    do = torch.randn_like(o)
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in x.items()}
    oracle, _ = chunkwise(**exact)
    got = (o, *torch.autograd.grad(o, tuple(x.values()), do))
    expected = (oracle, *torch.autograd.grad(oracle, tuple(exact.values()), do.double()))
    errors = {name: relative(a, b) for name, a, b in zip(("o", *(f"d{name}" for name in x)), got, expected)}
    line = ", ".join(f"{name} {error:.2e}" for name, error in errors.items())
    if max(errors.values()) > LIMITS[shape.dtype]:
        raise Failure(f"relative errors {line}; the limit is {LIMITS[shape.dtype]:.1e}")
    return f"correct at T={small.T}: relative errors {line}"
