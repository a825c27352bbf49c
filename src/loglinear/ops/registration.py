"""``loglinear::attention``: the op as PyTorch's compiler, checkpointing and FSDP2 see it, with fake and backward.

The backward operator computes the states again, so only the inputs are saved. The delta rule also saves its maps if they fit:
on request the operator returns them beside o. On CUDA the operators run the Triton kernels for sizes that the kernels take.
Eager code on the CPU, and every call with a state, does not use the operators. It differentiates ``chunkwise`` directly,
which works twice and through states.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loglinear.kernels.devices import why_unfit
from loglinear.ops import fallback
from loglinear.ops.checks import sequence_lengths, transforming
from loglinear.ops.once import differentiable_once
from loglinear.reference.chunkwise import chunkwise
from loglinear.state import CHUNK_SIZE, LinearState, LogLinearState

MAX_KEY_WIDTH, MAX_VALUE_WIDTH = 256, 1024  # of the kernels; wider heads run the plain torch form


def digest(*files: str) -> str:
    """Of source files of this package."""
    folder = Path(__file__).parents[1]
    return sha256(b"".join((folder / name).read_bytes() for name in files)).hexdigest()[:16]


# A digest of the code that decides which maps the delta rule keeps. It is an argument of the operator, hence in the
# text of every graph: a compiled graph has the number and sizes of the kept maps built in, and PyTorch files graphs on
# disk by their text, so a graph of other code must not be found. It is computed here (0.1 ms): the compiler can neither
# trace the computation nor be told to call it, except by a decorator that imports the compiler.
KEPT_BY = digest(
    "kernels/tree/problem.py",
    "kernels/tuning.py",
    "kernels/delta/memory.py",
    "kernels/delta/group_maps.py",
    "ops/registration.py",
)


@lru_cache(maxsize=2)
def kernels_of(delta: bool) -> Any:
    """Forward and backward of one rule. Imported on first use: importing loglinear imports no Triton."""
    return import_module("loglinear.kernels.delta" if delta else "loglinear.kernels.decay")


def has_kernel(q: Tensor, v: Tensor, beta: Tensor | None) -> bool:
    """Whether the kernels take these inputs: CUDA, at most 32 bits, K up to 256, V up to 1,024, enough shared memory."""
    if not q.is_cuda:
        return False
    what = "log_linear_attention" if beta is None else "log_linear_delta_rule"
    if not (fallback.on_kernels(what, v) and fits_heads(what, q, v)):
        return False
    reason = why_unfit(q.device, beta is not None, int(q.shape[3]))
    return reason is None or fallback.plain(what, reason)


def fits_heads(what: str, q: Tensor, v: Tensor) -> bool:
    """Whether the heads of q and v ``[B, T, heads, width]`` are no wider than the kernels' tiles."""
    key_width, value_width = q.shape[3], v.shape[3]
    if key_width <= MAX_KEY_WIDTH and value_width <= MAX_VALUE_WIDTH:
        return True
    limits = f"kernels take K up to {MAX_KEY_WIDTH} and V up to {MAX_VALUE_WIDTH:,}"
    return fallback.plain(what, f"heads of K={int(key_width)} and V={int(value_width)}, where {limits}")


State = LogLinearState | LinearState


def continues(q: Tensor, v: Tensor, beta: Tensor | None, state: State | None) -> bool:
    """Whether the kernels take these inputs from this state: the scalar gate's, from some number of tokens on."""
    tree = isinstance(state, LogLinearState) and beta is None
    return tree and not transforming() and _worth_kernels(q, v, beta, state)


def takes_segments(q: Tensor, v: Tensor, beta: Tensor | None, state: State | None) -> bool:
    """Whether the kernels take a call with states in blocks: from some number of tokens on."""
    return _worth_kernels(q, v, beta, state)


def _worth_kernels(q: Tensor, v: Tensor, beta: Tensor | None, state: State | None) -> bool:
    if q.shape[0] * q.shape[1] <= CHUNK_SIZE or not has_kernel(q, v, beta):
        return False
    if isinstance(state, LogLinearState) and state.chunk_size != CHUNK_SIZE:
        reason = f"a state of chunks of {state.chunk_size} tokens, where kernels go on from chunks of {CHUNK_SIZE}"
        return fallback.plain("a call with an initial_state", reason)
    return True


def run_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    level_scales: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    **continued,
) -> Tensor:
    """o by the kernels of either rule. ``continued``: first_chunks and reach, of the scalar gate's kernels only."""
    rate = () if beta is None else (beta,)
    scales = scales_of(v, level_scales)
    return kernels_of(beta is not None).forward(q, k, v, g, *rate, scales, scale, cu_seqlens, **continued)


def run_kernels_keeping(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    level_scales: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    """(o, the tensors that save the delta rule's backward some work)."""
    scales = scales_of(v, level_scales)
    return kernels_of(True).forward_keeping(q, k, v, g, beta, scales, scale, cu_seqlens)


def run_kernels_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    level_scales: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    **options,
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dg, dβ, dλ) by the kernels of either rule, None where there is no input.

    options: first_chunks and reach of the scalar gate, or ``kept`` of the delta rule.
    """
    rate = () if beta is None else (beta,)
    scales = scales_of(v, level_scales)
    backward = kernels_of(beta is not None).backward
    *grads, dscales = backward(do, q, k, v, g, *rate, scales, scale, cu_seqlens, **options)
    return *grads, *(() if beta is not None else (None,)), None if level_scales is None else dscales


def scales_of(v: Tensor, level_scales: Tensor | None) -> Tensor:
    """λ as the kernels want it; the linear model's is ``[B, T, H, 1]``, a single one that all levels share."""
    return v.new_ones(()).expand(*v.shape[:3], 1) if level_scales is None else level_scales


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    level_scales: Tensor | None,
    scale: float,
    lengths: tuple[int, ...],
    state: State | None = None,
) -> tuple[Tensor, State]:
    """``chunkwise`` in float32 (float64 for float64 inputs) with the output in v's dtype."""
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    gate = q.new_zeros(v.shape[:3], dtype=wide) if g is None else g.to(wide)
    scales, rate = (None if x is None else x.to(wide) for x in (level_scales, beta))
    o, final = chunkwise(q.to(wide) * scale, k.to(wide), v.to(wide), gate, scales, rate, state, lengths)
    return o.to(v.dtype), final


def mostly_empty(cu_seqlens: Tensor | None, tokens: int) -> bool:
    """Whether there are as many sequences as tokens: a graph that finds documents itself must have room for so many."""
    return cu_seqlens is not None and cu_seqlens.shape[0] > max(tokens, 1)


def without_empty(cu_seqlens: Tensor | None, tokens: int) -> Tensor | None:
    """Offsets without empty sequences if most are empty: these cost as much as full ones. Then this waits for the device."""
    return torch.unique_consecutive(cu_seqlens) if mostly_empty(cu_seqlens, tokens) else cu_seqlens


@torch.library.custom_op("loglinear::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    level_scales: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    keep: str,
) -> list[Tensor]:
    """o of either public op, without states; with ``keep`` then the tensors that save its backward some work, if any.

    Shapes as in the public op. keep: empty, or ``KEPT_BY``; no number depends on it.
    """
    cu_seqlens = without_empty(cu_seqlens, q.shape[1])
    inputs = q, k, v, g, beta, level_scales
    if has_kernel(q, v, beta):
        if keep and beta is not None:
            return list(run_kernels_keeping(q, k, v, g, beta, level_scales, scale, cu_seqlens))
        return [run_kernels(*inputs, scale, cu_seqlens)]
    return [run(*inputs, scale, sequence_lengths(q, cu_seqlens, None))[0].contiguous()]


@attention.register_fake
def _(q, k, v, g, beta, level_scales, scale, cu_seqlens, keep):
    shapes = []
    if keep and beta is not None and has_kernel(q, v, beta):
        shapes = kernels_of(True).kept_shapes(q, v, scales_of(v, level_scales), cu_seqlens)
    return [v.new_empty(v.shape), *(v.new_empty(shape, dtype=dtype) for shape, dtype in shapes)]


@torch.library.custom_op("loglinear::attention_backward", mutates_args=())
def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    level_scales: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    kept: list[Tensor],
) -> list[Tensor]:
    """Gradients of q, k, v, then of g, beta and level_scales if given. kept: what ``attention`` returned after o."""
    cu_seqlens = without_empty(cu_seqlens, q.shape[1])
    if has_kernel(q, v, beta):
        options = {"kept": tuple(kept)} if kept else {}
        grads = run_kernels_backward(do, q, k, v, g, beta, level_scales, scale, cu_seqlens, **options)
        return [x for x in grads if x is not None]
    optional = (g, beta, level_scales)
    given = [q, k, v, *(x for x in optional if x is not None)]
    lengths = sequence_lengths(q, cu_seqlens, None)

    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        values = iter(rest)
        gate, rate, scales = (None if x is None else next(values) for x in optional)
        return run(q, k, v, gate, rate, scales, scale, lengths)[0]

    # Below a custom operator autograd is switched off; torch.func.vjp would do, but not under a TorchDispatchMode.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        given = [x.detach().requires_grad_() for x in given]
        grads = torch.autograd.grad(forward(*given), given, do, allow_unused=True, materialize_grads=True)
    return [x.contiguous() for x in grads]


@attention_backward.register_fake
def _(do, q, k, v, g, beta, level_scales, scale, cu_seqlens, kept):
    return [x.new_empty(x.shape) for x in (q, k, v, g, beta, level_scales) if x is not None]


def _save(ctx, inputs, output):
    *tensors, ctx.scale, cu_seqlens, _ = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # zeros for the kept tensors would be as large as these
    ctx.save_for_backward(*tensors, cu_seqlens, *kept)


def _backward(ctx, gradients):
    *tensors, cu_seqlens = ctx.saved_tensors[:7]
    grads = attention_backward(gradients[0], *tensors, ctx.scale, cu_seqlens, list(ctx.saved_tensors[7:]))
    rest = iter(grads[3:])
    return *grads[:3], *(None if x is None else next(rest) for x in tensors[3:]), None, None, None


attention.register_autograd(_backward, setup_context=_save)


def run_compiled(q, k, v, g, beta, level_scales, scale, cu_seqlens) -> Tensor:
    """o by the operator, which keeps what it can if a backward may follow: constants to the compiler, which guards on them."""
    inputs = q, k, v, g, beta, level_scales
    keep = (
        beta is not None
        and not mostly_empty(cu_seqlens, q.shape[1])
        and torch.is_grad_enabled()
        and any(x is not None and x.requires_grad for x in inputs)
    )
    return attention(*inputs, scale, cu_seqlens, KEPT_BY if keep else "")[0]


class Kernels(torch.autograd.Function):
    """The same kernels for eager calls: a custom operator costs the host more than a short sequence costs the GPU.

    With ``differentiate`` and an input that needs a gradient, the delta rule's forward leaves its maps for the backward.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, beta, level_scales, scale, cu_seqlens, differentiate, first_chunks=None, reach=0):
        inputs = q, k, v, g, beta, level_scales
        ctx.scale = scale
        ctx.continued = {} if first_chunks is None else {"first_chunks": first_chunks, "reach": reach}
        kept: list[Tensor] = []
        if beta is not None and differentiate and any(ctx.needs_input_grad):
            o, *kept = run_kernels_keeping(*inputs, scale, cu_seqlens)
        else:
            o = run_kernels(*inputs, scale, cu_seqlens, **ctx.continued)
        ctx.save_for_backward(*inputs, cu_seqlens, *kept)
        return o

    @staticmethod
    @differentiable_once
    def backward(ctx, do):
        q, k, v, g, beta, level_scales, cu_seqlens, *kept = ctx.saved_tensors
        inputs = q, k, v, g, beta, level_scales
        options = ctx.continued if beta is None else {"kept": tuple(kept)}
        grads = run_kernels_backward(do, *inputs, ctx.scale, cu_seqlens, **options)
        return *grads, None, None, None, None, None


def run_eager(q, k, v, g, beta, level_scales, scale, cu_seqlens, *continued) -> Tensor:
    """``Kernels``, as the caller's grad mode asks: inside of them it is always off."""
    return Kernels.apply(q, k, v, g, beta, level_scales, scale, cu_seqlens, torch.is_grad_enabled(), *continued)
