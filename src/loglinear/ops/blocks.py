"""BLOCKS: the op on spans of a longer sequence, with the earlier tokens kept apart. Plain torch around the op.

The module knows no kernel. A linear recurrence superposes, and queries can read its state. A *block* is a node of the whole
sequence's tree, so the levels inside a block are the levels of a sequence that begins there:

1. The op runs on the block as if nothing stood before it. K more queries behind its last token, the unit vectors, at λ = 1,
   read the final state S of the block, row by row.
2. The effect of the block on an earlier state is a log decay (scalar gate) or a matrix A (delta rule). To find A, the call
   writes the K rows of the unit matrix before the first token and reads them after the last. The same call, which is linear
   and has no other values, carries the queries to the start of the block.
3. The earlier tokens lie in the slots of a Fenwick counter, and each slot has one level for a whole block:
   ``o += λ[level] ∘ (q̃ S)``, q̃ the queries at the start of the block.

All three steps are differentiable. In 16 bits S and A are as exact as outputs are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear.ops.forward import forward
from loglinear.ops.inputs import Inputs
from loglinear.state import CHUNK_SIZE


class Map(NamedTuple):
    """A block's effect: ``S -> A S + S_c``. A is a log decay ``[B, H]`` or matrices ``[B, H, K, K]``, S_c ``[B, H, K, V]``."""

    transition: Any
    state: Any


class Slot(NamedTuple):
    """A node of the tree as a later block sees it from its start: its chunks, and S ``[B, H, K, V]``."""

    chunks: int
    state: Tensor


def running_sums(x: Tensor) -> Tensor:
    """Sums of x ``[B, T, ...]`` up to each token, itself included.

    Along the last dimension: along any other PyTorch's scan on a GPU takes the tokens of a head one after the other, in
    a single thread.
    """
    return x.movedim(1, -1).cumsum(-1).movedim(-1, 1)


def _unit_rows(x: Tensor) -> Tensor:
    """``[B, K, heads, K]`` of the dtype and device of x ``[B, T, heads, K]``: token i is unit vector i in every head."""
    batch, _, heads, width = x.shape
    return torch.eye(width, dtype=x.dtype, device=x.device)[:, None].expand(batch, -1, heads, -1)


def from_nothing(inputs: Inputs, with_state: bool) -> tuple[Tensor, Tensor | None]:
    """o ``[B, T, H, V]`` with nothing before the block, and the state ``[B, H, K, V]`` after it (None unless asked for)."""
    if not with_state:
        return forward(inputs), None
    length, width = inputs.q.shape[1], inputs.q.shape[3]
    o = forward(inputs.extended(0, width, q=torch.cat([inputs.q, _unit_rows(inputs.q)], 1)))
    o, rows = o.split([length, width], 1)
    return o, rows.transpose(1, 2)


def carried(inputs: Inputs, needed: bool) -> tuple[Tensor, Tensor | None]:
    """The queries as seen from the start of the block, and its transition. A block with nothing before it needs neither.

    By ``transition.span``: "log", log weights ``[B, T, H]`` of the queries and a log decay ``[B, H]``; "logs", queries
    ``[B, T, H, K]`` and log decays ``[B, H, K]``; "matrix", queries ``[B, T, H, K]`` and matrices ``[B, H, K, K]``.
    """
    q, k, v, g, beta, _ = inputs
    wide = torch.promote_types(v.dtype, torch.float32)
    assert g is not None
    if not needed:
        return q, None
    span, since = inputs.transition().span, running_sums(g.to(wide))
    if span == "log":
        return since, since[:, -1]
    if span == "logs":
        rows = q.repeat_interleave(v.shape[2] // q.shape[2], 2)
        return (rows * since.exp()).to(v.dtype), since[:, -1]
    assert beta is not None
    width, heads, rows = q.shape[3], v.shape[2], _unit_rows(q)
    writes = _unit_rows(q[:, :, :1]).expand(-1, -1, heads, -1)
    seen = inputs._replace(level_scales=None).extended(
        width,
        width,
        q=torch.cat([torch.zeros_like(rows), q, rows], 1),
        k=torch.cat([rows, k, torch.zeros_like(rows)], 1),
        v=F.pad(writes, (0, 0, 0, 0, 0, q.shape[1] + width)),
        beta=F.pad(F.pad(beta, (0, 0, width, 0), value=1.0), (0, 0, 0, width)),
    )
    _, query, transition = forward(seen).split([width, q.shape[1], width], 1)
    return query, transition.transpose(1, 2)


def act(transition: Tensor, state: Tensor) -> Tensor:
    """A S, for logs ``[B, H]`` or ``[B, H, K]`` or matrices ``[B, H, K, K]``, in the wider of both dtypes."""
    if transition.dim() < 4:
        logs = transition.unsqueeze(-1) if transition.dim() == 2 else transition
        return logs.exp().unsqueeze(-1) * state
    wide = torch.promote_types(transition.dtype, state.dtype)
    return transition.to(wide) @ state.to(wide)


def append(slots: list[Slot], map_: Map, chunks: int, linear: bool) -> list[Slot]:
    """The slots after a block of that many chunks: the linear model has one, a tree one for each bit of its chunks."""
    slots = [*(Slot(slot.chunks, act(map_.transition, slot.state)) for slot in slots), Slot(chunks, map_.state)]
    while len(slots) > 1 and (linear or slots[-2].chunks == slots[-1].chunks):
        late, early = slots.pop(), slots.pop()
        slots.append(Slot(early.chunks + late.chunks, early.state + late.state))
    return slots


def read(o: Tensor, query: Tensor, inputs: Inputs, slots: list[Slot]) -> Tensor:
    """The sum of o and the reads of the queries from the slots; ``query`` is the first result of ``carried``."""
    for slot in slots:
        state = slot.state.to(o.dtype)
        if query.dim() == 3:
            groups, heads = inputs.q.shape[2], o.shape[2]
            by_group = state.unflatten(1, (groups, heads // groups)).transpose(2, 3).flatten(3)  # [B, G, K, H/G V]
            found = inputs.q.transpose(1, 2) @ by_group
            found = found.unflatten(3, (heads // groups, -1)).permute(0, 2, 1, 3, 4).flatten(2, 3)
            weight = query.exp()
        else:
            found, weight = (query.transpose(1, 2) @ state).transpose(1, 2), None
        if inputs.level_scales is not None:
            level = (slot.chunks * CHUNK_SIZE).bit_length()  # 1 + log2 of its tokens
            scales = inputs.level_scales[..., min(level, inputs.level_scales.shape[3] - 1)]
            weight = scales if weight is None else scales * weight
        o = o + found if weight is None else torch.addcmul(o, found, weight.to(o.dtype).unsqueeze(3))
    return o
