"""CONTEXT: the ops on one sequence whose tokens lie on several ranks, as plain torch around the ops and one all-gather.

A rank cuts its span into blocks of the whole sequence's tree (``ops/blocks.py``). For each block it computes o, the map (A, S)
and the queries at the start of the block. The all-gather collects the maps of all blocks. Each rank folds the earlier maps into
the slots of a Fenwick counter, and its queries read these slots. A span of 2^n chunks is one block. Ranks wait for each other
only in the all-gather. Source: Guo et al. 2025, section 3; the exchange is worked out here (docs/context_parallel.md).

Legend: B batch, T tokens of this rank, G q/k groups, H value heads, K, V widths, L levels, R ranks.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from loglinear.distributed.exchange import exchange, outside_graphs
from loglinear.fenwick import aligned_blocks
from loglinear.ops.attention import checked, outside_autocast
from loglinear.ops.blocks import Map, Query, Slot, append, carried, from_nothing, read, wide_dtype
from loglinear.ops.inputs import Inputs
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
    """``log_linear_attention`` of one sequence over the ranks of ``group``. Each rank gives its span and gets o of that span.

    Args:
        q, k: ``[B, T, G, K]``. v: ``[B, T, H, V]``. g: ``[B, T, H]`` or None. level_scales: λ ``[B, T, H, L]`` or None for the
            linear model. scale: factor of q. All are as in the op: T counts the tokens of this rank, and L the levels of
            the whole sequence. group: the process group; its ranks are in the order of their spans.

    Returns:
        o ``[B, T, H, V]``, with gradients to the inputs of all ranks. Every rank must go backward through its o.

    Raises:
        TypeError, ValueError: as the op; T is not a multiple of ``CHUNK_SIZE``, or (on CUDA a device assertion) differs
        between ranks.
    """
    return outside_graphs(_attention)(Inputs(q, k, v, g, None, level_scales), scale, group)


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

    Every rank but the first calls the op a second time, without a tree and with values of width K. This call makes the
    queries and the matrix of a block, and costs about 2K / (K + V) of the rank's first call.
    """
    if beta is None:
        raise TypeError("beta must be a tensor [B, T, H]: got None")
    inputs = Inputs(q, k, v, g, beta, level_scales)
    return outside_graphs(_attention)(inputs, scale, group, use_qk_l2norm_in_kernel)


def _attention(inputs: Inputs, scale: float | None, group: dist.ProcessGroup, unit_length: bool = False) -> Tensor:
    (q, k, v, g, beta, level_scales), scale, *_ = checked(inputs, scale, unit_length=unit_length)
    _, without_autocast = outside_autocast(q)
    length = q.shape[1]
    if length < 1 or length % CHUNK_SIZE:
        raise ValueError(f"q must hold a multiple of {CHUNK_SIZE} tokens on every rank: got T={length}")
    _check_lengths(q, group)
    with without_autocast:
        gate = v.new_zeros(v.shape[:3]) if g is None else g
        gate = gate.to(torch.promote_types(v.dtype, torch.float32))
        return _over_ranks(Inputs(q if scale == 1.0 else q * scale, k, v, gate, beta, level_scales), group)


def _over_ranks(whole: Inputs, group: dist.ProcessGroup) -> Tensor:
    """o of this rank's span."""
    chunks, linear = whole.q.shape[1] // CHUNK_SIZE, whole.linear()
    plan = [span_blocks(rank, chunks, linear) for rank in range(group.size())]
    first, last = plan[0][0], plan[-1][-1]
    own, outputs, maps, queries = plan[group.rank()], [], [], []
    for block in own:
        tokens = slice(*(CHUNK_SIZE * (end - own[0].start) for end in (block.start, block.stop)))
        inputs = whole.part(slice(None), tokens)
        o, state = from_nothing(inputs, with_state=block is not last)
        query, transition = carried(inputs) if block is not first else (Query(inputs.q), None)
        outputs.append(o)
        maps.append(Map(transition, state))
        queries.append((query, inputs))
    outputs[0], gathered = _gather(outputs[0], maps, plan, whole, group)
    before = slots_before(plan, gathered, group.rank(), linear)
    outputs = [read(o, query, inputs, slots) for o, (query, inputs), slots in zip(outputs, queries, before)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def span_blocks(rank: int, chunks: int, linear: bool) -> list[range]:
    """The blocks of a rank that holds ``chunks`` chunks, as ranges of chunks of the whole sequence.

    The linear model has no tree: its blocks are whole spans.
    """
    start, stop = rank * chunks, (rank + 1) * chunks
    return [range(start, stop)] if linear else list(aligned_blocks(start, stop))


def _gather(
    through: Tensor, own: list[Map], plan: list[list[range]], whole: Inputs, group: dist.ProcessGroup
) -> tuple[Tensor, list[list[Map]]]:
    """``through``, and the maps of all blocks of every rank, in float32 (float64)."""
    (batch, _, heads, value_width), width = whole.v.shape, whole.q.shape[3]
    wide = wide_dtype(whole)
    span = {"log": [], "logs": [width], "matrix": [width, width]}[whole.transition().span]
    shapes = [[batch, heads, *span], [batch, heads, width, value_width]]
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
    """Raise ValueError if the spans differ in length. On CUDA the device checks the lengths, so that the host need not wait."""
    own = torch.tensor([q.shape[1]], device=q.device)
    lengths = own.new_empty(group.size())
    dist.all_gather(list(lengths.split(1)), own, group=group)
    message, same = "q must hold as many tokens on every rank of the group", (lengths == own).all()
    if q.is_cuda:
        torch._assert_async(same, message)
    elif not same:
        raise ValueError(f"{message}: got T={lengths.tolist()}")


def slots_before(plan: list[list[range]], maps: list[list[Map]], rank: int, linear: bool) -> list[list[Slot]]:
    """The states before each block of ``rank``: a Fenwick counter of blocks, or one state for the linear model."""
    slots: list[Slot] = []
    found = []
    for i, (blocks, block_maps) in enumerate(zip(plan[: rank + 1], maps)):
        for block, map_ in zip(blocks, block_maps):
            if i == rank:
                found.append(list(slots))
            slots = append(slots, map_, len(block), linear)
    return found
