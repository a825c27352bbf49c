"""The public functions: log-linear attention with a scalar gate, and with the delta rule.

A call is ``checked``, and ``attend`` chooses what runs it. The algorithm is ``reference/chunkwise.py``; eager CPU calls run it
directly (differentiable twice, with gradients through states). On CUDA a call runs the kernels where they fit, from states by
``segments.py``. Under ``torch.compile``, on fake and on meta tensors a call without states is one operator,
``loglinear::attention``, which runs without kernels too; so it is under ``torch.vmap`` (``transforms.py``).

The operator saves its inputs alone: the backward computes the states again. A transition that ``keeps`` also saves its maps,
or its states, if they fit.

The view of a query, for 8 tokens (a number is a level, whose λ weights it; a bucket of equal numbers is one state):

    t=0    0
    t=1    1  0
    t=2    2  2  0
    t=3    2  2  1  0
    t=4    3  3  3  3  0
    t=5    3  3  3  3  1  0
    t=6    3  3  3  3  2  2  0
    t=7    3  3  3  3  2  2  1  0
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from loglinear.ops import checks, dispatch, pointwise, transforms
from loglinear.ops.inputs import Backend, Call, Inputs, State
from loglinear.ops.operators import Operator
from loglinear.reference.chunkwise import chunkwise
from loglinear.transition import CHANNEL_DELTA_RULE, CHANNEL_GATE, DELTA_RULE, SCALAR_GATE, Transition

# Which layout the kept tensors have, as an argument of the operator and so in the text of every graph: PyTorch files a compiled
# graph on disk by its text, with the number and sizes of what is kept built in. Raise it when ``kept_shapes`` changes.
KEPT = "kept as of 2026-12-01"
KERNELS = "kernels"  # the operator's backend where they have been chosen


def log_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    level_scales: Tensor | None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, State | None]:
    """Log-linear attention with a scalar gate (Log-Linear Mamba-2): O(T log T), with an O(log T) state.

    ``o_t = Σ_{s <= t} λ_t[level(t, s)] · exp(g_{s+1} + … + g_t) · (scale · q_t·k_s) · v_s``, level(t, s) = bit_length(t ^ s).

    Args:
        q, k: ``[B, T, G, K]``, float64, float32, bfloat16 or float16. T may be 0.
        v: ``[B, T, H, V]``, the dtype of q; H is a multiple of G and value head h reads q/k head ``h // (H // G)``.
        g: ``[B, T, H]``, natural log of the decay, at most 0; -inf forgets everything before the token. None is no decay.
            ``[B, T, H, K]`` is a decay of each key channel (gated linear attention); kernels take it for K up to 128.
        level_scales: λ ``[B, T, H, L]``, any sign. Positions further than L levels reach share the last one.
            None gives the plain linear model (λ = 1), with a state of fixed size.
        scale: factor of q; None means 1.
        initial_state: the final state of an earlier call, one row per sequence. Levels go on from its position.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: int32 or int64 ``[n + 1]``, offsets of n sequences packed along T in a batch of one; each has a tree of
            its own. Empty sequences are allowed.
        cu_seqlens_cpu: the same on the CPU. Where kernels run, offsets are checked only if they are given here too, so that
            nothing waits for the device; compiled code does not check them. Elsewhere this argument saves the wait.
        backend: "triton", the kernels, or an error that says why they do not take the call; "torch", plain PyTorch, which is
            exact and on a GPU many times slower; "auto", the kernels where they take the call. Where a GPU then runs plain
            PyTorch, a warning says the reason once.

    Returns:
        o ``[B, T, H, V]`` in the dtype of v, and the final state (None unless asked for), with gradients through both.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what came and what is needed.

    Source: Guo et al. 2025, sections 3.1 to 3.3.
    """
    dispatch.warn_of_heads_first("log_linear_attention", q, initial_state)
    options = initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu, backend
    return attend(checked(Inputs(q, k, v, g, None, level_scales), scale, *options))


def log_linear_delta_rule(  # 13 parameters: the arguments of the field's delta rules, and λ
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    level_scales: Tensor | None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, State | None]:
    """Log-linear attention with the (gated) delta rule (Log-Linear Gated DeltaNet): O(T log T), O(log T) state.

    The transition of token t is ``(I - β_t k_t k_tᵀ) exp(g_t)``, with a decay for each key channel that of Kimi Delta
    Attention, and it writes ``β_t k_t v_tᵀ``; a query reads the bucket of each level through the ordered product of the
    transitions after it, weighted with that level's λ.

    Args:
        beta: β ``[B, T, H]``, writing strength, in [0, 2] for a stable recurrence with keys of unit length.
        use_qk_l2norm_in_kernel: divide q and k by their lengths first, ``x / sqrt(Σ x² + 1e-6)``.
        The other arguments: as in ``log_linear_attention``.

    Returns, raises: as ``log_linear_attention``. Source: Guo et al. 2025, section 3.4; Yang et al. 2024.
    """
    if beta is None:
        raise TypeError("beta must be a tensor [B, T, H]: got None")
    dispatch.warn_of_heads_first("log_linear_delta_rule", q, initial_state)
    options = initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu, backend, use_qk_l2norm_in_kernel
    return attend(checked(Inputs(q, k, v, g, beta, level_scales), scale, *options))


def units(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k over their lengths, by one kernel where it takes them both."""
    if isinstance(q, Tensor) and isinstance(k, Tensor) and pointwise.takes_heads(q, k):
        q, k = pointwise.units(q, k)
        return q, k
    return unit(q, "q"), unit(k, "k")


def unit(x: Tensor, name: str) -> Tensor:
    """x over its length along the last axis, ``x / sqrt(Σ x² + 1e-6)``."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor: got {getattr(x, 'dtype', type(x).__name__)}")
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def outside_autocast(*operands: Tensor) -> tuple[tuple[Tensor, ...], AbstractContextManager[None]]:
    """Matrix operands in the dtype of autocast, if it is on, and a context in which it is off.

    Gates keep their dtype, as in other libraries' ops.
    """
    first = operands[0]
    device = first.device.type if isinstance(first, Tensor) else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return operands, nullcontext()
    low = torch.get_autocast_dtype(device)
    given = tuple(x.to(low) if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in operands)
    return given, torch.autocast(device, enabled=False)


def checked(
    inputs: Inputs,
    scale: float | None = None,
    state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    backend: Backend = "auto",
    unit_length: bool = False,
) -> Call:
    """The call of these arguments, with q, k and v in the dtype of autocast, q and k of ``unit_length`` if asked for."""
    dispatch.check_backend(backend)
    q, k, v, *others = inputs
    if unit_length:
        q, k = units(q, k)
    (q, k, v), _ = outside_autocast(q, k, v)
    inputs = Inputs(q, k, v, *others)
    taken = checks.check_inputs(inputs)
    scale = checks.check_scale(scale)
    checks.check_packing(q, cu_seqlens, cu_seqlens_cpu)
    if checks.transforming():
        transforms.check(inputs, cu_seqlens=cu_seqlens, initial_state=state, output_final_state=output_final_state)
    return Call(inputs, scale, state, output_final_state, cu_seqlens, cu_seqlens_cpu, backend, taken)


def attend(call: Call) -> tuple[Tensor, State | None]:
    """(o ``[B, T, H, V]``, the final state if asked for) of a call that is ``checked``."""
    inputs, scale, state, output_final_state, cu_seqlens, cu_seqlens_cpu, backend, _ = call
    if state is not None or output_final_state:
        run = _with_states
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            # The contents of a state depend on its positions: no single graph fits, and every token would compile another one.
            run = torch.compiler.disable(_with_states)
        return run(call)
    if not checks.values_are_known(
        inputs.q
    ):  # a graph, or tensors without values, of which the operator says the shapes
        options = scale, 0, keep(inputs, cu_seqlens), backend
        return attention.operator(*inputs, cu_seqlens, None, *options)[0], None
    kernel = dispatch.takes(call)
    if cu_seqlens_cpu is not None or not kernel:
        lengths = checks.sequence_lengths(inputs.q, cu_seqlens, cu_seqlens_cpu)
    if checks.transforming() and (kernel or transforms.vmapped(*inputs)):
        return transforms.run(attention, *inputs, cu_seqlens, None, scale, 0, "", backend), None
    if kernel:
        return attention.function.apply(*inputs, cu_seqlens, None, (scale, 0, keep(inputs, None), KERNELS))[0], None
    return plain(inputs, scale, lengths)[0], None


def _with_states(call: Call) -> tuple[Tensor, State | None]:
    inputs, state, backend = call.inputs, call.state, call.backend
    lengths = checks.sequence_lengths(inputs.q, call.cu_seqlens, call.cu_seqlens_cpu)
    checks.check_state(state, inputs, len(lengths))
    unknown = not checks.values_are_known(inputs.q)
    o, decays = None, inputs.transition().span != "matrix"  # then the final state follows from the tokens alone
    if decays and not inputs.linear() and state is None and (unknown or dispatch.attention(inputs, backend)):
        o, _ = attend(Call(inputs, call.scale, cu_seqlens=call.cu_seqlens, backend=backend))
    if o is not None or unknown or dispatch.from_state(inputs, state, backend):
        from loglinear.ops import segments  # here: it calls ``attend``

        with outside_autocast(inputs.q)[1]:
            return segments.attend(call, lengths, o)
    o, final = plain(inputs, call.scale, lengths, state)
    return o, final if call.output_final_state else None


def plain(inputs: Inputs, scale: float, lengths: tuple[int, ...], state: State | None = None) -> tuple[Tensor, Any]:
    """``chunkwise`` in float32 (float64 for float64 inputs): o in v's dtype, and the final state."""
    q, k, v, g, beta, level_scales = inputs
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    gate = q.new_zeros(v.shape[:3], dtype=wide) if g is None else g.to(wide)
    scales, rate = (None if x is None else x.to(wide) for x in (level_scales, beta))
    with outside_autocast(q)[1]:
        o, final = chunkwise(q.to(wide) * scale, k.to(wide), v.to(wide), gate, scales, rate, state, lengths)
    return o.to(v.dtype), final


def keep(inputs: Inputs, cu_seqlens: Tensor | None) -> str:
    """``KEPT`` if the forward should leave something for a backward that may follow. Constants to the compiler."""
    wanted = inputs.transition().keeps and torch.is_grad_enabled() and not mostly_empty(cu_seqlens, inputs.q.shape[1])
    return KEPT if wanted and any(x is not None and x.requires_grad for x in inputs) else ""


@cache
def kernels_of(transition: Transition) -> Any:
    """Forward and backward of one transition. Imported on first use: importing loglinear imports no Triton."""
    from loglinear.kernels import channel, decay, delta

    return {SCALAR_GATE: decay, CHANNEL_GATE: channel, DELTA_RULE: delta, CHANNEL_DELTA_RULE: delta}[transition]


def mostly_empty(cu_seqlens: Tensor | None, tokens: int) -> bool:
    """Whether there are as many sequences as tokens: a graph that finds documents itself must have room for so many."""
    return cu_seqlens is not None and cu_seqlens.shape[0] > max(tokens, 1)


def _for_kernels(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """Arguments of a kernel call. The linear model's λ is ``[B, T, H, 1]``, a single one that all levels share."""
    v, scales = inputs.v, inputs.level_scales
    scales = v.new_ones(()).expand(*v.shape[:3], 1) if scales is None else scales
    return inputs.q, inputs.k, v, *inputs.gates(), scales


def _chosen(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """(kernels or None, inputs, scale, cu_seqlens, options of kernels that go on, keep) of a call."""
    inputs, (cu_seqlens, first_chunks, scale, reach, keep, backend) = Inputs(*arguments[:6]), arguments[6:]
    if backend != KERNELS and mostly_empty(cu_seqlens, inputs.q.shape[1]):
        cu_seqlens = torch.unique_consecutive(cu_seqlens)  # empty ones cost as much as full ones; waits for the device
    taken = backend == KERNELS or dispatch.attention(inputs, backend)
    continued = {} if first_chunks is None else {"first_chunks": first_chunks, "reach": reach}
    return kernels_of(inputs.transition()) if taken else None, inputs, scale, cu_seqlens, continued, keep


def _forward(*arguments: Any) -> Sequence[Tensor]:
    kernels, inputs, scale, cu_seqlens, continued, keep = _chosen(arguments)
    if kernels is None:
        return [plain(inputs, scale, checks.sequence_lengths(inputs.q, cu_seqlens, None))[0].contiguous()]
    options = continued if continued or not inputs.transition().keeps else {"keep": bool(keep)}
    return kernels.forward(*_for_kernels(inputs), scale, cu_seqlens, **options)


def _backward(do: Tensor, *arguments: Any) -> list[Tensor | None]:
    *given, kept = arguments
    kernels, inputs, scale, cu_seqlens, continued, _ = _chosen(given)
    if kernels is not None:
        options = {"kept": tuple(kept)} if kept else continued
        *grads, dscales = kernels.backward(do, *_for_kernels(inputs), scale, cu_seqlens, **options)
        return [*grads, None if inputs.linear() else dscales]
    lengths = checks.sequence_lengths(inputs.q, cu_seqlens, None)
    # Below a custom operator autograd is switched off; torch.func.vjp would do, but not under a TorchDispatchMode.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        leaves = inputs.each(lambda x: x.detach().requires_grad_())
        o, wanted = plain(leaves, scale, lengths)[0], [x for x in leaves if x is not None]
        grads = torch.autograd.grad(o, wanted, do, allow_unused=True, materialize_grads=True)
    return [x.contiguous() for x in grads]


def _fake(*arguments: Any) -> list[Tensor]:
    inputs, (cu_seqlens, first_chunks, *_, keep, backend) = Inputs(*arguments[:6]), arguments[6:]
    v, transition, shapes = inputs.v, inputs.transition(), []
    if keep and transition.keeps and first_chunks is None and dispatch.attention(inputs, backend):
        given = inputs.q, v, _for_kernels(inputs)[-1], cu_seqlens
        shapes = kernels_of(transition).kept_shapes(*given, channels=transition.per_channel)
    return [v.new_empty(v.shape), *(v.new_empty(shape, dtype=dtype) for shape, dtype in shapes)]


# first_chunks, reach: of sequences that go on from a state, as in ``kernels.decay.forward``. keep: empty, or KEPT, on which no
# number depends. backend: that of the op, or KERNELS.
attention = Operator(
    "attention",
    "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor? level_scales, Tensor? cu_seqlens, Tensor? first_chunks, "
    "float scale, int reach, str keep, str backend",
    1,
    _forward,
    _backward,
    _fake,
    keeps=True,
)
transforms.register(attention)
