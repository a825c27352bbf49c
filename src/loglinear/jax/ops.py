"""The public functions in JAX: log-linear attention with a gate, and with the delta rule.

Names, layouts, arguments and errors are those of ``loglinear.ops``; what differs is said in each docstring. The
functions are pure, for ``jax.jit``, ``jax.grad``, ``jax.vmap`` and ``jax.checkpoint``, and differentiate as often as
one likes.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from loglinear.jax import checks
from loglinear.jax.foreign import chosen, torch_call
from loglinear.jax.forward import forward
from loglinear.jax.inputs import Inputs
from loglinear.jax.layout import number_of_segments, offsets_of
from loglinear.jax.products import numbers_of
from loglinear.jax.state import State

Backend = Literal["auto", "xla", "pallas", "torch"]


def log_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    level_scales: Array | None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Array | None = None,
    segment_ids: Array | None = None,
    max_segments: int | None = None,
    backend: Backend = "auto",
) -> tuple[Array, State | None]:
    """Log-linear attention with a gate for each head (Log-Linear Mamba-2) or key channel (GLA): O(T log T), with an
    O(log T) state.

    ``o_t = Σ_{s <= t} λ_t[level(t, s)] · exp(g_{s+1} + … + g_t) · (scale · q_t·k_s) · v_s``, level(t, s) = bit_length(t
    ^ s).

    Args:
        q, k: ``[B, T, G, K]``, float64, float32, bfloat16 or float16 (which is computed in float32). T may be 0.
        v: ``[B, T, H, V]``, the dtype of q; H is a multiple of G and value head h reads q/k head ``h // (H // G)``.
        g: ``[B, T, H]`` or ``[B, T, H, K]``, natural log of the decay, at most 0; -inf forgets everything before the
            token. None is no decay. A log below -1000 is one of -1000, which is a decay to zero.
        level_scales: λ ``[B, T, H, L]``, any sign. Positions further than L levels reach share the last one. None gives
            the plain linear model (λ = 1), with a state of fixed size.
        scale: factor of the output; None means 1.
        initial_state: the final state of an earlier call, one row per sequence. Levels go on from its position.
        output_final_state: whether to return the state after the last token. Outside of ``jit`` it has the slots that
            it needs; inside, as many as ``initial_state``, and at least those that T tokens need.
        cu_seqlens: int32 or int64 ``[n + 1]``, offsets of n sequences packed along T in a batch of one; each has a tree
            of its own.
        segment_ids: integer ``[B, T]`` in its place, the number of each token's document: where it changes, and where a
            row starts, a document starts. Without states.
        max_segments: most documents in ``segment_ids``, of all rows together; needed inside of ``jit``. With more the
            output is NaN.
        backend: "auto" is "torch" for calls on a GPU after ``use_torch()``, and otherwise "xla". "pallas": the stage
            that costs most as a TPU kernel, for a gate of each head with λ, in float32 and bfloat16. Without a TPU the
            kernel is interpreted, which is slow. "torch": the PyTorch op, with its Triton kernels on a GPU, as a
            foreign call; without states, and with first derivatives alone.

    Returns:
        o ``[B, T, H, V]`` in the dtype of v, and the final state (None unless asked for), with gradients through both.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what came and what is needed. Values (the
            sign of g, offsets, positions) are checked outside of ``jit``.

    Source: Guo et al. 2025, sections 3.1 to 3.3.
    """
    packing = (cu_seqlens, segment_ids, max_segments, backend)
    return attend(q, k, v, g, None, level_scales, scale, initial_state, output_final_state, *packing)


def log_linear_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    beta: Array,
    level_scales: Array | None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Array | None = None,
    segment_ids: Array | None = None,
    max_segments: int | None = None,
    backend: Backend = "auto",
) -> tuple[Array, State | None]:
    """Log-linear attention with the (gated) delta rule (Log-Linear Gated DeltaNet): O(T log T), with an O(log T) state.

    The transition of token t is ``(I - β_t k_t k_tᵀ) exp(g_t)``, with a decay for each key channel that of Kimi Delta
    Attention, and it writes ``β_t k_t v_tᵀ``; a query reads the bucket of each level through the ordered product of the
    transitions after it.

    Args:
        beta: β ``[B, T, H]``, writing strength, in [0, 2] for a stable recurrence with keys of unit length.
        use_qk_l2norm_in_kernel: divide q and k by their lengths first, ``x / sqrt(Σ x² + 1e-6)``.
        The other arguments: as in ``log_linear_attention``.

    Returns, raises: as ``log_linear_attention``. Source: Guo et al. 2025, section 3.4; Yang et al. 2024.
    """
    if beta is None:
        raise TypeError("beta must be an array [B, T, H]: got None")
    if use_qk_l2norm_in_kernel:
        q, k = unit(q, "q"), unit(k, "k")
    packing = (cu_seqlens, segment_ids, max_segments, backend)
    return attend(q, k, v, g, beta, level_scales, scale, initial_state, output_final_state, *packing)


def unit(x: Array, name: str) -> Array:
    """x over its length along the last axis, ``x / sqrt(Σ x² + 1e-6)``."""
    x = checks.floating(x, name)
    wide = x.astype(numbers_of(x.dtype).wide)
    return (wide * jax.lax.rsqrt(jnp.square(wide).sum(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def attend(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    beta: Array | None,
    level_scales: Array | None,
    scale: float | None = None,
    state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Array | None = None,
    segment_ids: Array | None = None,
    max_segments: int | None = None,
    backend: Backend = "auto",
    lengths: Array | None = None,
) -> tuple[Array, State | None]:
    """Both public functions: the delta rule where there is a beta.

    lengths: int32 ``[B]``, tokens of each row. Those behind them are padding, which the final state has not seen.
    """
    inputs = checks.check_inputs(Inputs(q, k, v, g, beta, level_scales))
    scale = checks.check_scale(scale)
    states = state is not None or output_final_state
    kernels = checks.check_backend(backend, inputs, states)
    in_torch = backend == "torch" or (backend == "auto" and chosen(inputs, states or lengths is not None))
    if segment_ids is not None:
        if states or cu_seqlens is not None:
            raise ValueError("segment_ids must stand alone: cu_seqlens is what goes with states")
        segments = checks.check_segments(segment_ids, max_segments, inputs.q)
        flat, offsets = inputs.flat(), offsets_of(segment_ids, segments)
        o = torch_call(flat, offsets, scale) if in_torch else forward(flat, scale, None, False, offsets, kernels)[0]
        lost = number_of_segments(segment_ids) > segments
        return jnp.where(lost, jnp.nan, o).astype(o.dtype).reshape(inputs.v.shape), None
    if max_segments is not None:
        raise ValueError("max_segments needs segment_ids: got segment_ids=None")
    checks.check_packing(inputs.q, cu_seqlens)
    checks.check_state(state, inputs, inputs.q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    if in_torch:
        return torch_call(inputs, cu_seqlens, scale), None
    return forward(inputs, scale, state, output_final_state, cu_seqlens, kernels, lengths)
