"""CONTEXT: the ops on one sequence whose tokens lie on several ranks, as plain torch around the ops and one all-gather.

Special about this file: it knows no kernel. A linear recurrence superposes, and its state can be read by queries. A rank cuts
its span into *blocks*, nodes of the whole sequence's tree, so that all levels in one are those of a sequence that begins there:

1. the op runs on each block as if nothing stood before it. K more queries behind its last token, the unit vectors, at λ = 1,
   read the state S that the block leaves, row by row;
2. what the block does to an earlier state is a log decay (scalar gate), or a matrix A (delta rule): that is what K writes of
   the unit matrix before the first token become. The same call, linear and with no other values, carries the queries to the
   start of the block;
3. the maps (A, S) of all blocks are gathered, and each rank folds those before its own into the slots of a Fenwick counter;
4. a slot is at one level for a whole block: ``o += λ[level] ∘ (q̃ S)``, q̃ the queries at the start of the block.

A span of 2^n chunks is one block. Nothing waits for another rank but step 4. Source: Guo et al. 2025, section 3; the exchange
is worked out here (docs/context_parallel.md).

Legend: B batch, T tokens of this rank, G q/k groups, H value heads, K, V widths, L levels, R ranks.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from loglinear.distributed.exchange import exchange, outside_graphs
from loglinear.fenwick import aligned_blocks
from loglinear.ops import checks, log_linear_attention, log_linear_delta_rule
from loglinear.ops.attention import unit
from loglinear.state import CHUNK_SIZE


def context_span(length: int, group: dist.ProcessGroup) -> slice:
    """The tokens of this rank in a sequence of ``length``: equal spans of whole chunks, in the order of the ranks.

    Raises ValueError if there are none.
    """
    unit_length = group.size() * CHUNK_SIZE
    if length < 1 or length % unit_length:
        raise ValueError(
            f"length must be a multiple of {unit_length} ({group.size()} ranks, chunks of {CHUNK_SIZE} tokens): got {length}"
        )
    own = length // group.size()
    return slice(group.rank() * own, (group.rank() + 1) * own)


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    level_scales: Tensor | None,
    scale: float | None = None,
    *,
    group: dist.ProcessGroup,
) -> Tensor:
    """``log_linear_attention`` of one sequence over the ranks of ``group``; every rank gives its span and gets its part of o.

    Args:
        q, k: ``[B, T, G, K]``. v: ``[B, T, H, V]``. g: ``[B, T, H]`` or None. level_scales: λ ``[B, T, H, L]`` or None for the
            linear model. scale: factor of q. All as in the op, T the tokens of this rank; L is the whole sequence's.
        group: ranks in the order of their spans.

    Returns:
        o ``[B, T, H, V]``, with gradients to the inputs of all ranks. Every rank must go backward through its o.

    Raises:
        TypeError, ValueError: as the op; T is not a multiple of ``CHUNK_SIZE``, or (on CUDA a device assertion) differs
        between ranks.
    """
    return outside_graphs(_attention)(q, k, v, g, None, level_scales, scale, group)


def context_parallel_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    level_scales: Tensor | None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    group: dist.ProcessGroup,
) -> Tensor:
    """``log_linear_delta_rule`` of one sequence over the ranks of ``group``, as ``context_parallel_attention``.

    On all ranks but the first a second, linear call of the op (with values of width K) makes the queries and the matrix of a
    block: its cost is that of the rank's own part times about 2K / (K + V).
    """
    if beta is None:
        raise TypeError("beta must be a tensor [B, T, H]: got None")
    if use_qk_l2norm_in_kernel:
        q, k = unit(q, "q"), unit(k, "k")
    return outside_graphs(_attention)(q, k, v, g, beta, level_scales, scale, group)


class Inputs(NamedTuple):
    """What the ops take of a block, with all gates there: g is zeros where it was None."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor | None
    level_scales: Tensor | None

    def run(self) -> Tensor:
        if self.beta is None:
            return log_linear_attention(self.q, self.k, self.v, self.g, self.level_scales)[0]
        return log_linear_delta_rule(self.q, self.k, self.v, self.g, self.beta, self.level_scales)[0]

    def extended(self, before: int, after: int, **given: Tensor) -> Inputs:
        """With zeros for that many tokens before and after: they write nothing, forget nothing, ask nothing. λ is 1 there."""

        def padded(name: str, x: Tensor | None) -> Tensor | None:
            if x is None or name in given:
                return given.get(name)
            sizes = (*(0, 0) * (x.dim() - 2), before, after)
            return F.pad(x, sizes, value=1.0 if name == "level_scales" else 0.0)

        return Inputs(*(padded(name, x) for name, x in zip(self._fields, self)))  # type: ignore[arg-type]


class Map(NamedTuple):
    """What a block does: ``S -> A S + S_c``. A is a log decay ``[B, H]`` or matrices ``[B, H, K, K]``, S_c ``[B, H, K, V]``."""

    transition: Any
    state: Any


class Slot(NamedTuple):
    """A node of the tree as a later block sees it from its start: its chunks, and S ``[B, H, K, V]``."""

    chunks: int
    state: Tensor


def _attention(q, k, v, g, beta, level_scales, scale, group) -> Tensor:
    device = q.device.type if isinstance(q, Tensor) else "cpu"
    without_autocast: AbstractContextManager = nullcontext()
    if torch.is_autocast_enabled(device):  # as the ops
        low = torch.get_autocast_dtype(device)
        q, k, v = (x.to(low) if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in (q, k, v))
        without_autocast = torch.autocast(device, enabled=False)
    checks.check_inputs(q, k, v, g, beta, level_scales)
    scale = checks.check_scale(scale)
    length = q.shape[1]
    if length < 1 or length % CHUNK_SIZE:
        raise ValueError(f"q must hold a multiple of {CHUNK_SIZE} tokens on every rank: got T={length}")
    _check_lengths(q, group)
    with without_autocast:
        wide = torch.promote_types(v.dtype, torch.float32)
        gate = torch.zeros(v.shape[:3], dtype=wide, device=v.device) if g is None else g
        return _over_ranks(Inputs(q if scale == 1.0 else q * scale, k, v, gate, beta, level_scales), group)


def _over_ranks(whole: Inputs, group: dist.ProcessGroup) -> Tensor:
    """o of this rank's span."""
    chunks, linear = whole.q.shape[1] // CHUNK_SIZE, whole.level_scales is None
    plan = [span_blocks(rank, chunks, linear) for rank in range(group.size())]
    first, last = plan[0][0], plan[-1][-1]
    own, outputs, maps, queries = plan[group.rank()], [], [], []
    for block in own:
        tokens = slice(*(CHUNK_SIZE * (end - own[0].start) for end in (block.start, block.stop)))
        inputs = Inputs(*(None if x is None else x[:, tokens] for x in whole))  # type: ignore[arg-type]
        o, state = _from_nothing(inputs, with_state=block is not last)
        query, transition = _carried(inputs, needed=block is not first)
        outputs.append(o)
        maps.append(Map(transition, state))
        queries.append((query, inputs))
    outputs[0], gathered = _gather(outputs[0], maps, plan, whole, group)
    before = slots_before(plan, gathered, group.rank(), linear)
    outputs = [_read(o, query, inputs, slots) for o, (query, inputs), slots in zip(outputs, queries, before)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def span_blocks(rank: int, chunks: int, linear: bool) -> list[range]:
    """The blocks of a rank that holds ``chunks`` chunks, as ranges of chunks of the whole sequence.

    The linear model has no tree: its blocks are whole spans.
    """
    start, stop = rank * chunks, (rank + 1) * chunks
    return [range(start, stop)] if linear else list(aligned_blocks(start, stop))


def _unit_rows(x: Tensor) -> Tensor:
    """``[B, K, heads, K]`` of the dtype and device of x ``[B, T, heads, K]``: token i is unit vector i in every head."""
    batch, _, heads, width = x.shape
    return torch.eye(width, dtype=x.dtype, device=x.device)[:, None].expand(batch, -1, heads, -1)


def _from_nothing(inputs: Inputs, with_state: bool) -> tuple[Tensor, Tensor | None]:
    """o ``[B, T, H, V]`` with nothing before the block, and the state ``[B, H, K, V]`` after it (None unless asked for)."""
    if not with_state:
        return inputs.run(), None
    length, width = inputs.q.shape[1], inputs.q.shape[3]
    o = inputs.extended(0, width, q=torch.cat([inputs.q, _unit_rows(inputs.q)], 1)).run()
    o, rows = o.split([length, width], 1)
    return o, rows.transpose(1, 2)


def _carried(inputs: Inputs, needed: bool) -> tuple[Tensor, Tensor | None]:
    """The queries as seen from the start of the block, and its transition; what a block with nothing before it needs not.

    Scalar gate: log weights ``[B, T, H]`` of the queries, log decay ``[B, H]``. Delta rule: ``[B, T, H, K]``, ``[B, H, K, K]``.
    """
    q, k, v, g, beta, _ = inputs
    wide = torch.promote_types(v.dtype, torch.float32)
    if not needed:
        return q, None
    if beta is None:
        weight = g.to(wide).cumsum(1)
        return weight, weight[:, -1]
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
    _, query, transition = seen.run().split([width, q.shape[1], width], 1)
    return query, transition.transpose(1, 2)


def _gather(
    through: Tensor, own: list[Map], plan: list[list[range]], whole: Inputs, group: dist.ProcessGroup
) -> tuple[Tensor, list[list[Map]]]:
    """``through``, and the maps of all blocks of every rank, in float32 (float64)."""
    (batch, _, heads, value_width), width = whole.v.shape, whole.q.shape[3]
    wide = torch.promote_types(whole.v.dtype, torch.float32)
    shapes = [[batch, heads, width, width] if whole.beta is not None else [batch, heads]]
    shapes.append([batch, heads, width, value_width])
    sizes = [math.prod(shape) for shape in shapes]
    nothing = [whole.v.new_zeros(size, dtype=wide) for size in sizes]
    parts: list[Tensor] = []
    for map_ in own:
        parts += [zeros if x is None else x.to(wide).flatten() for x, zeros in zip(map_, nothing)]
    parts += nothing * (max(map(len, plan)) - len(own))  # one size on all ranks
    through, received = exchange(through, torch.cat(parts), group)
    gathered = []
    for row, blocks in zip(received, plan):
        pieces = row[: len(blocks) * sum(sizes)].split(sizes * len(blocks))
        pairs = zip(pieces[::2], pieces[1::2])
        gathered.append([Map(a.view(shapes[0]), state.view(shapes[1])) for a, state in pairs])
    return through, gathered


def _check_lengths(q: Tensor, group: dist.ProcessGroup) -> None:
    """Raise unless all ranks gave spans of one length; on CUDA the device does, so that the host need not wait."""
    own = torch.tensor([q.shape[1]], device=q.device)
    lengths = own.new_empty(group.size())
    dist.all_gather(list(lengths.split(1)), own, group=group)
    message, same = "q must hold as many tokens on every rank of the group", (lengths == own).all()
    if q.is_cuda:
        torch._assert_async(same, message)
    elif not same:
        raise ValueError(f"{message}: got T={lengths.tolist()}")


def slots_before(plan: list[list[range]], maps: list[list[Map]], rank: int, linear: bool) -> list[list[Slot]]:
    """What each block of ``rank`` finds before it: a Fenwick counter of blocks, or of the linear model one state."""
    slots: list[Slot] = []
    found = []
    for i, (blocks, block_maps) in enumerate(zip(plan[: rank + 1], maps)):
        for block, map_ in zip(blocks, block_maps):
            if i == rank:
                found.append(list(slots))
            slots = [Slot(slot.chunks, _act(map_.transition, slot.state)) for slot in slots]
            slots.append(Slot(len(block), map_.state))
            while len(slots) > 1 and (linear or slots[-2].chunks == slots[-1].chunks):
                late, early = slots.pop(), slots.pop()
                slots.append(Slot(early.chunks + late.chunks, early.state + late.state))
    return found


def _act(transition: Tensor, state: Tensor) -> Tensor:
    """A S, for a log decay ``[B, H]`` or matrices ``[B, H, K, K]``."""
    if transition.dim() == 2:
        return transition.exp()[..., None, None] * state
    return transition @ state


def _read(o: Tensor, query: Tensor, inputs: Inputs, slots: list[Slot]) -> Tensor:
    """o and what the queries read of the slots; ``query`` as ``_carried`` has it."""
    for slot in slots:
        state = slot.state.to(o.dtype)
        if inputs.beta is None:
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
