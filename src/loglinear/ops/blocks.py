"""BLOCKS: what a span of a longer sequence does, with the earlier tokens kept apart. Plain torch around the op.

A linear recurrence superposes, and queries can read its state. A *block* is a node of the whole sequence's tree, so the levels
inside a block are the levels of a sequence that begins there. The earlier tokens lie in the slots of a Fenwick counter, and
each slot has one level for a whole block. Four verbs serve every call that goes on from a state or spreads over ranks:

* ``from_nothing``: o of the block as if nothing stood before it, and the state S that it leaves.
* ``carried``: its queries as seen from its start, and its transition A.
* ``read``: add what the queries find in the slots, ``o += λ[level] ∘ (q̃ S)``.
* ``append``: the slots after the block. They age by A, S becomes the newest, and slots of one size merge.

A state is a pair (S, log) and a query a pair (rows, weight), as in ``reference/transition.py``. The op itself makes S beside o:
K more queries behind the last token, the unit vectors at λ = 1, read it row by row. If o is known and A is a decay, S is one
product of keys and values. A decay A and its queries are sums. A matrix A and its queries come from a second call, which is
linear and has no other values. It writes the rows of the unit matrix before the first token, and the same K queries read A. In
16 bits, reads are as exact as outputs. All four verbs are differentiable.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear.ops.attention import attend
from loglinear.ops.inputs import Call, Inputs
from loglinear.state import CHUNK_SIZE


class Map(NamedTuple):
    """A block's effect, ``S -> A S + S_c``.

    A is logs ``[B, H]`` or ``[B, H, K]``, or matrices ``[B, H, K, K]``; None where nothing stands before the block. S_c is
    ``[B, H, K, V]``; None is zero.
    """

    transition: Tensor | None
    state: Tensor | None


class Slot(NamedTuple):
    """A node of the tree as a later block sees it from its start: its chunks, and ``exp(log) state``.

    state is ``[B, H, K, V]``, None for zero, and log ``[B, H]``, None for zero and wherever A is no single log.
    """

    chunks: int
    state: Tensor | None
    log: Tensor | None = None

    def value(self) -> Tensor | None:
        """``exp(log) state``."""
        return self.state if self.state is None or self.log is None else self.log.exp()[..., None, None] * self.state


class Query(NamedTuple):
    """Queries at the start of a block, ``exp(weight) rows``: rows ``[B, T, G or H, K]``, weight ``[B, T, H]`` or None."""

    rows: Tensor
    weight: Tensor | None = None


def running_sums(x: Tensor) -> Tensor:
    """Sums of x ``[B, T, ...]`` up to each token, itself included.

    Along the last dimension: along any other PyTorch's scan on a GPU takes the tokens of a head one after the other, in
    a single thread.
    """
    return x.movedim(1, -1).cumsum(-1).movedim(-1, 1)


def wide_dtype(inputs: Inputs) -> torch.dtype:
    """Dtype of sums and logs: float32, or float64 for float64 inputs."""
    return torch.promote_types(inputs.v.dtype, torch.float32)


def _unit_rows(x: Tensor) -> Tensor:
    """``[B, K, heads, K]`` of the dtype and device of x ``[B, T, heads, K]``: token i is unit vector i in every head."""
    batch, _, heads, width = x.shape
    return torch.eye(width, dtype=x.dtype, device=x.device)[:, None].expand(batch, -1, heads, -1)


def from_nothing(inputs: Inputs, with_state: bool, o: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """o ``[B, T, H, V]`` with nothing before the block, and the state ``[B, H, K, V]`` after it (None unless asked for).

    o is given where it is known already, unless A is a matrix.
    """
    if not with_state:
        return attend(Call(inputs))[0] if o is None else o, None
    if o is not None:
        return o, _written(inputs)
    length, width = inputs.q.shape[1], inputs.q.shape[3]
    both, _ = attend(Call(inputs.extended(0, width, q=torch.cat([inputs.q, _unit_rows(inputs.q)], 1))))
    o, rows = both.split([length, width], 1)
    return o, rows.transpose(1, 2)


def _written(inputs: Inputs) -> Tensor:
    """The writes of the tokens, decayed to the end of the block: one product of keys and values."""
    k, v, g, wide = inputs.k, inputs.v, inputs.g, wide_dtype(inputs)
    assert g is not None
    assert inputs.transition().span != "matrix"
    # Sums, no differences: g may be -inf.
    later = running_sums(F.pad(g[:, 1:], (*(0, 0) * (g.dim() - 2), 0, 1)).flip(1)).flip(1).exp()
    keys, values = k.to(wide), v.to(wide)
    if inputs.transition().per_channel:
        keys = keys.repeat_interleave(v.shape[2] // k.shape[2], 2) * later
    else:
        values = values * later.unsqueeze(-1)
    by_group = values.unflatten(2, (keys.shape[2], -1))
    return torch.einsum("btgk,btghv->bghkv", keys, by_group).flatten(1, 2)


def carried(inputs: Inputs) -> tuple[Query, Tensor]:
    """The queries of a block as seen from its start, and its transition A."""
    q, k, v, g, beta, _ = inputs
    assert g is not None
    span = inputs.transition().span
    if span != "matrix":
        since = running_sums(g)
        if span == "log":
            return Query(q, since), g.sum(1)
        rows = q.repeat_interleave(v.shape[2] // q.shape[2], 2)
        return Query((rows * since.exp()).to(v.dtype)), g.sum(1)
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
    _, query, transition = attend(Call(seen))[0].split([width, q.shape[1], width], 1)
    return Query(query), transition.transpose(1, 2)


def read(o: Tensor, query: Query, inputs: Inputs, slots: list[Slot], scale: float = 1.0) -> Tensor:
    """The sum of o and what the queries, times ``scale``, find in the slots; in the dtype of o, and summed in float32."""
    live = [slot for slot in slots if slot.state is not None]
    if not live:
        return o
    wide, scales = wide_dtype(inputs), inputs.level_scales
    rows, total = query.rows.transpose(1, 2), o.to(wide)
    for chunks, state, log in live:
        assert state is not None
        by_group = state.to(rows.dtype).unflatten(1, (rows.shape[1], -1)).transpose(2, 3)  # [B, R, K, H/R, V]
        found = rows @ by_group.flatten(3)
        found = found.unflatten(3, by_group.shape[3:]).permute(0, 2, 1, 3, 4).flatten(2, 3).to(wide)
        weight = query.weight
        if weight is not None:
            weight = (weight if log is None else weight + log.unsqueeze(1)).exp()
        if scales is not None:
            level = (chunks * CHUNK_SIZE).bit_length()  # 1 + log2 of its tokens
            factor = scales[..., min(level, scales.shape[3] - 1)].to(wide)
            weight = factor if weight is None else factor * weight
        if weight is None:
            total = torch.add(total, found, alpha=scale)
        else:
            total = torch.addcmul(total, found, weight.unsqueeze(3), value=scale)
    return total.to(o.dtype)


def append(slots: list[Slot], map_: Map, chunks: int, linear: bool) -> list[Slot]:
    """The slots after a block of that many chunks: the linear model has one, a tree one for each bit of its chunks."""
    slots = [*(_aged(slot, map_.transition) for slot in slots), Slot(chunks, map_.state)]
    while len(slots) > 1 and (linear or slots[-2].chunks == slots[-1].chunks):
        late, early = slots.pop(), slots.pop()
        states = [x for x in (early.value(), late.value()) if x is not None]
        slots.append(Slot(early.chunks + late.chunks, sum(states[1:], states[0]) if states else None))
    return slots


def _aged(slot: Slot, transition: Tensor | None) -> Slot:
    """The slot after one more block: one log for all of it is kept beside it, other transitions act on it."""
    if slot.state is None:
        return slot
    assert transition is not None
    if transition.dim() == 2:
        return slot._replace(log=transition if slot.log is None else slot.log + transition)
    if transition.dim() == 3:
        return slot._replace(state=transition.exp().unsqueeze(-1) * slot.state)
    wide = torch.promote_types(transition.dtype, slot.state.dtype)
    return slot._replace(state=transition.to(wide) @ slot.state.to(wide))
