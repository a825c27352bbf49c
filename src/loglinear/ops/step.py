"""The public steps: one token, or a few, against a ``DecodingState`` that is updated in place.

The module only checks and dispatches. On CUDA a call is one launch (``kernels/decoding``; three if entries are carried) and one
addition to the positions. It waits for nothing, and a CUDA graph may capture it. Elsewhere a call is
``reference/step.py``. There is no autograd.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from loglinear import kernels
from loglinear.decoding_state import DecodingState, tensor_kinds
from loglinear.ops import checks, dispatch
from loglinear.ops.attention import outside_autocast, unit
from loglinear.ops.dispatch import Backend
from loglinear.ops.inputs import Inputs
from loglinear.ops.transforms import vmapped
from loglinear.reference.step import step
from loglinear.state import check_chunk_size, check_dtype, has_values


def log_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    level_scales: Tensor,
    state: DecodingState,
    scale: float | None = None,
    advance: bool = True,
    backend: Backend = "auto",
    state_indices: Tensor | None = None,
) -> Tensor:
    """The next T tokens of each row of ``state``, T small: what ``log_linear_attention`` gives when it goes on from there.

    Args:
        q, k: ``[B, T, G, K]``, 1 <= T <= C, in the dtype of the state. v: ``[B, T, H, V]``.
        g: ``[B, T, H]`` or ``[B, T, H, K]``, as the state was made for; None is no decay, for a state of the first.
        level_scales: λ ``[B, T, H, L]``.
        state: one row per row of the batch, each at its own position; takes in the tokens, in place. A row must not go beyond
            ``state.max_context``: on the CPU that raises. On CUDA the caller must see to it, since a check would wait for the
            device. Past it entries are lost and outputs are wrong.
        scale: factor of q; None means 1.
        advance: whether to add T to ``state.position``. With False the caller does it once, after all the layers whose states
            share one tensor of positions; until then every further call would take the same places.
        backend: as in ``log_linear_attention``.
        state_indices: int64 ``[B]``, all different: the row of ``state`` for each row of q. Rows of the state may then lie any
            distance apart, each in one piece, and may be more than B. None: row b of q goes on from row b of the state.

    Returns:
        o ``[B, T, H, V]`` in the dtype of v. No gradients.

    Raises:
        TypeError, ValueError: an argument does not fit, or needs gradients; the message names it.

    Source: docs/algorithm.md, section 5; Guo et al. 2025, section 3.1.
    """
    inputs = Inputs(q, k, v, g, None, level_scales)  # type: ignore[arg-type]
    return _step(inputs, state, scale, False, advance, backend, state_indices)


def log_linear_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    level_scales: Tensor,
    state: DecodingState,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    advance: bool = True,
    backend: Backend = "auto",
    state_indices: Tensor | None = None,
) -> Tensor:
    """The same for the delta rule: what ``log_linear_delta_rule`` gives when it goes on from ``state``.

    Args:
        beta: β ``[B, T, H]``. use_qk_l2norm_in_kernel: divide q and k by their lengths first, ``x / sqrt(Σ x² + 1e-6)``.
        The other arguments, returns, raises: as ``log_linear_attention_step``.
    """
    if beta is None:
        raise TypeError("beta must be a tensor [B, T, H]: got None")
    inputs = Inputs(q, k, v, g, beta, level_scales)
    return _step(inputs, state, scale, use_qk_l2norm_in_kernel, advance, backend, state_indices)


def _step(
    inputs: Inputs,
    state: DecodingState,
    scale: float | None,
    normalize: bool,
    advance: bool,
    backend: Backend,
    state_indices: Tensor | None,
) -> Tensor:
    if torch.compiler.is_compiling():  # no graph writes into the state
        return torch.compiler.disable(_step)(inputs, state, scale, normalize, advance, backend, state_indices)
    dispatch.check_backend(backend)
    (q, k, v), without_autocast = outside_autocast(*inputs[:3])
    inputs = inputs._replace(q=q, k=k, v=v)
    check_step(inputs, state, state_indices)
    assert inputs.level_scales is not None
    given = q, k, v, inputs.g, inputs.level_scales, state, inputs.beta, checks.check_scale(scale), state_indices
    with without_autocast, torch.no_grad() if torch.is_grad_enabled() else nullcontext():  # entering takes 3 µs
        if dispatch.step(q, v, state.chunk_size, backend):
            o = kernels.decoding.step(*given, normalize)
        else:
            if normalize:
                given = unit(q, "q"), unit(k, "k"), *given[2:]
            o = step(*given)
        if advance and state_indices is None:
            state.position += v.shape[1]
        elif advance:
            state.position[state_indices] += v.shape[1]
    return o


def check_step(inputs: Inputs, state: DecodingState, state_indices: Tensor | None = None) -> None:
    """Everything about the inputs and the state that needs no wait for the device; on the CPU also the positions."""
    q = inputs.q
    if not isinstance(state, DecodingState):
        raise TypeError(f"state must be a DecodingState: got {type(state).__name__}")
    if checks.transforming() and vmapped(*inputs, *state._tensors()):
        raise ValueError("q must not come from torch.vmap, a step writes into its state: give rows of a batch")
    if isinstance(q, Tensor) and not (has_values(q) and has_values(state.position)):
        raise ValueError("q and state must have values: got meta or fake tensors, and a step depends on its positions")
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        name = next(n for n, x in inputs._asdict().items() if isinstance(x, Tensor) and x.requires_grad)
        raise ValueError(
            f"{name} must not require gradients, a step has none: call it under torch.no_grad, or call the ordinary op"
        )
    held = (state.position, state.entries, state.decay, state.open_k, state.open_v, state.open_g, state.open_solve)
    strides = [None if x is None else x.stride() for x in held]
    kind = state.chunk_size, *checks.kinds_of((*inputs, *held, state_indices)), *strides
    checks.once(kind, lambda: check_kinds(inputs, state, state_indices))
    if q.device.type != "cpu":
        return
    checks.check_sign(inputs.g)
    if q.shape[0]:
        positions = state.position if state_indices is None else state.position[state_indices]
        last = int(positions.max()) + q.shape[1]
        if last > state.max_context:
            raise ValueError(
                f"state must hold {last} tokens (grow gives it more slots): got max_context={state.max_context}"
            )


def check_kinds(inputs: Inputs, state: DecodingState, state_indices: Tensor | None) -> None:
    """Shapes, dtypes, devices and strides of inputs and state; the length of the call."""
    if inputs.linear():
        raise TypeError("level_scales must be a tensor [B, T, H, L]: got None; without a tree there is nothing to step")
    checks.check_kinds(inputs)
    q, v, transition = inputs.q, inputs.v, inputs.transition()
    batch, length, groups, width = q.shape
    heads, value_width = v.shape[2:]
    size = state.chunk_size
    check_chunk_size("state.chunk_size", size)
    if not 1 <= length <= size:
        raise ValueError(
            f"q must have 1 to {size} tokens in a step: got T={length}; for more, call {transition.op} with "
            "initial_state=state.to_state()"
        )
    if state.transition != transition:
        raise ValueError(f"state must be made for the same rule: got a state of the {state.transition.name}")
    slots = state.entries.shape[2] if state.entries.dim() == 5 else 0
    rows = batch if state_indices is None else state.batch_size
    kinds = tensor_kinds(rows, heads, groups, width, value_width, slots, size, q.dtype, transition)
    state.check("state", kinds, q.device, pages=state_indices is not None)
    if state_indices is not None:
        check_dtype("state_indices", state_indices.dtype, (torch.int64,))
        if tuple(state_indices.shape) != (batch,) or state_indices.device != q.device:
            raise ValueError(
                f"state_indices must have shape [{batch}] on {q.device}: got {list(state_indices.shape)} on "
                f"{state_indices.device}"
            )
