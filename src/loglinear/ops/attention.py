"""The public functions: log-linear attention with a scalar gate, and with the delta rule.

They check, normalise and dispatch. The algorithm is ``reference/chunkwise.py``; eager CPU calls run it directly (differentiable
twice, with gradients through states). On CUDA a call runs the kernels where they fit, with states (``segments.py``)
or without (``forward.py``). Under ``torch.compile``, on fake and on meta tensors a call without states is one
operator, ``loglinear::attention``; under ``torch.vmap`` too (``transforms.py``).

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

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from loglinear.ops import checks, dispatch, pointwise, segments, transforms
from loglinear.ops.dispatch import Backend, State
from loglinear.ops.forward import forward, plain
from loglinear.ops.inputs import Inputs


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
            ``[B, T, H, K]`` is a decay of each key channel (gated linear attention), so far in plain PyTorch alone.
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
    states, packing = (initial_state, output_final_state), (cu_seqlens, cu_seqlens_cpu)
    return attend(q, k, v, g, None, level_scales, scale, *states, *packing, backend=backend)


def log_linear_delta_rule(
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
    Attention, and it writes ``β_t k_t v_tᵀ``; a query reads the bucket of
    each level through the ordered product of the transitions after it, weighted with that level's λ.

    Args:
        beta: β ``[B, T, H]``, writing strength, in [0, 2] for a stable recurrence with keys of unit length.
        use_qk_l2norm_in_kernel: divide q and k by their lengths first, ``x / sqrt(Σ x² + 1e-6)``.
        The other arguments: as in ``log_linear_attention``.

    Returns, raises: as ``log_linear_attention``. Source: Guo et al. 2025, section 3.4; Yang et al. 2024.
    """
    if beta is None:
        raise TypeError("beta must be a tensor [B, T, H]: got None")
    dispatch.warn_of_heads_first("log_linear_delta_rule", q, initial_state)
    states, packing = (initial_state, output_final_state), (cu_seqlens, cu_seqlens_cpu)
    return attend(q, k, v, g, beta, level_scales, scale, *states, *packing, use_qk_l2norm_in_kernel, backend)


def units(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k over their lengths, by one kernel where it takes them both."""
    if isinstance(q, Tensor) and isinstance(k, Tensor) and pointwise.takes_heads(q, k):
        return pointwise.units(q, k)
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


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    level_scales: Tensor | None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    unit_length: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, State | None]:
    """Both public functions, as layers call them: the delta rule where there is a beta."""
    dispatch.check_backend(backend)
    if unit_length:
        q, k = units(q, k)
    (q, k, v), without_autocast = outside_autocast(q, k, v)
    inputs = Inputs(q, k, v, g, beta, level_scales)
    checks.check_inputs(inputs)
    scale = checks.check_scale(scale)
    checks.check_packing(q, cu_seqlens, cu_seqlens_cpu)
    states = {"initial_state": initial_state, "output_final_state": output_final_state}
    transforms.check(inputs, cu_seqlens=cu_seqlens, **states)
    with without_autocast:
        if initial_state is None and not output_final_state:
            return forward(inputs, scale, cu_seqlens, cu_seqlens_cpu, backend), None
        run = _with_states
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            # The contents of a state depend on its positions: no single graph fits, and every token would compile another one.
            run = torch.compiler.disable(_with_states)
        return run(inputs, scale, cu_seqlens, cu_seqlens_cpu, initial_state, output_final_state, backend)


def _with_states(
    inputs: Inputs,
    scale: float,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    state: State | None,
    output_final_state: bool,
    backend: Backend,
) -> tuple[Tensor, State | None]:
    lengths = checks.sequence_lengths(inputs.q, cu_seqlens, cu_seqlens_cpu)
    checks.check_state(state, inputs, len(lengths))
    packed, unknown = cu_seqlens is not None, not checks.values_are_known(inputs.q)
    o, decays = None, inputs.transition().span != "matrix"  # then the final state follows from the tokens alone
    if decays and not inputs.linear() and state is None and (unknown or dispatch.attention(inputs, backend)):
        o = forward(inputs, scale, cu_seqlens, backend=backend)
    if o is not None or unknown or dispatch.from_state(inputs, state, backend):
        return segments.attend(inputs, scale, lengths, packed, state, output_final_state, o)
    o, final = plain(inputs, scale, lengths, state)
    return o, final if output_final_state else None
