"""Argument checks of the public functions: every error names the argument, what came and what is needed.

Shapes and dtypes are always checked; values where they are known, which is outside of ``jax.jit`` and its kin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from loglinear.jax.inputs import Inputs, known
from loglinear.jax.products import numbers_of
from loglinear.jax.state import LinearState, LogLinearState, State, slots_for

FLOATS = ("float64", "float32", "bfloat16", "float16")


def floating(x: Any, name: str, wanted: str = "") -> Array:
    """x, or a TypeError that names it, and the axes ``wanted`` if there are some."""
    if not isinstance(x, (jax.Array, np.ndarray)):
        need = f"an array {wanted}" if wanted else "a floating-point array"
        raise TypeError(f"{name} must be {need}: got {type(x).__name__}")
    if x.dtype.name not in FLOATS:
        raise TypeError(f"{name} must be a floating-point array ({', '.join(FLOATS)}): got {x.dtype.name}")
    return jnp.asarray(x)


def _shape(name: str, x: Any, wanted: str, axes: Sequence[int | None]) -> Array:
    x = floating(x, name, wanted)
    if x.ndim != len(axes) or any(want not in (None, have) for have, want in zip(x.shape, axes)):
        need = ", ".join("?" if axis is None else str(axis) for axis in axes)
        raise ValueError(f"{name} must have shape {wanted} = [{need}]: got {list(x.shape)}")
    return x


def check_inputs(inputs: Inputs) -> Inputs:
    """The inputs as arrays, with a gate, once their ranks, sizes, dtypes and the sign of g are right."""
    q = _shape("q", inputs.q, "[B, T, G, K]", (None,) * 4)
    batch, length, groups, width = q.shape
    k = _shape("k", inputs.k, "[B, T, G, K]", (batch, length, groups, width))
    v = _shape("v", inputs.v, "[B, T, H, V]", (batch, length, None, None))
    heads = v.shape[2]
    if groups < 1 or heads < 1 or heads % groups:
        raise ValueError(f"v must have a multiple of q's heads: got H={heads} value heads for G={groups} q/k heads")
    if width < 1 or v.shape[3] < 1:
        raise ValueError(f"q, k and v must have widths of at least 1: got K={width}, V={v.shape[3]}")
    g, beta, scales = inputs.g, inputs.beta, inputs.level_scales
    if g is None:
        g = jnp.zeros((batch, length, heads), numbers_of(v.dtype).wide)
    else:
        g = _shape("g", g, *gate_shape(getattr(g, "ndim", 3) == 4, (batch, length, heads), "B, T, H", width))
    if beta is not None:
        beta = _shape("beta", beta, "[B, T, H]", (batch, length, heads))
    if scales is not None:
        scales = _shape("level_scales", scales, "[B, T, H, L]", (batch, length, heads, None))
        if scales.shape[3] < 1:
            raise ValueError("level_scales must have at least one level: got L=0")
    for name, x in {"k": k, "v": v}.items():
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q ({q.dtype.name}): got {x.dtype.name}")
    if known(g) and g.size and bool((np.asarray(g) > 0).any()):
        raise ValueError(f"g must be a log decay, at most 0: got a maximum of {float(g.max()):g}")
    return Inputs(q, k, v, g, beta, scales)


def gate_shape(per_channel: bool, sizes: tuple[int, ...], axes: str, width: int) -> tuple[str, tuple[int, ...]]:
    """The axes of a gate, in words and in numbers."""
    return (f"[{axes}, K]", (*sizes, width)) if per_channel else (f"[{axes}] (or [{axes}, K])", sizes)


def check_scale(scale: float | None) -> float:
    """``None`` means 1."""
    if scale is None:
        return 1.0
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(f"scale must be a number or None: got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite: got {scale}")
    return float(scale)


def check_backend(backend: str, inputs: Inputs, states: bool) -> bool:
    """Whether the Pallas kernel was asked for, which must take the call. states: whether one is given or asked for."""
    if backend not in ("auto", "xla", "pallas", "torch"):
        raise ValueError(f"backend must be 'auto', 'xla', 'pallas' or 'torch': got {backend!r}")
    if backend == "torch" and states:
        raise ValueError("backend must not be 'torch' for a call with states: those are of 'xla' and 'pallas'")
    if backend != "pallas":
        return False
    reasons = {
        f"the {inputs.transition}": inputs.transition != "scalar gate",
        "level_scales=None": inputs.level_scales is None,
        f"{inputs.q.dtype.name} inputs": inputs.q.dtype.name not in ("float32", "bfloat16"),
    }
    for reason, there in reasons.items():
        if there:
            raise ValueError(f"backend must not be 'pallas' for {reason}: its kernel is of the scalar gate with λ")
    return True


def check_packing(q: Array, cu_seqlens: Any) -> None:
    """The offsets' type, shape and, where known, values."""
    if cu_seqlens is None:
        return
    _integers("cu_seqlens", cu_seqlens, "[n + 1]")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape [n + 1]: got {list(cu_seqlens.shape)}")
    if q.shape[0] != 1:
        raise ValueError(f"q must have a batch of 1 when cu_seqlens packs sequences: got B={q.shape[0]}")
    if not known(cu_seqlens):
        return
    ends, length = np.asarray(cu_seqlens).tolist(), q.shape[1]
    if ends[0] != 0 or ends[-1] != length:
        raise ValueError(f"cu_seqlens must run from 0 to T={length}: got {ends[0]} to {ends[-1]}")
    if any(right < left for left, right in pairwise(ends)):
        raise ValueError(f"cu_seqlens must not decrease: got {ends}")


def check_segments(segment_ids: Any, most: int | None, q: Array) -> int:
    """The number of documents to plan for."""
    _integers("segment_ids", segment_ids, "[B, T]")
    if segment_ids.shape != q.shape[:2]:
        raise ValueError(f"segment_ids must have shape [B, T] = {list(q.shape[:2])}: got {list(segment_ids.shape)}")
    if most is None and not known(segment_ids):
        raise ValueError("max_segments must be given where segment_ids is traced, as in jit: got None")
    if most is not None and (not isinstance(most, int) or most < 1):
        raise ValueError(f"max_segments must be an integer of at least 1: got {most!r}")
    if not known(segment_ids):
        assert most is not None
        return most
    ids = np.asarray(segment_ids)
    found = int((ids[:, 1:] != ids[:, :-1]).sum()) + len(ids)
    if most is not None and found > most:
        raise ValueError(f"max_segments must be at least {found}, the documents in segment_ids: got {most}")
    return found if most is None else most


def _integers(name: str, x: Any, wanted: str) -> None:
    if not isinstance(x, (jax.Array, np.ndarray)) or x.dtype.name not in ("int32", "int64"):
        got = x.dtype.name if hasattr(x, "dtype") else type(x).__name__
        raise TypeError(f"{name} must be an int32 or int64 array {wanted}: got {got}")


def check_state(state: State | None, inputs: Inputs, rows: int) -> None:
    """The state's kind and shapes against the inputs; ``rows`` is the number of sequences."""
    if state is None:
        return
    linear = inputs.level_scales is None
    wanted: type = LinearState if linear else LogLinearState
    if not isinstance(state, wanted):
        why = "without" if linear else "with"
        raise TypeError(f"initial_state must be a {wanted.__name__} {why} level_scales: got {type(state).__name__}")
    (groups, width), (heads, value_width) = inputs.q.shape[2:], inputs.v.shape[2:]
    _integers("initial_state.position", state.position, "[B]")
    if state.position.ndim != 1:
        raise ValueError(f"initial_state.position must have shape [B]: got {list(state.position.shape)}")
    if state.position.shape[0] != rows:
        raise ValueError(f"initial_state must have one row per sequence ({rows}): got {state.position.shape[0]}")
    if isinstance(state, LinearState):
        _shape("initial_state.state", state.state, "[B, H, K, V]", (rows, heads, width, value_width))
        return
    size = state.chunk_size
    if size < 1 or size & (size - 1):
        raise ValueError(f"initial_state.chunk_size must be a power of two: got {size}")
    _shape("initial_state.entries", state.entries, "[B, H, M, K, V]", (rows, heads, None, width, value_width))
    slots = state.entries.shape[2]
    if known(state.position) and rows and slots < slots_for(int(state.position.max()), size):
        last = int(state.position.max())
        raise ValueError(
            f"initial_state.entries must have M >= {slots_for(last, size)} slots for position {last}: got M={slots}"
        )
    _shape("initial_state.decay", state.decay, "[B, H, M]", (rows, heads, slots))
    _shape("initial_state.open_k", state.open_k, "[B, G, C, K]", (rows, groups, size, width))
    _shape("initial_state.open_v", state.open_v, "[B, H, C, V]", (rows, heads, size, value_width))
    made_by = inputs._replace(g=state.open_g, beta=state.open_beta).transition
    if made_by != inputs.transition:
        raise ValueError(
            f"initial_state must come from the same op and kind of gate, {inputs.transition}: got a state of the {made_by}"
        )
    gate = gate_shape(inputs.per_channel, (rows, heads, size), "B, H, C", width)
    _shape("initial_state.open_g", state.open_g, *gate)
    if state.open_beta is not None:
        _shape("initial_state.open_beta", state.open_beta, "[B, H, C]", (rows, heads, size))
