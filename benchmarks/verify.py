"""Are the kernels right on this device? Forward and all gradients against float64, at the shape that is about to be timed.

The oracle is the dense form, one head at a time, so 16K tokens fit into memory. o, dv, dg and dλ are compared on a few heads.
dq and dk sum over heads, so they are compared on the heads of one group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loglinear.kernels import decay as scalar_gate
from loglinear.kernels import delta as delta_rule
from loglinear.reference.chunkwise import chunkwise
from loglinear.reference.dense import dense
from loglinear.reference.transition import Scalar
from peers import Shape, delta_inputs, inputs

# Relative error in norm. Low precision: twice what rounding the operands of plain torch costs (bf16 0.3-0.5%).
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
NAMES = ("o", "dq", "dk", "dv", "dg", "dlevel_scales")


class Failure(Exception):
    """A result that differs from the oracle by more than its limit."""


def head_oracle(x: dict[str, Tensor], do: Tensor, b: int, h: int) -> list[Tensor]:
    """(o, dq, dk, dv, dg, dλ) of head h of sequence b, float64."""
    group = h // (x["v"].shape[2] // x["q"].shape[2])
    leaves = [x["q"][b, :, group], x["k"][b, :, group], x["v"][b, :, h], x["g"][b, :, h], x["level_scales"][b, :, h]]
    q, k, v, g, scales = (leaf.double().detach().requires_grad_() for leaf in leaves)
    o = dense(q, k, v, Scalar(g), scales)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v, g, scales), do[b, :, h].double())]


def relative(x: Tensor, expected: Tensor) -> float:
    error = (x.double() - expected).norm() / expected.norm()
    return float("inf") if error.isnan() else error.item()


def verify_delta_rule(shape: Shape, longest: int = 4096, seed: int = 1) -> str:
    """The same for the delta rule; the oracle is the chunkwise form in float64, all heads at once."""
    small = Shape(1, min(shape.T, longest), shape.H // shape.G, 1, shape.K, shape.V, shape.dtype)
    x = delta_inputs(small, seed=seed)
    do = torch.randn_like(x["v"])
    o, *kept = delta_rule.forward_keeping(**x)
    got = (o, *delta_rule.backward(do, **x, kept=tuple(kept)))
    q, k, v, g, beta, scales = (leaf.double().requires_grad_() for leaf in x.values())
    exact, _ = chunkwise(q, k, v, g, scales, beta)
    expected = (exact, *torch.autograd.grad(exact, (q, k, v, g, beta, scales), do.double()))
    names = ("o", "dq", "dk", "dv", "dg", "dbeta", "dlevel_scales")
    errors = {name: relative(a, b) for name, a, b in zip(names, got, expected)}
    line = ", ".join(f"{name} {error:.2e}" for name, error in errors.items())
    if max(errors.values()) > LIMITS[shape.dtype]:
        raise Failure(f"relative errors {line}; the limit is {LIMITS[shape.dtype]:.1e}")
    return f"correct at T={small.T}: relative errors {line}"


def verify(shape: Shape, config, longest: int = 4096, seed: int = 1) -> str:
    """Compare at the shape itself, cut to ``longest`` tokens and one group of heads; a line with the errors.

    Raises Failure where one is above its limit. Each error is the largest over the heads that were compared.
    """
    per_group = shape.H // shape.G
    small = Shape(1, min(shape.T, longest), per_group, 1, shape.K, shape.V, shape.dtype)
    x = inputs(small, seed=seed)
    do = torch.randn_like(x["v"])
    o = scalar_gate.forward(**x, config=config)
    got = dict(zip(NAMES, (o, *scalar_gate.backward(do, **x, config=config))))
    errors = dict.fromkeys(NAMES, 0.0)
    sums = {"dq": 0.0, "dk": 0.0}
    for h in range(per_group):
        expected = dict(zip(NAMES, head_oracle(x, do, 0, h)))
        for name in NAMES:
            if name in sums:
                sums[name] = sums[name] + expected[name]
            else:
                errors[name] = max(errors[name], relative(got[name][0, :, h], expected[name]))
    for name, total in sums.items():
        errors[name] = relative(got[name][0, :, 0], total)
    line = ", ".join(f"{name} {error:.2e}" for name, error in errors.items())
    if max(errors.values()) > LIMITS[shape.dtype]:
        raise Failure(f"relative errors {line}; the limit is {LIMITS[shape.dtype]:.1e}")
    return f"correct at T={small.T}: relative errors {line}"
