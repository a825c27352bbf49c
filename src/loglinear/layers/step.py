"""STEP: one token, or a few, through a recurrent mixer between its projections: three launches, state and positions in place.

The module repeats a mixer's ``forward`` for CUDA and for states for decoding, in kernels that each do several of its lines.
``takes`` says which calls it accepts. All other calls go through the plain lines, and the plain lines define the result.

Legend: B rows, T tokens, H value heads, G q/k groups, K, V widths, L levels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from loglinear.decoding_state import DecodingState
from loglinear.layers.activations import ACTIVATIONS
from loglinear.layers.norm import GatedRMSNorm
from loglinear.layers.recurrence import writes_into
from loglinear.layers.state import RecurrentMixerState
from loglinear.ops import convolution, dispatch, fused, log_linear_attention_step, log_linear_delta_rule_step
from loglinear.state import LinearState

if TYPE_CHECKING:
    from loglinear.layers.mixer import RecurrentMixer, Streams


def takes(
    mixer: RecurrentMixer, projected: Tensor | None, state: RecurrentMixerState | None, cu_seqlens: Tensor | None
) -> bool:
    """Whether ``projected`` ``[B, T, ...]`` from ``state`` goes through the kernels of a step. Never waits for the device."""
    if state is None or not writes_into(state) or cu_seqlens is not None or mixer.context_group is not None:
        return False
    field = mixer.unfused()
    if projected is None or field is not None:
        on_gpu = state.conv.is_cuda
        return on_gpu and dispatch.plain("a step", field or "projections that are not one")
    assert isinstance(mixer.norm, GatedRMSNorm)  # others are unfused
    weights = [x for x in (mixer.conv.taps, mixer.norm.weight) if x is not None]  # elsewhere when they are offloaded
    if not fused.fits(projected, state.conv[:1], *weights) or state.conv.dtype != projected.dtype:
        return False
    (batch, length, _), memory = projected.shape, state.memory
    if batch != state.batch_size or mixer.conv.width > convolution.MAX_TAPS or weights[-1].shape[0] > fused.MAX_WIDTH:
        return False
    if isinstance(memory, DecodingState):
        whole = 1 <= length <= memory.chunk_size and memory.open_k.dtype == projected.dtype
        return (
            whole and mixer.level_scale is not None and dispatch.step(memory.open_k, memory.open_v, memory.chunk_size)
        )
    if length != 1 or mixer.level_scale is not None:
        return False
    return isinstance(memory, LinearState) and fused.fits_linear(memory.state)


def convolve_and_gate(
    mixer: RecurrentMixer, streams: Streams, state: RecurrentMixerState, columns: fused.Columns
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """The convolution's outputs ``[B, T, channels]``, v if it is scaled ``[B, T, H·V]``, and g, beta and level_scales; None for
    a g or beta without columns.
    """
    conv, levels, projected, dl = mixer.conv, mixer.level_scale, streams.joined, streams.dl
    assert projected is not None
    L, offset = (None, 0.0) if levels is None else (levels.L, levels.offset)
    rates = (None, None) if columns.rate < 0 else (mixer.dt_bias, mixer.A_log)
    mixed, v, g, beta, scales = fused.step_inputs(
        projected, dl, state.conv, conv.taps, conv.bias, *rates, L, tuple(columns), offset, state.rows
    )
    mixed = ACTIVATIONS[conv.activation](streams.conv) if mixed is None else mixed  # no taps
    return mixed, v, {"g": g, "beta": beta, "level_scales": scales}


def recur(q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Any], state: RecurrentMixerState) -> Tensor:
    """o ``[B, T, H, V]`` of q, k ``[B, T, G, K]``, v ``[B, T, H, V]``; they are added to ``state``, except to its position."""
    memory = state.memory
    if isinstance(memory, LinearState):
        return fused.linear_step(q, k, v, gates["g"].contiguous(), gates["beta"], memory.state, state.rows)
    assert isinstance(memory, DecodingState)
    places: dict[str, Any] = {"state": memory, "advance": False, "state_indices": state.rows}
    if gates["beta"] is None:
        return log_linear_attention_step(q, k, v, gates["g"], gates["level_scales"], **places)
    return log_linear_delta_rule_step(q, k, v, **gates, use_qk_l2norm_in_kernel=True, **places)


def gates_too(mixer: RecurrentMixer, state: RecurrentMixerState) -> bool:
    """Whether a step that ``takes`` has accepted may go by ``recur_and_gate``: rows side by side, a gate before the norm."""
    norm, memory = mixer.norm, state.memory
    known = isinstance(norm, GatedRMSNorm) and norm.gate_first and norm.activation == "silu"
    return known and isinstance(memory, DecodingState) and state.rows is None and memory.position.is_contiguous()


def recur_and_gate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Any],
    state: RecurrentMixerState,
    gate: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """``(o + D · skip) · silu(z)`` ``[B, T, H·V]`` by the launch of ``recur``, of a scalar gate; the positions stay.

    gate: skip ``[B, T, H·V]``, D ``[H]`` and z ``[B, T, H·V]``.
    """
    return fused.gated_step(q, k, v, gates["g"], gates["level_scales"], state.memory, gate=gate).flatten(-2)


def gate_and_norm(
    mixer: RecurrentMixer,
    o: Tensor,
    gate: Tensor,
    state: RecurrentMixerState,
    skip: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The input of the output projection, ``[B, T, H·V]``. The position of every row moves on by T.

    Args:
        gate: ``[B, T, H·V]``. skip: x ``[B, T, H·V]`` and its weight D ``[H]``, added to o before the gate.
    """
    x, D = skip or (None, None)
    norm = mixer.norm
    assert isinstance(norm, GatedRMSNorm)
    return fused.step_outputs(
        *(o, x, D, gate, norm.weight, state.memory.position),
        *(norm.eps, norm.gate_first, norm.activation == "silu", state.rows),
    )
