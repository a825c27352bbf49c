"""FORWARD: o of either op without states, by kernels, by an operator for a graph, or by plain PyTorch.

Only inputs are saved: the backward computes the states again. A transition that ``keeps`` also saves its maps if they fit. On
CUDA the operator runs the kernels for the calls that they take. Plain PyTorch in eager code is ``chunkwise`` itself, which is
differentiable twice and through states.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from loglinear.ops import checks, dispatch, transforms
from loglinear.ops.inputs import Inputs
from loglinear.ops.operators import Operator
from loglinear.reference.chunkwise import chunkwise
from loglinear.transition import CHANNEL_GATE, DELTA_RULE, SCALAR_GATE, Transition

# Which layout the kept tensors have, as an argument of the operator and so in the text of every graph: PyTorch files a compiled
# graph on disk by its text, with the number and sizes of what is kept built in. Raise it when ``kept_shapes`` changes.
KEPT = "kept as of 0.2.0"


def forward(
    inputs: Inputs,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    backend: dispatch.Backend = "auto",
) -> Tensor:
    """o ``[B, T, H, V]``; arguments as those of the public functions, checked."""
    if not checks.values_are_known(
        inputs.q
    ):  # a graph, or tensors without values, of which the operator says the shapes
        return attention.operator(*inputs, scale, cu_seqlens, None, 0, keep(inputs, cu_seqlens), backend)[0]
    kernel = dispatch.attention(inputs, backend)
    if cu_seqlens_cpu is not None or not kernel:
        lengths = checks.sequence_lengths(inputs.q, cu_seqlens, cu_seqlens_cpu)
    if checks.transforming() and (kernel or transforms.vmapped(*inputs)):
        return transforms.run(attention, *inputs, scale, cu_seqlens, None, 0, "", backend)
    if kernel:
        return by_kernels(inputs, scale, cu_seqlens)
    return plain(inputs, scale, lengths)[0]


def plain(inputs: Inputs, scale: float, lengths: tuple[int, ...], state=None) -> tuple[Tensor, Any]:
    """``chunkwise`` in float32 (float64 for float64 inputs): o in v's dtype, and the final state."""
    q, k, v, g, beta, level_scales = inputs
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    gate = q.new_zeros(v.shape[:3], dtype=wide) if g is None else g.to(wide)
    scales, rate = (None if x is None else x.to(wide) for x in (level_scales, beta))
    o, final = chunkwise(q.to(wide) * scale, k.to(wide), v.to(wide), gate, scales, rate, state, lengths)
    return o.to(v.dtype), final


def by_kernels(
    inputs: Inputs, scale: float, cu_seqlens: Tensor | None, first_chunks: Tensor | None = None, reach: int = 0
) -> Tensor:
    """o by the kernels, in eager code. first_chunks, reach: of sequences that go on from a state."""
    return attention.function.apply(*inputs, scale, cu_seqlens, first_chunks, reach, keep(inputs, None), "triton")[0]


def keep(inputs: Inputs, cu_seqlens: Tensor | None) -> str:
    """``KEPT`` if the forward should leave something for a backward that may follow. Constants to the compiler."""
    wanted = inputs.transition().keeps and torch.is_grad_enabled() and not mostly_empty(cu_seqlens, inputs.q.shape[1])
    return KEPT if wanted and any(x is not None and x.requires_grad for x in inputs) else ""


@cache
def kernels_of(transition: Transition) -> Any:
    """Forward and backward of one transition. Imported on first use: importing loglinear imports no Triton."""
    from loglinear.kernels import channel, decay, delta

    return {SCALAR_GATE: decay, CHANNEL_GATE: channel, DELTA_RULE: delta}[transition]


def mostly_empty(cu_seqlens: Tensor | None, tokens: int) -> bool:
    """Whether there are as many sequences as tokens: a graph that finds documents itself must have room for so many."""
    return cu_seqlens is not None and cu_seqlens.shape[0] > max(tokens, 1)


def without_empty(cu_seqlens: Tensor | None, tokens: int) -> Tensor | None:
    """Offsets without empty sequences where most are, which would cost as much as full ones. Waits for the device then."""
    return torch.unique_consecutive(cu_seqlens) if mostly_empty(cu_seqlens, tokens) else cu_seqlens


def _for_kernels(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """Arguments of a kernel call. The linear model's λ is ``[B, T, H, 1]``, a single one that all levels share."""
    v, scales = inputs.v, inputs.level_scales
    scales = v.new_ones(()).expand(*v.shape[:3], 1) if scales is None else scales
    return inputs.q, inputs.k, v, *inputs.gates(), scales


def _continued(first_chunks: Tensor | None, reach: int) -> dict[str, Any]:
    return {} if first_chunks is None else {"first_chunks": first_chunks, "reach": reach}


def _kernels_forward(q, k, v, g, beta, level_scales, scale, cu_seqlens, first_chunks, reach, keep, backend):
    inputs = Inputs(q, k, v, g, beta, level_scales)
    kernels = kernels_of(inputs.transition())
    if keep:
        return kernels.forward_keeping(*_for_kernels(inputs), scale, cu_seqlens)
    return [kernels.forward(*_for_kernels(inputs), scale, cu_seqlens, **_continued(first_chunks, reach))]


def _kernels_backward(do, q, k, v, g, beta, level_scales, scale, cu_seqlens, first_chunks, reach, keep, backend, kept):
    inputs = Inputs(q, k, v, g, beta, level_scales)
    options = {"kept": tuple(kept)} if kept else _continued(first_chunks, reach)
    backward = kernels_of(inputs.transition()).backward
    *grads, dscales = backward(do, *_for_kernels(inputs), scale, cu_seqlens, **options)
    return [*grads, None if level_scales is None else dscales]


def _forward(q, k, v, g, beta, level_scales, scale, cu_seqlens, first_chunks, reach, keep, backend):
    """As an operator, which also runs where there are no kernels."""
    inputs, cu_seqlens = Inputs(q, k, v, g, beta, level_scales), without_empty(cu_seqlens, q.shape[1])
    if dispatch.attention(inputs, backend):
        keep = keep if inputs.transition().keeps else ""
        return _kernels_forward(*inputs, scale, cu_seqlens, first_chunks, reach, keep, backend)
    return [plain(inputs, scale, checks.sequence_lengths(q, cu_seqlens, None))[0].contiguous()]


def _backward(do, q, k, v, g, beta, level_scales, scale, cu_seqlens, first_chunks, reach, keep, backend, kept):
    inputs, cu_seqlens = Inputs(q, k, v, g, beta, level_scales), without_empty(cu_seqlens, q.shape[1])
    if dispatch.attention(inputs, backend):
        return _kernels_backward(do, *inputs, scale, cu_seqlens, first_chunks, reach, keep, backend, kept)
    lengths = checks.sequence_lengths(q, cu_seqlens, None)
    # Below a custom operator autograd is switched off; torch.func.vjp would do, but not under a TorchDispatchMode.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        leaves = Inputs(*(None if x is None else x.detach().requires_grad_() for x in inputs))  # type: ignore[arg-type]
        given = [x for x in leaves if x is not None]
        o = plain(leaves, scale, lengths)[0]
        grads = torch.autograd.grad(o, given, do, allow_unused=True, materialize_grads=True)
    return [x.contiguous() for x in grads]


def _fake(q, k, v, g, beta, level_scales, scale, cu_seqlens, first_chunks, reach, keep, backend):
    inputs, shapes = Inputs(q, k, v, g, beta, level_scales), []
    if keep and inputs.transition().keeps and dispatch.attention(inputs, backend):
        shapes = kernels_of(inputs.transition()).kept_shapes(q, v, _for_kernels(inputs)[-1], cu_seqlens)
    return [v.new_empty(v.shape), *(v.new_empty(shape, dtype=dtype) for shape, dtype in shapes)]


# keep: empty, or KEPT, on which no number depends.
attention = Operator(
    "attention",
    "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor? level_scales, float scale, Tensor? cu_seqlens, "
    "Tensor? first_chunks, int reach, str keep, str backend",
    1,
    _forward,
    _backward,
    _fake,
    keeps=True,
    eager=(_kernels_forward, _kernels_backward),
)
transforms.register(attention)
