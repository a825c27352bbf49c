"""POINTWISE: what surrounds the attention op and an MLP's products, as autograd sees its kernels: gates, λ, norm, unit length.

Special about this file: the kernels are for eager calls on CUDA. ``torch.compile`` gets the plain forms, which stand where they
are used and which it fuses with their neighbours; the CPU and float64 get them too.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loglinear import kernels

MAX_WIDTH = 8192  # of a row in registers


def ordinary(x: Tensor) -> bool:
    """Whether x is neither distributed nor fake nor anything else that has no memory to point at."""
    return type(x) in (Tensor, nn.Parameter)


def has_kernels(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these inputs: memory of one CUDA device, at most 32 bits, and nobody compiles."""
    if torch.compiler.is_compiling() or not kernels.installed():
        return False
    given = [x for x in tensors if x is not None]
    alike = all(ordinary(x) and x.is_cuda and x.dtype != torch.float64 for x in given)
    return alike and all(x.device == given[0].device for x in given[1:])


def takes_rows(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take the rows of x ``[B, T, width]`` or ``[B, T, heads, width]`` with others like it."""
    if x.dim() not in (3, 4) or not 1 <= x.shape[-1] <= MAX_WIDTH or not has_kernels(x, *others):
        return False
    return all(y is None or (y.shape == x.shape and y.dtype == x.dtype) for y in others)


def takes_heads(q: Tensor, k: Tensor) -> bool:
    """Whether the kernels take the rows of q and k ``[B, T, G, K]``."""
    return q.is_floating_point() and q.dim() == 4 and takes_rows(q, k)


def takes_norm(
    x: Tensor, gate: Tensor, weight: Tensor, skip: Tensor | None = None, skip_scale: Tensor | None = None
) -> bool:
    """Whether ``gated_norm`` takes these: rows as wide as the weight, of which skip_scale has equal parts."""
    if not takes_rows(x, skip) or (skip is None) != (skip_scale is None):
        return False
    whole = skip_scale is None or weight.shape[0] % skip_scale.shape[0] == 0
    return whole and gate.shape == x.shape and weight.shape == x.shape[-1:] and has_kernels(x, gate, weight, skip_scale)


def discretise(x: Tensor, rate: Tensor, dt_bias: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(v, g, x): ``v = x · step`` and the decay of ``kernels.gates.forward``.

    Whoever uses x too, beside v, should use the x that comes out: both gradients are then added where they are made.
    """
    g, v, _, x = Gates.apply(rate, dt_bias, A_log, x, None)
    return v, g, x


def gates(rate: Tensor, strength: Tensor, dt_bias: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor]:
    """(g, beta) of ``kernels.gates.forward``."""
    g, _, beta, _ = Gates.apply(rate, dt_bias, A_log, None, strength)
    return g, beta


def level_scales(dl: Tensor, L: Tensor) -> Tensor:
    """``softplus(L ∘ dl)`` ``[B, T, H, levels]`` from dl ``[B, T, H · levels]``; see ``kernels.gates``."""
    return LevelScales.apply(dl, L)


def gated_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    gate_first: bool,
    skip: Tensor | None = None,
    skip_scale: Tensor | None = None,
) -> Tensor:
    """The norm of ``kernels.gated_norm``."""
    return GatedNorm.apply(x, gate, weight, eps, gate_first, skip, skip_scale)


def units(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k over their lengths; see ``kernels.unit_length``."""
    return Units.apply(q, k)


def silu_product(gate: Tensor, x: Tensor) -> Tensor:
    """``silu(gate) · x`` of two tensors of one shape, by the kernels or plain."""
    if gate.shape == x.shape and gate.dtype == x.dtype and has_kernels(gate, x):
        return SiluProduct.apply(gate, x)
    return F.silu(gate) * x


def twice(x: Tensor) -> tuple[Tensor, Tensor]:
    """x for two projections. Under autocast it is rounded once, not by each, and their gradients are added as they widen."""
    kind = x.device.type
    if x.dtype == torch.float32 and has_kernels(x) and torch.is_autocast_enabled(kind):
        return Twice.apply(x, torch.get_autocast_dtype(kind))
    return x, x


def _kernels(name: str) -> Any:
    """Imported on first use: importing loglinear imports no Triton."""
    return import_module(f"loglinear.kernels.{name}")


class Gates(torch.autograd.Function):
    """Decay, values and writing strength."""

    @staticmethod
    def forward(ctx, rate, dt_bias, A_log, x, strength):
        ctx.save_for_backward(rate, dt_bias, A_log, x, strength)
        g, v, beta = _kernels("gates").forward(rate, dt_bias, A_log, x, strength)
        return g, v, beta, x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dg, dv, dbeta, dskip):
        return _kernels("gates").backward(dg, dv, dskip, dbeta, *ctx.saved_tensors)


class LevelScales(torch.autograd.Function):
    """λ."""

    @staticmethod
    def forward(ctx, dl, L):
        ctx.save_for_backward(dl, L)
        return _kernels("gates").level_scales(dl, L)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dscales):
        return _kernels("gates").level_scales_backward(dscales, *ctx.saved_tensors)


class GatedNorm(torch.autograd.Function):
    """The gated norm with its skip."""

    @staticmethod
    def forward(ctx, x, gate, weight, eps, gate_first, skip, skip_scale):
        ctx.save_for_backward(x, gate, weight, skip, skip_scale)
        ctx.kind = eps, gate_first
        return _kernels("gated_norm").forward(x, gate, weight, eps, gate_first, skip, skip_scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, gate, weight, skip, skip_scale = ctx.saved_tensors
        grads = _kernels("gated_norm").backward(dout, x, gate, weight, *ctx.kind, skip, skip_scale)
        return *grads[:3], None, None, *grads[3:]


class Units(torch.autograd.Function):
    """Queries and keys of unit length."""

    @staticmethod
    def forward(ctx, q, k):
        ctx.save_for_backward(q, k)
        return _kernels("unit_length").forward(q, k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dunit_q, dunit_k):
        return _kernels("unit_length").backward(dunit_q, dunit_k, *ctx.saved_tensors)


class SiluProduct(torch.autograd.Function):
    """The gate of a SwiGLU MLP."""

    @staticmethod
    def forward(ctx, gate, x):
        ctx.save_for_backward(gate, x)
        return _kernels("elementwise").silu_product(gate, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        return _kernels("elementwise").silu_product_backward(dout, *ctx.saved_tensors)


class Twice(torch.autograd.Function):
    """x in fewer bits, two times over."""

    @staticmethod
    def forward(ctx, x, dtype):
        narrow = x.to(dtype)
        return narrow, narrow.view_as(narrow)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, da, db):
        return _kernels("elementwise").wide_sum(da, db), None
