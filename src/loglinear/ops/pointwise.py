"""POINTWISE: what surrounds the attention op and an MLP's products, as autograd sees its kernels: gates, λ, norm, unit length.

Special about this file: eager calls on CUDA run all kernels. ``torch.compile`` gets those of ``COMPILED``, as operators, and
otherwise the plain forms, which stand where they are used and which it fuses with their neighbours; the CPU and float64 get
them too.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loglinear import kernels

MAX_WIDTH = 8192  # of a row in registers
# What compiled code leaves to the kernels too: its own would pass over large tensors once more for sums of tokens or rows.
COMPILED = frozenset({"discretise", "gates", "level_scales", "gated_norm", "unit_length"})


def ordinary(x: Tensor) -> bool:
    """Whether x is neither distributed nor fake nor anything else that has no memory to point at."""
    return type(x) in (Tensor, nn.Parameter)


def on_device(x: Tensor) -> bool:
    """Whether x is where the kernels run."""
    return x.is_cuda


def wanted(name: str) -> bool:
    """Whether the kernels of ``name`` are worth their calls here: all are in eager code, and in compiled code some."""
    return not torch.compiler.is_compiling() or name in COMPILED


def has_kernels(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these inputs: memory of one CUDA device, at most 32 bits."""
    given = [x for x in tensors if x is not None]
    alike = all(ordinary(x) and on_device(x) and x.dtype != torch.float64 for x in given)
    return alike and all(x.device == given[0].device for x in given[1:]) and kernels.installed()


def takes_rows(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take the rows of x ``[B, T, width]`` or ``[B, T, heads, width]`` with others like it."""
    if x.dim() not in (3, 4) or not 1 <= x.shape[-1] <= MAX_WIDTH or not has_kernels(x, *others):
        return False
    return all(y is None or (y.shape == x.shape and y.dtype == x.dtype) for y in others)


def takes_heads(q: Tensor, k: Tensor) -> bool:
    """Whether the kernels take the rows of q and k ``[B, T, G, K]``."""
    return q.is_floating_point() and q.dim() == 4 and wanted("unit_length") and takes_rows(q, k)


def takes_norm(
    x: Tensor, gate: Tensor, weight: Tensor, skip: Tensor | None = None, skip_scale: Tensor | None = None
) -> bool:
    """Whether ``gated_norm`` takes these: rows as wide as the weight, of which skip_scale has equal parts."""
    if not wanted("gated_norm") or not takes_rows(x, skip) or (skip is None) != (skip_scale is None):
        return False
    whole = skip_scale is None or weight.shape[0] % skip_scale.shape[0] == 0
    return whole and gate.shape == x.shape and weight.shape == x.shape[-1:] and has_kernels(x, gate, weight, skip_scale)


def discretise(x: Tensor, rate: Tensor, dt_bias: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(v, g, x): ``v = x · step`` and the decay of ``kernels.gates.forward``.

    Whoever uses x too, beside v, should use the x that comes out: both gradients are then added where they are made.
    """
    if torch.compiler.is_compiling():  # which adds them where it makes the gradient of all that the convolution gives
        g, v = discretise_operator(rate, dt_bias, A_log, x)
    else:
        g, v, _, x = Gates.apply(rate, dt_bias, A_log, x, None)
    return v, g, x


def gates(rate: Tensor, strength: Tensor, dt_bias: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor]:
    """(g, beta) of ``kernels.gates.forward``."""
    if torch.compiler.is_compiling():
        g, beta = gates_operator(rate, dt_bias, A_log, strength)
        return g, beta
    g, _, beta, _ = Gates.apply(rate, dt_bias, A_log, None, strength)
    return g, beta


def level_scales(dl: Tensor, L: Tensor) -> Tensor:
    """``softplus(L ∘ dl)`` ``[B, T, H, levels]`` from dl ``[B, T, H · levels]``; see ``kernels.gates``."""
    return level_scales_operator(dl, L)[0] if torch.compiler.is_compiling() else LevelScales.apply(dl, L)


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
    inputs = x, gate, weight, eps, gate_first, skip, skip_scale
    return gated_norm_operator(*inputs)[0] if torch.compiler.is_compiling() else GatedNorm.apply(*inputs)


def units(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k over their lengths; see ``kernels.unit_length``."""
    return tuple(unit_length_operator(q, k)) if torch.compiler.is_compiling() else Units.apply(q, k)


def silu_product(gate: Tensor, x: Tensor) -> Tensor:
    """``silu(gate) · x`` of two tensors of one shape, by the kernels or plain."""
    if wanted("silu_product") and gate.shape == x.shape and gate.dtype == x.dtype and has_kernels(gate, x):
        return SiluProduct.apply(gate, x)
    return F.silu(gate) * x


def twice(x: Tensor) -> tuple[Tensor, Tensor]:
    """x for two projections. Under autocast it is rounded once, not by each, and their gradients are added as they widen."""
    kind = x.device.type
    if wanted("twice") and x.dtype == torch.float32 and has_kernels(x) and torch.is_autocast_enabled(kind):
        return Twice.apply(x, torch.get_autocast_dtype(kind))
    return x, x


def _kernels(name: str) -> Any:
    """Imported on first use: importing loglinear imports no Triton."""
    return import_module(f"loglinear.kernels.{name}")


def _operator(
    name: str, arguments: str, results: int, forward: Callable, backward: Callable, fake: Callable
) -> torch.library.CustomOpDef:
    """``loglinear::name``, a list of results, and ``loglinear::name_backward``, by which it is differentiated.

    arguments: as in a schema. forward: of these arguments. backward: of the gradients of all results and the arguments, to
    those of the tensors among them. fake: as forward, for sizes and dtypes. What is None among their results is left out.
    """

    def apart(function):
        """No result of an operator may be a part of another."""
        given = lambda *inputs: (y for y in function(*inputs) if y is not None)  # noqa: E731
        return lambda *inputs: [y if y.untyped_storage().nbytes() == y.nbytes else y.clone() for y in given(*inputs)]

    def define(name, function, schema, fake):
        made = torch.library.custom_op(f"loglinear::{name}", apart(function), mutates_args=(), schema=schema)
        made.register_fake(fake)
        return made

    gradients = ", ".join(f"Tensor gradient_{i}" for i in range(results))
    schema = f"({gradients}, {arguments}) -> Tensor[]"
    differentiate = define(f"{name}_backward", backward, schema, lambda *inputs: _like(*inputs[results:]))

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.constants = [None if isinstance(x, Tensor) else x for x in inputs]

    def run_backward(ctx, gradients):
        inputs = [constant if x is None else x for x, constant in zip(ctx.saved_tensors, ctx.constants)]
        found = iter(differentiate(*gradients, *inputs))
        return tuple(next(found) if isinstance(x, Tensor) else None for x in inputs)

    operator = define(name, forward, f"({arguments}) -> Tensor[]", fake)
    operator.register_autograd(run_backward, setup_context=keep)
    return operator


def _like(*inputs: Any) -> list[Tensor]:
    """Contiguous tensors of the sizes and dtypes of those among the inputs: results of most kernels."""
    return [y.new_empty(y.shape) for y in inputs if isinstance(y, Tensor)]


def _wide(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


discretise_operator = _operator(
    "discretise",
    "Tensor rate, Tensor dt_bias, Tensor A_log, Tensor x",
    2,
    lambda *inputs: _kernels("gates").forward(*inputs, None),
    lambda dg, dv, *inputs: _kernels("gates").backward(dg, dv, None, None, *inputs, None),
    lambda rate, dt_bias, A_log, x: [_wide(rate), *_like(x)],
)
gates_operator = _operator(
    "gates",
    "Tensor rate, Tensor dt_bias, Tensor A_log, Tensor strength",
    2,
    lambda *inputs: _kernels("gates").forward(*inputs[:3], None, inputs[3]),
    lambda dg, dbeta, *inputs: _kernels("gates").backward(dg, None, None, dbeta, *inputs[:3], None, inputs[3]),
    lambda rate, dt_bias, A_log, strength: [_wide(rate), _wide(strength)],
)
level_scales_operator = _operator(
    "level_scales",
    "Tensor dl, Tensor L",
    1,
    lambda *inputs: [_kernels("gates").level_scales(*inputs)],
    lambda *inputs: _kernels("gates").level_scales_backward(*inputs),
    lambda dl, L: [dl.new_empty(*dl.shape[:2], *L.shape)],
)
gated_norm_operator = _operator(
    "gated_norm",
    "Tensor x, Tensor gate, Tensor weight, float eps, bool gate_first, Tensor? skip, Tensor? skip_scale",
    1,
    lambda *inputs: [_kernels("gated_norm").forward(*inputs)],
    lambda *inputs: _kernels("gated_norm").backward(*inputs),
    lambda x, *others: _like(x),
)
unit_length_operator = _operator(
    "unit_length",
    "Tensor q, Tensor k",
    2,
    lambda *inputs: _kernels("unit_length").forward(*inputs),
    lambda *inputs: _kernels("unit_length").backward(*inputs),
    _like,
)


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
