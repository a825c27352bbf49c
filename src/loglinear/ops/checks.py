"""Argument checks of the public ops: every error names the argument, what came and what is needed.

Checks read shapes, dtypes and devices; values only where that costs no device synchronisation (CPU tensors).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from loglinear.ops.inputs import Backend, Inputs
from loglinear.state import (
    FLOATS,
    LinearState,
    LogLinearState,
    check_chunk_size,
    check_dtype,
    has_values,
    values_are_known,
)

_known: dict[tuple[object, ...], set[Backend]] = {}  # kinds of calls that have passed


def _shape(name: str, tensor: Tensor, wanted: str, axes: Sequence[int | None]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {wanted}: got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be a floating-point tensor (float64, float32, bfloat16, float16): got {tensor.dtype}"
        )
    shape = tuple(tensor.shape)
    if len(shape) != len(axes) or any(want not in (None, have) for have, want in zip(shape, axes)):
        need = ", ".join("?" if axis is None else str(axis) for axis in axes)
        raise ValueError(f"{name} must have shape {wanted} = [{need}]: got {list(shape)}")


def check_inputs(inputs: Inputs) -> set[Backend] | None:
    """Ranks, sizes, dtypes, devices and, on the CPU, the sign of g. Returns what is known of such calls, see ``Call.taken``."""
    if not isinstance(inputs.q, Tensor) or not values_are_known(inputs.q):
        check_kinds(inputs)
        return None
    taken = once(kinds_of(inputs), lambda: check_kinds(inputs))
    check_sign(inputs.g)
    return taken


def kinds_of(tensors: Iterable[Any]) -> tuple[object, ...]:
    """All that ``check_kinds`` looks at: the shape, dtype and device of each tensor, and the types of what is none."""
    return tuple([(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else type(x) for x in tensors])


def once(kind: tuple[object, ...], check: Callable[[], None]) -> set[Backend]:
    """``check()``, unless it has passed for calls of this kind: a check of metadata costs more than a short kernel.

    Returns a set that belongs to this kind, empty at first.
    """
    found = _known.get(kind)
    if found is None:
        check()
        if len(_known) > 4096:
            _known.clear()
        found = _known[kind] = set()
    return found


def check_sign(g: Tensor | None) -> None:
    """That no gate on the CPU is a growth."""
    if g is not None and g.is_cpu and bool((unwrapped(g).detach() > 0).any()):
        raise ValueError(f"g must be a log decay, at most 0: got a maximum of {unwrapped(g).max().item():g}")


def transforming() -> bool:
    """Whether eager code is inside of ``torch.func.vmap``, ``grad``, ``jvp`` or another; few of our functions can be."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def unwrapped(x: Tensor) -> Tensor:
    """The tensor inside all wrappers of ``torch.func``: the numbers of every vmapped row."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def check_kinds(inputs: Inputs) -> None:
    """Ranks, sizes, dtypes and devices."""
    q, k, v, g, beta, level_scales = inputs
    _shape("q", q, "[B, T, G, K]", (None,) * 4)
    batch, length, groups, width = q.shape
    _shape("k", k, "[B, T, G, K]", (batch, length, groups, width))
    _shape("v", v, "[B, T, H, V]", (batch, length, None, None))
    heads = v.shape[2]
    if groups < 1 or heads < 1 or heads % groups:
        raise ValueError(f"v must have a multiple of q's heads: got H={heads} value heads for G={groups} q/k heads")
    if width < 1 or v.shape[3] < 1:
        raise ValueError(f"q, k and v must have widths of at least 1: got K={width}, V={v.shape[3]}")
    if inputs.g is not None:
        _shape("g", inputs.g, *_gate_shape(inputs, (batch, length, heads), "B, T, H"))
    if inputs.beta is not None:
        _shape("beta", inputs.beta, "[B, T, H]", (batch, length, heads))
    if level_scales is not None:
        _shape("level_scales", level_scales, "[B, T, H, L]", (batch, length, heads, None))
        if level_scales.shape[3] < 1:
            raise ValueError("level_scales must have at least one level: got L=0")
    for name, tensor in {"q": q, "k": k, "v": v, "g": g, "beta": beta, "level_scales": level_scales}.items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q ({q.device}): got {tensor.device}")
    for name, tensor in {"k": k, "v": v}.items():
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q ({q.dtype}): got {tensor.dtype}")


def _gate_shape(inputs: Inputs, sizes: tuple[int, ...], axes: str) -> tuple[str, tuple[int, ...]]:
    """The axes of a gate, in words and in numbers: with one value for each head, or for each key channel of it."""
    if inputs.transition().per_channel:
        return f"[{axes}, K]", (*sizes, inputs.q.shape[3])
    return f"[{axes}] (or [{axes}, K])", sizes


def check_scale(scale: float | None) -> float:
    """``None`` means 1."""
    if scale is None:
        return 1.0
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(f"scale must be a number or None: got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite: got {scale}")
    return float(scale)


def check_packing(q: Tensor, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None, name_of_q: str = "q") -> None:
    """Types, shapes and devices of the offsets; ``sequence_lengths`` checks their values."""
    if cu_seqlens is None:
        if cu_seqlens_cpu is not None:
            raise ValueError("cu_seqlens_cpu needs cu_seqlens: got cu_seqlens=None")
        return
    for name, tensor in {"cu_seqlens": cu_seqlens, "cu_seqlens_cpu": cu_seqlens_cpu}.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64):
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be an int32 or int64 tensor [n + 1]: got {got}")
        if tensor.dim() != 1 or tensor.shape[0] < 1:
            raise ValueError(f"{name} must have shape [n + 1]: got {list(tensor.shape)}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens must be on the device of {name_of_q} ({q.device}): got {cu_seqlens.device}")
    if cu_seqlens_cpu is not None and (cu_seqlens_cpu.device.type != "cpu" or cu_seqlens_cpu.shape != cu_seqlens.shape):
        raise ValueError(
            f"cu_seqlens_cpu must be a CPU copy of cu_seqlens, of shape {list(cu_seqlens.shape)}: "
            f"got shape {list(cu_seqlens_cpu.shape)} on {cu_seqlens_cpu.device}"
        )
    if q.shape[0] != 1:
        raise ValueError(f"{name_of_q} must have a batch of 1 when cu_seqlens packs sequences: got B={q.shape[0]}")


def sequence_lengths(q: Tensor, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None) -> tuple[int, ...]:
    """New tokens of each sequence, on the host: rows of the batch, or the packed sequences of its only row.

    Reads ``cu_seqlens_cpu`` where there is one; otherwise waits for the device that holds ``cu_seqlens``.
    """
    batch, length = q.shape[:2]
    if cu_seqlens is None:
        return (length,) * batch
    offsets = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    if not has_values(offsets):
        raise ValueError("cu_seqlens must have values where lengths are needed: got a meta or fake tensor")
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] != length:
        raise ValueError(f"cu_seqlens must run from 0 to T={length}: got {ends[0]} to {ends[-1]}")
    lengths = tuple(right - left for left, right in pairwise(ends))
    if any(size < 0 for size in lengths):
        raise ValueError(f"cu_seqlens must not decrease: got {ends}")
    return lengths


def check_state(state: LogLinearState | LinearState | None, inputs: Inputs, rows: int) -> None:
    """The state's kind, shapes and device against the inputs; ``rows`` is the number of sequences."""
    if state is None:
        return
    q, v, transition = inputs.q, inputs.v, inputs.transition()
    known = isinstance(state, (LinearState, LogLinearState)) and state.device == q.device
    if known and not (has_values(state.position) and has_values(q)):
        raise ValueError(
            "initial_state must have values: got meta or fake tensors, and a result depends on its positions"
        )
    wanted: type = LinearState if inputs.linear() else LogLinearState
    if not isinstance(state, wanted):
        why = "without" if inputs.linear() else "with"
        raise TypeError(f"initial_state must be a {wanted.__name__} {why} level_scales: got {type(state).__name__}")
    groups, width = q.shape[2:]
    heads, value_width = v.shape[2:]
    check_dtype("initial_state.position", state.position.dtype, (torch.int64,))
    if state.position.dim() != 1:
        raise ValueError(f"initial_state.position must have shape [B]: got {list(state.position.shape)}")
    if state.batch_size != rows:
        raise ValueError(f"initial_state must have one row per sequence ({rows}): got {state.batch_size}")
    if state.device != q.device:
        raise ValueError(f"initial_state must be on the device of q ({q.device}): got {state.device}")
    for name, value in vars(state).items():
        if isinstance(value, Tensor) and value.device != q.device:
            raise ValueError(f"initial_state.{name} must be on the device of q ({q.device}): got {value.device}")
    if isinstance(state, LinearState):
        _shape("initial_state.state", state.state, "[B, H, K, V]", (rows, heads, width, value_width))
        return
    size = state.chunk_size
    check_chunk_size("initial_state.chunk_size", size)
    _shape("initial_state.entries", state.entries, "[B, H, M, K, V]", (rows, heads, None, width, value_width))
    slots = int(state.position.max() // size).bit_length() if rows and state.device.type == "cpu" else 0
    if state.entries.shape[2] < slots:
        raise ValueError(
            f"initial_state.entries must have M >= {slots} slots for position {int(state.position.max())}: "
            f"got M={state.entries.shape[2]}"
        )
    _shape("initial_state.decay", state.decay, "[B, H, M]", (rows, heads, state.entries.shape[2]))
    _shape("initial_state.open_k", state.open_k, "[B, G, C, K]", (rows, groups, size, width))
    _shape("initial_state.open_v", state.open_v, "[B, H, C, V]", (rows, heads, size, value_width))
    made_by = state.transition
    if made_by != transition:
        raise ValueError(
            f"initial_state must come from the same op and kind of gate, {transition.name}: got a state of the {made_by.name}"
        )
    _shape("initial_state.open_g", state.open_g, *_gate_shape(inputs, (rows, heads, size), "B, H, C"))
    if state.open_beta is not None:
        _shape("initial_state.open_beta", state.open_beta, "[B, H, C]", (rows, heads, size))
