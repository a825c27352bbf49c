"""RECURRENCE: the sequence mixing of all recurrent mixers, ordinary or in place.

With a state for decoding, short calls go through the step ops. These ops wait for nothing and allocate only their result.
Long and packed calls go through the ordinary op, which reads the buffers, and its final state is written into them once. Under
autograd every call is functional. With a context group the tokens are this rank's span of one sequence over all ranks of the
group. Such a call refuses every argument that belongs to a whole sequence (states, packing).

Legend: B rows, T tokens, H value heads, G q/k groups, K, V widths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loglinear.decoding_state import DecodingState
from loglinear.distributed import context_parallel_attention, context_parallel_delta_rule, previous_inputs
from loglinear.layers.conv import ShortConvolution
from loglinear.layers.packing import check_packed, locate_tokens
from loglinear.layers.state import RecurrentMixerState, copy_tensors_
from loglinear.ops import log_linear_attention_step, log_linear_delta_rule_step
from loglinear.ops.attention import attend, checked
from loglinear.ops.inputs import Inputs
from loglinear.state import LinearState, LogLinearState, check_dtype
from loglinear.transition import is_per_channel

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


def writes_into(state: RecurrentMixerState | None) -> bool:
    """Whether a call updates ``state`` in place: it is one for decoding, and nothing is recorded for a backward pass."""
    return state is not None and state.in_place and not torch.is_grad_enabled()


def convolve(
    conv: ShortConvolution,
    x: Tensor,
    state: RecurrentMixerState | None,
    cu_seqlens: Tensor | None,
    context_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """y ``[B, T, channels]`` and the next tail, of a sequence that goes on from ``state`` or from the rank before."""
    if context_group is None:
        tail, rows = (state.conv, state.rows) if state else (None, None)
        return conv(x, tail, cu_seqlens, in_place=writes_into(state), rows=rows)
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens must be None with a context group: ranks share one sequence without padding")
    x, tail = previous_inputs(x, conv.keep, context_group)
    y, next_tail = conv(torch.cat([tail, x], 1))  # not as its state: a call from the start has a kernel
    return y[:, conv.keep :], next_tail


def positions(
    x: Tensor, state: RecurrentMixerState | None, cu_seqlens: Tensor | None, context_group: ProcessGroup | None
) -> Tensor:
    """int64 ``[B, T]``: tokens of its own sequence before each token of x ``[B, T, ...]``. Waits for nothing."""
    batch, length = x.shape[:2]
    if cu_seqlens is not None:
        check_packed(x, "hidden", cu_seqlens)
        sequence, position = locate_tokens(cu_seqlens, length)
        return (position if state is None else position + state.position[sequence]).unsqueeze(0)
    position = torch.arange(length, device=x.device).expand(batch, -1)
    if context_group is not None:
        return position + context_group.rank() * length  # spans are equal
    return position if state is None else position + state.position.unsqueeze(-1)


def mix(
    inputs: dict[str, Tensor],
    level_scales: Tensor | None,
    state: RecurrentMixerState | None,
    conv_tail: Tensor,
    output_state: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    context_group: ProcessGroup | None = None,
    unit_length: bool = False,
) -> tuple[Tensor, RecurrentMixerState | None]:
    """o ``[B, T, H, V]`` and the state after the last token (None unless asked for).

    Args:
        inputs: q, k ``[B, T, G, K]``, v ``[B, T, H, V]``, g ``[B, T, H]`` or ``[B, T, H, K]``; with beta ``[B, T, H]`` it is
            the delta rule.
        level_scales: λ ``[B, T, H, L]``; None is the linear model.
        conv_tail: the convolution's next tail; where ``writes_into(state)``, ``state.conv`` has it already.
        context_group: ranks that share the sequence (``set_context_group``).
        unit_length: whether the delta rule divides q and k by their lengths first.
        The others: as in ``loglinear.layers``.
    """
    if context_group is not None:
        return _mix_over_ranks(inputs, level_scales, state, output_state, context_group, unit_length), None
    if state is not None and writes_into(state):
        o = _mix_in_place(inputs, level_scales, state, cu_seqlens, cu_seqlens_cpu, unit_length)
        return o, state if output_state else None
    memory = None if state is None else state.ordinary().memory
    assert not isinstance(memory, DecodingState)
    o, after = _ordinary(inputs, level_scales, memory, output_state, cu_seqlens, cu_seqlens_cpu, unit_length)
    return o, RecurrentMixerState(conv_tail, after) if after is not None else None


def _mix_over_ranks(
    inputs: dict[str, Any],
    level_scales: Tensor | None,
    state: RecurrentMixerState | None,
    output_state: bool,
    group: ProcessGroup,
    unit_length: bool,
) -> Tensor:
    """o of this rank's span."""
    if state is not None or output_state:
        name = "output_state must be False" if state is None else "state must be None"
        raise ValueError(f"{name} with a context group: no rank holds the whole past (of a model: use_cache=False)")
    if "beta" in inputs:
        return context_parallel_delta_rule(
            **inputs, level_scales=level_scales, use_qk_l2norm_in_kernel=unit_length, group=group
        )
    return context_parallel_attention(**inputs, level_scales=level_scales, group=group)


def _ordinary(
    inputs: dict[str, Any],
    level_scales: Tensor | None,
    memory: LogLinearState | LinearState | None,
    output_state: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    unit_length: bool,
) -> tuple[Tensor, LogLinearState | LinearState | None]:
    whole = Inputs(**{"beta": None, **inputs}, level_scales=level_scales)
    return attend(checked(whole, None, memory, output_state, cu_seqlens, cu_seqlens_cpu, "auto", unit_length))


def _mix_in_place(
    inputs: dict[str, Any],
    level_scales: Tensor | None,
    state: RecurrentMixerState,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    unit_length: bool,
) -> Tensor:
    """o of an ordinary call or a step; ``state`` takes the tokens in."""
    length, memory, rows = inputs["q"].shape[1], state.memory, state.rows
    if isinstance(memory, LinearState):
        if cu_seqlens is None and length == 1 and level_scales is None:
            return linear_step(**inputs, state=memory, unit_length=unit_length, rows=rows)
        _check_rows(rows)
        o, after = _ordinary(inputs, level_scales, memory, True, cu_seqlens, cu_seqlens_cpu, unit_length)
        assert isinstance(after, LinearState)
        copy_tensors_(memory._tensors(), after._tensors())
        return o
    assert isinstance(memory, DecodingState)
    assert level_scales is not None
    known_dtype = inputs["q"].dtype == memory.open_k.dtype  # autocast may have been switched since the state was made
    if cu_seqlens is None and 1 <= length <= memory.chunk_size and known_dtype:
        if "beta" in inputs:
            return log_linear_delta_rule_step(
                **inputs,
                level_scales=level_scales,
                state=memory,
                use_qk_l2norm_in_kernel=unit_length,
                state_indices=rows,
            )
        return log_linear_attention_step(**inputs, level_scales=level_scales, state=memory, state_indices=rows)
    _check_rows(rows)
    o, after = _ordinary(inputs, level_scales, memory.as_state(), True, cu_seqlens, cu_seqlens_cpu, unit_length)
    assert isinstance(after, LogLinearState)
    memory.take_(after)
    return o


def _check_rows(rows: Tensor | None) -> None:
    """Raise unless the batch goes on from all rows of a state."""
    if rows is not None:
        raise ValueError("state.rows must be None in a call that is no step: give a state of these rows (reorder)")


def linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: LinearState,
    beta: Tensor | None = None,
    unit_length: bool = False,
    rows: Tensor | None = None,
) -> Tensor:
    """o ``[B, 1, H, V]`` for one token of every row of the linear model, which ``state`` takes in. Waits for nothing.

    ``S ← e^g S + k vᵀ``, with the delta rule ``S ← e^g S + β k (v - kᵀ e^g S)ᵀ``; ``o = qᵀS``. A gate of each key channel
    multiplies the rows of S. unit_length: as in ``mix``. rows: int64 ``[B]``, the row of the state for each row of q.
    """
    memory, groups = state.state if rows is None else state.state[rows], q.shape[2]
    check_dtype("state.memory.state", memory.dtype, (torch.float64, torch.float32))
    with torch.autocast(q.device.type, enabled=False):  # products with the state are as precise as the state
        q, k = (x[:, 0].to(memory.dtype) for x in (q, k))
        if unit_length:
            q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        S = memory.unflatten(1, (groups, -1))  # [B, G, H/G, K, V], a view
        kept = g[:, 0].to(memory.dtype).exp().unflatten(1, (groups, -1))
        S.mul_(kept.unsqueeze(-1) if is_per_channel(g) else kept[..., None, None])
        new = v[:, 0].to(memory.dtype).unflatten(1, (groups, -1)).unsqueeze(-2)  # [B, G, H/G, 1, V]
        if beta is not None:
            known = k[:, :, None, None] @ S
            new = (new - known) * beta[:, 0].to(memory.dtype).unflatten(1, (groups, -1))[..., None, None]
        S.addcmul_(k[:, :, None, :, None], new)
        o = (q[:, :, None, None] @ S).squeeze(-2).flatten(1, 2)
    if rows is None:
        state.position += 1
    else:
        state.state.index_copy_(0, rows, memory)
        state.position[rows] += 1
    return o.unsqueeze(1).to(v.dtype)
