"""POINTWISE: autograd for the kernels around the attention op and the products of an MLP: gates, λ, norm, unit length.

Eager calls on CUDA run all kernels. Under ``torch.compile`` some functions are operators: their gradients are sums over
tokens or rows, and the compiler's own code would pass over large tensors once more. The other functions are plain PyTorch
under ``torch.compile``, and the compiler fuses them with their neighbours. The CPU and float64 use plain PyTorch everywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loglinear import kernels
from loglinear.ops import checks, dispatch
from loglinear.ops.operators import Operator, differentiable_once, like

MAX_WIDTH = 8192  # of a row in registers


def ordinary(x: Tensor) -> bool:
    """Whether x is neither distributed nor fake nor anything else that has no memory to point at."""
    return type(x) in (Tensor, nn.Parameter)


def on_device(x: Tensor) -> bool:
    """Whether x is where the kernels run."""
    return x.is_cuda


def has_kernels(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these inputs: memory of one CUDA device, at most 32 bits, and no ``torch.func``."""
    if checks.transforming():
        return False
    given = [x for x in tensors if x is not None]
    alike = all(ordinary(x) and on_device(x) and x.dtype != torch.float64 for x in given)
    return alike and all(x.device == given[0].device for x in given[1:]) and kernels.installed()


def takes_rows(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take the rows of x ``[B, T, width]`` or ``[B, T, heads, width]`` with others like it."""
    if x.dim() not in (3, 4) or not x.shape[-1] or not has_kernels(x, *others):
        return False
    if x.shape[-1] > MAX_WIDTH:
        return dispatch.plain("a norm", f"rows of {x.shape[-1]:,} numbers, where the kernels take up to {MAX_WIDTH:,}")
    return all(y is None or (y.shape == x.shape and y.dtype == x.dtype) for y in others)


def takes_heads(q: Tensor, k: Tensor) -> bool:
    """Whether the kernels take the rows of q and k ``[B, T, G, K]``."""
    return q.is_floating_point() and q.dim() == 4 and takes_rows(q, k)


def takes_norm(
    x: Tensor, gate: Tensor | None, weight: Tensor, skip: Tensor | None = None, skip_scale: Tensor | None = None
) -> bool:
    """Whether ``gated_norm`` takes these: rows as wide as the weight, of which skip_scale has equal parts."""
    if not takes_rows(x, skip) or (skip is None) != (skip_scale is None):
        return False
    whole = skip_scale is None or weight.shape[0] % skip_scale.shape[0] == 0
    alike = gate is None or gate.shape == x.shape
    return whole and alike and weight.shape == x.shape[-1:] and has_kernels(x, gate, weight, skip_scale)


def discretise(x: Tensor, rate: Tensor, dt_bias: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(v, g, x): ``v = x · step`` and the decay of ``kernels.pointwise.gates.forward``.

    A caller that uses x beside v should use the x that is returned: both gradients are then added where they are made.
    """
    if torch.compiler.is_compiling():  # the compiler adds them in the gradient of the convolution's output
        g, v = discretise_kernel(rate, dt_bias, A_log, x)
    else:
        g, v, x = Discretise.apply(rate, dt_bias, A_log, x)
    return v, g, x


def gated_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    gate_first: bool,
    skip: Tensor | None = None,
    skip_scale: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """The norm of ``kernels.pointwise.gated_norm``."""
    return gated_norm_kernel(x, gate, weight, skip, skip_scale, eps, gate_first, silu)


def silu_product(gate: Tensor, x: Tensor) -> Tensor:
    """``silu(gate) · x`` of two tensors of one shape, by the kernels or plain."""
    if not torch.compiler.is_compiling() and gate.shape == x.shape and gate.dtype == x.dtype and has_kernels(gate, x):
        return SiluProduct.apply(gate, x)
    return F.silu(gate) * x


def twice(x: Tensor) -> tuple[Tensor, Tensor]:
    """x for two projections. Under autocast it is rounded once, not by each, and their gradients are added as they widen."""
    kind = x.device.type
    eager = not torch.compiler.is_compiling()
    if eager and x.dtype == torch.float32 and has_kernels(x) and torch.is_autocast_enabled(kind):
        return Twice.apply(x, torch.get_autocast_dtype(kind))
    return x, x


def _wide(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _by_head(x: Tensor, heads: int) -> Tensor:
    return x.new_empty(*x.shape[:2], heads, x.shape[2] // heads, dtype=torch.float32)


# Arguments and results have their meanings in ``kernels.pointwise``, in the module and function that each operator names.
discretise_kernel = Operator(
    "discretise",
    "Tensor rate, Tensor dt_bias, Tensor A_log, Tensor x",
    2,
    lambda *inputs: kernels.pointwise.gates.forward(*inputs, None),
    lambda dg, dv, *inputs: kernels.pointwise.gates.backward(dg, dv, None, None, *inputs, None),
    lambda rate, dt_bias, A_log, x: [_wide(rate), *like(x)],
)
gates = Operator(
    "gates",
    "Tensor rate, Tensor dt_bias, Tensor A_log, Tensor strength",
    2,
    lambda *inputs: kernels.pointwise.gates.forward(*inputs[:3], None, inputs[3]),
    lambda dg, dbeta, *inputs: kernels.pointwise.gates.backward(dg, None, None, dbeta, *inputs[:3], None, inputs[3]),
    lambda rate, dt_bias, A_log, strength: [_wide(rate), _wide(strength)],
)
channel_gates = Operator(
    "channel_gates",
    "Tensor rate, Tensor dt_bias, Tensor A_log, Tensor strength, float? bound",
    2,
    lambda *inputs: kernels.pointwise.channel_gates.forward(*inputs[:4], inputs[2].shape[0], inputs[4]),
    lambda dg, dbeta, *inputs: kernels.pointwise.channel_gates.backward(
        dg, dbeta, *inputs[:4], inputs[2].shape[0], inputs[4]
    ),
    lambda rate, dt_bias, A_log, strength, bound: [_by_head(rate, A_log.shape[0]), _wide(strength)],
)
sigmoid_gates = Operator(
    "sigmoid_gates",
    "Tensor rate, int heads, float? bound, float divisor",
    1,
    lambda rate, *sizes: [kernels.pointwise.channel_gates.forward(rate, None, None, None, *sizes)[0]],
    lambda dg, rate, *sizes: kernels.pointwise.channel_gates.backward(dg, None, rate, None, None, None, *sizes),
    lambda rate, heads, *sizes: [_by_head(rate, heads)],
)
level_scales = Operator(
    "level_scales",
    "Tensor dl, Tensor L, float offset",
    1,
    lambda *inputs: [kernels.pointwise.level_scales.forward(*inputs)],
    lambda *inputs: kernels.pointwise.level_scales.backward(*inputs),
    lambda dl, L, offset: [dl.new_empty(*dl.shape[:2], *L.shape)],
)
gated_norm_kernel = Operator(
    "gated_norm",
    "Tensor x, Tensor? gate, Tensor weight, Tensor? skip, Tensor? skip_scale, float eps, bool gate_first, bool silu",
    1,
    lambda *inputs: [kernels.pointwise.gated_norm.forward(*inputs)],
    lambda *inputs: kernels.pointwise.gated_norm.backward(*inputs),
    lambda x, *others: like(x),
)
units = Operator(
    "unit_length",
    "Tensor q, Tensor k",
    2,
    lambda *inputs: kernels.pointwise.unit_length.forward(*inputs),
    lambda *inputs: kernels.pointwise.unit_length.backward(*inputs),
    like,
)


class Discretise(torch.autograd.Function):
    """Decay and values, and x again, whose gradient is added to that of the values as it is made."""

    @staticmethod
    def forward(ctx, rate, dt_bias, A_log, x):
        ctx.save_for_backward(rate, dt_bias, A_log, x)
        g, v, _ = kernels.pointwise.gates.forward(rate, dt_bias, A_log, x, None)
        return g, v, x

    @staticmethod
    @differentiable_once
    def backward(ctx, dg, dv, dskip):
        return kernels.pointwise.gates.backward(dg, dv, dskip, None, *ctx.saved_tensors, None)[:4]


class SiluProduct(torch.autograd.Function):
    """The gate of a SwiGLU MLP."""

    @staticmethod
    def forward(ctx, gate, x):
        ctx.save_for_backward(gate, x)
        return kernels.pointwise.elementwise.silu_product(gate, x)

    @staticmethod
    @differentiable_once
    def backward(ctx, dout):
        return kernels.pointwise.elementwise.silu_product_backward(dout, *ctx.saved_tensors)


class Twice(torch.autograd.Function):
    """x in fewer bits, as two results."""

    @staticmethod
    def forward(ctx, x, dtype):
        narrow = x.to(dtype)
        return narrow, narrow.view_as(narrow)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, da, db):
        return kernels.pointwise.elementwise.wide_sum(da, db), None
