"""BACKWARD of the delta rule: its launches, in the order in which the gradients flow, for some heads at a time.

Slices of heads come in pairs, and each slice of a pair runs on its own stream. A kernel of few heads leaves half of the GPU
empty while its last programs end. The kernel of the other slice fills this half.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from loglinear.kernels.delta.entry_grads import entry_grads_kernel
from loglinear.kernels.delta.forward import (
    FIRST_OF_TWO,
    launch_maps,
    launch_path_queries,
    launch_path_states,
)
from loglinear.kernels.delta.group_grads import SPARE, group_grads_kernel
from loglinear.kernels.delta.key_grads import key_grads_kernel
from loglinear.kernels.delta.map_grads import map_grads_kernel
from loglinear.kernels.delta.memory import Maps, heads_at_a_time
from loglinear.kernels.delta.path_grads import path_grads_kernel
from loglinear.kernels.delta.score_grads import PLANES, score_grads_kernel
from loglinear.kernels.delta.transport_grads import path_state_grads_kernel, transport_grads_kernel
from loglinear.kernels.delta.unit_grads import unit_grads_kernel
from loglinear.kernels.delta.wide_entry_grads import segment_sums_kernel, wide_entry_grads_kernel
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.head_sums import sum_heads
from loglinear.kernels.tree.place import GROUP
from loglinear.kernels.tree.problem import Problem, cdiv, common_constants, describe, packed_tables, padded, token_rows
from loglinear.kernels.tree.replay import replay, two_lanes
from loglinear.kernels.tuning import DeltaRuleConfig, Launch, delta_rule_config


@dataclass(frozen=True)
class Inputs:
    """The inputs of a forward pass, laid out by ``token_rows``, and the gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor
    level_scales: Tensor
    do: Tensor
    factor: float

    def heads(self, first: int, count: int, per_group: int) -> Inputs:
        """The inputs of ``count`` heads."""
        groups = slice(first // per_group, cdiv(first + count, per_group))
        heads = slice(first, first + count)
        rest = (None if x is None else x[:, :, heads] for x in (self.v, self.g, self.beta, self.level_scales, self.do))
        return Inputs(self.q[:, :, groups], self.k[:, :, groups], *rest, self.factor)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Gradients:
    """The results of the backward pass. dq and dk are ``[H/G, B*T, G, K]``: float32 partial sums, or the result if H == G."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dg: Tensor | None
    dbeta: Tensor
    dlevel_scales: Tensor

    def heads(self, first: int, count: int, per_group: int) -> Gradients:
        """The gradients of ``count`` heads: of whole groups, or of some heads of one group."""
        groups = slice(first // per_group, cdiv(first + count, per_group))
        parts = slice(first % per_group, first % per_group + min(count, per_group))
        heads = slice(first, first + count)
        rest = (None if x is None else x[:, :, heads] for x in (self.dv, self.dg, self.dbeta, self.dlevel_scales))
        return Gradients(self.dq[parts, :, groups], self.dk[parts, :, groups], *rest)  # type: ignore[arg-type]


def tiles(problem: Problem, launch: Launch, width: int) -> tuple[int, int]:
    """(width of a tile, number of tiles)."""
    tile = min(launch.block_v, problem.tile(width))
    return tile, cdiv(width, tile)


def launch_path_grads(
    problem: Problem, x: Inputs, out: Gradients, maps: Maps, states: Tensor, queries: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of (the queries after each entry within their group, those at the start of their chunk ``[rows, H, C, K]``)."""
    H, K, C = problem.heads, problem.key_width, problem.config.chunk
    inner_grads = launching.scratch(tuple(queries[0].shape), x.v.dtype, x.v.device)
    query_grads = launching.scratch((problem.rows, H, C, K), x.v.dtype, x.v.device)
    launch = problem.config.path_grads
    launching.launch(
        path_grads_kernel, problem.rows * H,
        x.k, x.do, x.level_scales, maps.sums, maps.writes, maps.entries, states, *queries, inner_grads, query_grads,
        out.dlevel_scales, problem.path_starts, problem.row_sequence, *problem.table, problem.path_entries, problem.tokens,
        maps.sums.stride(0), x.k.stride(1), x.do.stride(1), x.level_scales.stride(1), out.dlevel_scales.stride(1),
        x.factor, problem.levels, **common_constants(problem, x.v.dtype), HEADS=maps.heads, LOG_C=C.bit_length() - 1,
        BK=problem.tile(K), BV=tiles(problem, launch, problem.value_width)[0], LEVELS=padded(problem.levels),
        **launch.options,
    )  # fmt: skip
    return inner_grads, query_grads


def launch_entry_grads(problem: Problem, x: Inputs, inner_queries: Tensor, inner_grads: Tensor, grads: Tensor) -> None:
    """Rows of ``grads``: the gradients of the entries within a group."""
    H, K, V, C = problem.heads, problem.key_width, problem.value_width, problem.config.chunk
    launch = problem.config.entry_grads
    block = min(launch.block_v, problem.tile(max(K, V)))
    launching.launch(
        entry_grads_kernel, problem.rows * H * (cdiv(K, block) + cdiv(V, block)),
        x.do, x.level_scales, inner_queries, inner_grads, grads, problem.row_sequence, *problem.table, x.do.stride(1),
        x.level_scales.stride(1), x.factor, problem.levels,
        **common_constants(problem, x.v.dtype, without=("G", "EXACT")), LOG_C=C.bit_length() - 1, BK=problem.tile(K),
        BN=block, **launch.options,
    )  # fmt: skip


def launch_transport_grads(problem: Problem, x: Inputs, maps: Maps, group_queries: Tensor) -> Tensor:
    """Gradients of ``T_j [A_j | S_j]``, ``[slots, H, K, K+V]``, for entry j of every group's path; no dA for the last."""
    H, K, V, C = problem.heads, problem.key_width, problem.value_width, problem.config.chunk
    path_grads = launching.scratch((problem.path_slots, H, K, K + V), x.v.dtype, x.v.device)
    constants = common_constants(problem, x.v.dtype, without=("G", "EXACT"))
    launch = problem.config.path_state_grads
    block, blocks = tiles(problem, launch, V)
    launching.launch(
        path_state_grads_kernel, problem.row_groups * H * problem.high_levels * blocks,
        x.do, x.level_scales, group_queries, path_grads, problem.path_starts, problem.group_sequence, *problem.table,
        problem.path_entries, x.do.stride(1), x.level_scales.stride(1), x.factor, problem.levels, problem.high_levels,
        **constants, LOG_C=C.bit_length() - 1, BK=problem.tile(K), BN=block, **launch.options,
    )  # fmt: skip
    if problem.chunk_groups > FIRST_OF_TWO:
        launch = problem.config.transport_grads
        block, blocks = tiles(problem, launch, K)
        constants.pop("C")
        # An IEEE product holds its operands in registers over the whole inner size.
        inner = min(block if x.v.dtype == torch.float32 else 128, problem.tile(V))
        launching.launch(
            transport_grads_kernel, problem.row_groups * H * blocks,
            maps.entries, path_grads, problem.path_starts, problem.group_sequence, *problem.table, problem.path_entries,
            **constants, HEADS=maps.heads, BM=block, BK=problem.tile(K), BV=inner, **launch.options,
        )  # fmt: skip
    return path_grads


def launch_wide_entry_grads(problem: Problem, maps: Maps, states: Tensor, path_grads: Tensor, grads: Tensor) -> None:
    """Rows of ``grads``: the gradients of the entries of whole groups."""
    H, K, V, dtype = problem.heads, problem.key_width, problem.value_width, states.dtype
    launch, segment = problem.config.wide_entry_grads, problem.config.segment
    block = min(launch.block_v, problem.tile(max(K, V)))
    # Levels of entries longer than a segment. They include the entry that ends with the last group; nothing reads it.
    levels = max(problem.chunk_groups.bit_length() - segment.bit_length(), 0)
    sequences = problem.batch if problem.sequences is None else problem.sequences.shape[0]
    slots = problem.row_groups // segment + 1 + sequences
    segments = launching.scratch((levels, slots, H, K, K + V), dtype, states.device)
    programs = problem.row_groups * H * (cdiv(K, block) + cdiv(V, block))
    for long in (True, False) if levels else (False,):
        launching.launch(
            wide_entry_grads_kernel, programs * (levels if long else 1),
            maps.entries, states, path_grads, segments if long else grads, problem.path_starts, problem.group_sequence,
            *problem.table, problem.path_entries, problem.row_groups, slots,
            **common_constants(problem, dtype, without=("G", "EXACT")), HEADS=maps.heads, BK=problem.tile(K), BN=block,
            BT=min(launch.block_v, 64, problem.tile(K)), SEGMENT=segment, LONG=long, **launch.options,
        )  # fmt: skip
    if levels:
        size = K * (K + V)
        part = min(2048, padded(size))
        launching.launch(
            segment_sums_kernel, problem.row_groups * H * cdiv(size, part),
            segments, grads, problem.group_sequence, *problem.table, slots, H=H, SIZE=size, C=problem.config.chunk,
            SEGMENT=segment, BLOCK=part, PACKED=problem.packed, num_warps=4,
        )  # fmt: skip


def launch_tree_grads(problem: Problem, x: Inputs, maps: Maps, grads: Tensor) -> None:
    """Turns ``grads`` of the entries into gradients of the maps after each chunk, from the top of the tree down."""
    H, K, V = problem.heads, problem.key_width, problem.value_width
    walk, outer = problem.config.group_grads, problem.config.unit_grads
    block, blocks = tiles(problem, walk, K + V)
    tile_n = min(outer.block_v, problem.tile(max(K, V)))
    map_grads = grads
    for t, tier in reversed(list(enumerate(problem.tiers))):
        top = t + 1 == len(problem.tiers)
        launching.launch(
            group_grads_kernel, tier.groups * H * blocks,
            x.k, maps.groups[t - 1] if t else maps.writes, maps.sums, maps.chunk_log, map_grads, grads,
            tier.group_sequence, *tier.table, problem.tokens, maps.sums.stride(0), x.k.stride(1), problem.rows,
            **common_constants(problem, x.v.dtype), HEADS=maps.heads, BK=problem.tile(K), BN=block, TIER=t, TOP=top,
            **walk.options,
        )  # fmt: skip
        if t == 0:
            return
        map_grads = launching.scratch((tier.units, H, K, K + V), x.v.dtype, x.v.device)
        launching.launch(
            unit_grads_kernel, tier.groups * GROUP.value * H * (cdiv(K, tile_n) + cdiv(V, tile_n)),
            maps.prefixes[t], maps.entries, grads, map_grads, tier.group_sequence, *tier.table, problem.rows,
            **common_constants(problem, x.v.dtype, without=("G", "EXACT")), HEADS=maps.heads, BK=problem.tile(K), BN=tile_n,
            BW=min(walk.block_v, problem.tile(K + V)), TIER=t, **outer.options,
        )  # fmt: skip


def launch_score_grads(
    problem: Problem, x: Inputs, out: Gradients, maps: Maps, query_grads: Tensor
) -> tuple[Tensor, Tensor]:
    """(the four matrices of each chunk's scores, gains of its queries); completes dλ."""
    H, C = problem.heads, problem.config.chunk
    launch = problem.config.score_grads
    scores = launching.scratch((problem.rows, H, PLANES.value, C, C), x.v.dtype, x.v.device)
    gains = launching.scratch((H, problem.tokens if x.g is not None else 0), torch.float32, x.v.device)
    launching.launch(
        score_grads_kernel, problem.rows * H,
        x.q, x.k, x.v, x.do, x.level_scales, maps.sums, maps.solve, maps.writes, query_grads, scores, out.dlevel_scales,
        gains, problem.row_sequence, *problem.table, problem.tokens, maps.sums.stride(0), x.q.stride(1), x.k.stride(1),
        x.v.stride(1), x.do.stride(1), x.level_scales.stride(1), out.dlevel_scales.stride(1), x.factor, problem.levels,
        **common_constants(problem, x.v.dtype), HEADS=maps.heads, LOG_C=C.bit_length() - 1,
        BK=tiles(problem, launch, problem.key_width)[0], BV=tiles(problem, launch, problem.value_width)[0],
        LEVELS=padded(problem.levels), HAS_GATE=x.g is not None, **launch.options,
    )  # fmt: skip
    return scores, gains


def launch_map_grads(
    problem: Problem, x: Inputs, out: Gradients, maps: Maps, grads: Tensor, query_grads: Tensor, scores: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(shares of dk ``[rows, H, 2, C, K]``, gains of the chunks' ends, gains of the chunks); dv, and dT in ``scores``."""
    H, K, V, C = problem.heads, problem.key_width, problem.value_width, problem.config.chunk
    launch, gated, device = problem.config.map_grads, x.g is not None, x.v.device
    key_grads = launching.scratch((problem.rows, H, 2, C, K), x.v.dtype, device)
    ends = launching.scratch((H, problem.tokens if gated else 0), torch.float32, device)
    chunk_gains = launching.scratch((problem.rows if gated else 0, H), torch.float32, device)
    launching.launch(
        map_grads_kernel, problem.rows * H,
        x.k, x.v, x.do, maps.sums, maps.chunk_log, maps.solve, maps.writes, maps.prefixes[0], maps.entries, grads,
        query_grads, scores, key_grads, out.dv, ends, chunk_gains, problem.row_sequence, *problem.table, problem.tokens,
        maps.sums.stride(0), x.k.stride(1), x.v.stride(1), x.do.stride(1), out.dv.stride(1), problem.rows,
        **common_constants(problem, x.v.dtype), HEADS=maps.heads, BK=problem.tile(K),
        BN=tiles(problem, launch, K)[0], BV=tiles(problem, launch, V)[0], HAS_GATE=gated, **launch.options,
    )  # fmt: skip
    return key_grads, ends, chunk_gains


def launch_key_grads(
    problem: Problem, x: Inputs, out: Gradients, maps: Maps, query_grads: Tensor, scores: Tensor, key_grads: Tensor,
    gains: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """dq, dk, dβ and dg."""
    launch = problem.config.key_grads
    gate, dgate = (maps.sums, maps.sums) if x.g is None or out.dg is None else (x.g, out.dg)
    launching.launch(
        key_grads_kernel, problem.rows * problem.heads,
        x.q, x.k, gate, x.beta, maps.sums, maps.solve, query_grads, scores, key_grads, *gains, out.dq, out.dk, dgate,
        out.dbeta, problem.row_sequence, *problem.table, problem.tokens, maps.sums.stride(0), x.q.stride(1),
        x.k.stride(1), gate.stride(1), x.beta.stride(1), out.dq.stride(1), out.dk.stride(1), dgate.stride(1),
        out.dbeta.stride(1), out.dq.stride(0), out.dk.stride(0), **common_constants(problem, x.v.dtype, without=("V",)),
        HEADS=maps.heads, BK=tiles(problem, launch, problem.key_width)[0], HAS_GATE=x.g is not None, **launch.options,
    )  # fmt: skip


def backward_of_heads(problem: Problem, x: Inputs, out: Gradients, maps: Maps | None) -> None:
    """The whole backward of the heads that x and out hold; their maps are made again if they were not kept."""
    K, V = problem.key_width, problem.value_width
    if maps is None:
        maps = launch_maps(problem, x.k, x.v, x.g, x.beta, prefixes=True)
    states = launch_path_states(problem, maps.entries, maps=True)
    queries = launch_path_queries(problem, x.q, x.k, maps)
    inner_grads, query_grads = launch_path_grads(problem, x, out, maps, states, queries)
    inner_queries, group_queries = queries
    deep = problem.chunk_groups > 1
    path_grads = launch_transport_grads(problem, x, maps, group_queries) if deep else None
    del queries, group_queries
    spare = SPARE.value * max(tier.groups for tier in problem.tiers)
    grads = launching.scratch((problem.rows + spare, problem.heads, K, K + V), x.v.dtype, x.v.device)
    launch_entry_grads(problem, x, inner_queries, inner_grads, grads)
    if path_grads is not None:
        launch_wide_entry_grads(problem, maps, states, path_grads, grads)
    del states, path_grads, inner_queries, inner_grads
    launch_tree_grads(problem, x, maps, grads)
    scores, gains = launch_score_grads(problem, x, out, maps, query_grads)
    key_grads, ends, chunk_gains = launch_map_grads(problem, x, out, maps, grads, query_grads, scores)
    del grads
    launch_key_grads(problem, x, out, maps, query_grads, scores, key_grads, (gains, ends, chunk_gains))


def allocate_gradients(problem: Problem, x: Inputs) -> Gradients:
    parts, device = problem.heads_per_group, x.v.device

    def like(y: Tensor) -> Tensor:
        return launching.scratch(tuple(y.shape), y.dtype, device)

    shape = (parts, problem.tokens, problem.groups, problem.key_width)
    dq, dk = (launching.scratch(shape, y.dtype if parts == 1 else torch.float32, device) for y in (x.q, x.k))
    return Gradients(dq, dk, like(x.v), None if x.g is None else like(x.g), like(x.beta), like(x.level_scales))


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    level_scales: Tensor,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    config: DeltaRuleConfig | None = None,
    kept: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of ``forward``: (dq, dk, dv, dg, dbeta, dlevel_scales), contiguous, of their inputs' dtypes; dg None if g is.

    ``do [B, T, H, V]`` is of v's dtype; the other arguments are those of ``forward``. ``kept`` is what ``forward_keeping``
    returned after o, if it was called with the same arguments: no bit depends on it.
    """
    config = delta_rule_config(v.dtype, q.shape[3], v.shape[3]) if config is None else config
    inputs = [None if x is None else token_rows(x) for x in (do, q, k, v, g, beta, level_scales)]
    tables = packed_tables(cu_seqlens, q.shape[1], config.chunk, tree=True)
    return replay(run_backward, [*inputs, *tables, *kept], scale, config, len(kept))  # type: ignore[return-value]


def run_backward(inputs: list, scale: float, config: DeltaRuleConfig, kept: int) -> tuple[Tensor | None, ...]:
    """The launches of ``backward``; the last ``kept`` inputs are the forward's maps."""
    do, q, k, v, g, beta, level_scales, *tables = inputs[: len(inputs) - kept]
    maps = Maps.of(tuple(inputs[len(inputs) - kept :])) if kept else None
    x = Inputs(q, k, v, g, beta, level_scales, do, scale)
    problem = describe(q, v, level_scales, tuple(tables), config)
    out = allocate_gradients(problem, x)
    count, per_group = heads_at_a_time(problem, v.element_size(), kept > 0), problem.heads_per_group
    if count == problem.heads:
        backward_of_heads(problem, x, out, maps)
    else:
        part = dataclasses.replace(problem, heads=count, groups=cdiv(count, per_group))
        with two_lanes() as choose:
            for number, first in enumerate(range(0, problem.heads, count)):
                choose(number % 2)
                own = x.heads(first, count, per_group), out.heads(first, count, per_group)
                backward_of_heads(part, *own, None if maps is None else maps.part(first, count))
    dq, dk = sum_heads(out.dq, q), sum_heads(out.dk, k)
    return dq, dk, out.dv, out.dg, out.dbeta, out.dlevel_scales
