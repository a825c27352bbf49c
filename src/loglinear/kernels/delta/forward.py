"""FORWARD of the delta rule: chunk maps, one launch per tier of the tree, path states, output."""

from __future__ import annotations

import torch
from torch import Tensor

from loglinear.kernels.delta.chunk_maps import chunk_maps_kernel
from loglinear.kernels.delta.group_maps import group_maps_kernel
from loglinear.kernels.delta.memory import Maps, keeps_maps, map_shapes
from loglinear.kernels.delta.output import output_kernel
from loglinear.kernels.delta.path_queries import path_queries_kernel
from loglinear.kernels.delta.path_states import path_states_kernel
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.problem import (
    Problem,
    cdiv,
    common_constants,
    describe,
    packed_tables,
    sizes_of_tables,
    token_rows,
)
from loglinear.kernels.tree.replay import replay
from loglinear.kernels.tuning import DeltaRuleConfig, delta_rule_config

FIRST_OF_TWO = 3  # the first group, from 0, with two entries before it


def launch_chunk_maps(problem: Problem, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor) -> tuple[Tensor, ...]:
    """sums, chunk_log, solve and writes of ``Maps``."""
    K, V, exact = problem.key_width, problem.value_width, v.dtype == torch.float32
    sums, chunk_log, solve, writes = (launching.scratch(*x, v.device) for x in map_shapes(problem, v.dtype)[:4])
    launch = problem.config.chunk_maps
    gate = sums if g is None else g
    launching.launch(
        chunk_maps_kernel, problem.rows * problem.heads,
        k, v, gate, beta, sums, chunk_log, solve, writes, problem.row_sequence, *problem.table, problem.tokens,
        sums.stride(0), k.stride(1), v.stride(1), gate.stride(1), beta.stride(1), **common_constants(problem, v.dtype),
        BK=min(launch.block_v, problem.tile(K)), BV=min(launch.block_v, problem.tile(V)), HAS_GATE=g is not None,
        SOLVE="tf32x3" if torch.version.hip is None and not exact else "ieee", **launch.options,
    )  # fmt: skip
    return sums, chunk_log, solve, writes


def launch_maps(problem: Problem, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, prefixes: bool = False) -> Maps:
    """All maps: of the chunks, of the Fenwick array and, with ``prefixes``, those for the way down the tree in the backward."""
    H, K, V = problem.heads, problem.key_width, problem.value_width
    sums, chunk_log, solve, writes = launch_chunk_maps(problem, k, v, g, beta)
    tiers = problem.tiers
    shapes = map_shapes(problem, v.dtype)[4:]
    maps = [launching.scratch(*x, v.device) for x in (shapes if prefixes else shapes[: len(tiers)])]
    entries, groups, before = maps[0], tuple(maps[1 : len(tiers)]), tuple(maps[len(tiers) :])
    launch = problem.config.group_maps
    block = min(launch.block_v, problem.tile(K + V))
    for t, tier in enumerate(tiers):
        dense, top = t > 0, t + 1 == len(tiers)
        launching.launch(
            group_maps_kernel,
            tier.groups * H * cdiv(K + V, block) * 2,
            k, groups[t - 1] if dense else writes, sums, entries, entries if top else groups[t],
            before[t] if prefixes else entries, tier.group_sequence, *tier.table, problem.tokens, sums.stride(0),
            k.stride(1), **common_constants(problem, v.dtype), BK=problem.tile(K), BN=block, TIER=t, TOP=top,
            STORE_PREFIXES=prefixes, **launch.options,
        )  # fmt: skip
    return Maps(sums, chunk_log, solve, writes, entries, groups, before)


def launch_path_states(problem: Problem, entries: Tensor, maps: bool = False) -> Tensor:
    """``[slots, H, K, V]`` low: the states on the path of each group, as seen from its start. If ``maps``,
    ``[slots, H, K, K+V]``: ``[T | T S]``, with the transition from the end of the entry to the start of the group.

    Entry j > 0 on the path of group m is at slot ``path_states.path_start + j``; undefined for j = 0.
    """
    H, K, V = problem.heads, problem.key_width, problem.value_width
    states = launching.scratch((problem.path_slots, H, K, K + V if maps else V), entries.dtype, entries.device)
    if problem.chunk_groups <= FIRST_OF_TWO:
        return states
    launch = problem.config.path_states
    block = min(launch.block_v, problem.tile(K))
    launching.launch(
        path_states_kernel, problem.row_groups * H * cdiv(K, block),
        entries, states, problem.path_starts, problem.group_sequence, *problem.table, problem.path_entries,
        **common_constants(problem, entries.dtype, without=("G", "C", "EXACT")), HEADS=entries.stride(0) // (K * (K + V)),
        BM=block, BK=problem.tile(K), MAPS=maps, **launch.options,
    )  # fmt: skip
    return states


def launch_output(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor, factor: float, maps: Maps, states: Tensor
) -> Tensor:
    """o, from the chunks themselves and the entries before them."""
    launch = problem.config.output
    K, V = problem.key_width, problem.value_width
    tile = problem.tile(K)
    o = launching.scratch(tuple(v.shape), v.dtype, v.device)
    launching.launch(
        output_kernel, problem.rows * problem.heads * cdiv(V, tile),
        q, k, v, level_scales, maps.sums, maps.solve, maps.writes, maps.entries, states, o, problem.path_starts,
        problem.row_sequence, *problem.table, problem.path_entries, problem.tokens, maps.sums.stride(0), q.stride(1),
        k.stride(1), v.stride(1), level_scales.stride(1), factor, problem.levels, **common_constants(problem, v.dtype),
        LOG_C=problem.config.chunk.bit_length() - 1, BK=tile,
        **launch.options,
    )  # fmt: skip
    return o


def launch_path_queries(problem: Problem, q: Tensor, k: Tensor, maps: Maps) -> tuple[Tensor, Tensor]:
    """(the queries of each chunk before each entry of its path within the group, as seen from the start of the group), low.

    ``[1.5 rows, H, C, K]``, entry i of chunk n at slot ``path_queries.inner_start + i``, nearest first; and
    ``[rows, H, C, K]``, undefined in the first group of a sequence.
    """
    shape = (problem.heads, problem.config.chunk, problem.key_width)
    inner_queries = launching.scratch((problem.rows * 3 // 2, *shape), q.dtype, q.device)
    group_queries = launching.scratch((problem.rows, *shape), q.dtype, q.device)
    launch = problem.config.path_queries
    launching.launch(
        path_queries_kernel, problem.rows * problem.heads,
        q, k, maps.sums, maps.writes, maps.entries, inner_queries, group_queries, problem.row_sequence, *problem.table,
        problem.tokens, maps.sums.stride(0), q.stride(1), k.stride(1), **common_constants(problem, q.dtype),
        HEADS=maps.heads, BK=problem.tile(problem.key_width), **launch.options,
    )  # fmt: skip
    return inner_queries, group_queries


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    level_scales: Tensor,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    config: DeltaRuleConfig | None = None,
) -> Tensor:
    """Log-linear attention with the delta rule, from nothing before the first token.

    Args:
        q, k: ``[B, T, G, K]`` of v's dtype. v: ``[B, T, H, V]``, bfloat16, float16 or float32.
        g: ``[B, T, H]`` natural log-decay <= 0, any floating dtype; -inf is a reset. None is no decay.
        beta: ``[B, T, H]`` writing strength, any floating dtype. level_scales: λ ``[B, T, H, L]``, any floating dtype.
        scale: factor of o. cu_seqlens: ``[n+1]`` on the same device, for a batch of one. config: None is the tuned one.

    Returns:
        o ``[B, T, H, V]`` of v's dtype, contiguous.
    """
    return forward_keeping(q, k, v, g, beta, level_scales, scale, cu_seqlens, config, keep=False)[0]


def forward_keeping(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    level_scales: Tensor,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    config: DeltaRuleConfig | None = None,
    keep: bool = True,
) -> tuple[Tensor, ...]:
    """(o, tensors that save ``backward`` some work: none if they take too much memory, or without ``keep``)."""
    config = delta_rule_config(v.dtype, q.shape[3], v.shape[3]) if config is None else config
    inputs = [None if x is None else token_rows(x) for x in (q, k, v, g, beta, level_scales)]
    tables = packed_tables(cu_seqlens, q.shape[1], config.chunk, tree=True)
    return replay(run_forward, [*inputs, *tables], scale, config, keep)  # type: ignore[return-value]


def kept_shapes(
    q: Tensor, v: Tensor, level_scales: Tensor, cu_seqlens: Tensor | None = None, config: DeltaRuleConfig | None = None
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of the tensors that ``forward_keeping`` returns after o. Nothing is computed: the tensors may be fake.

    Sizes may be symbolic, except the widths of heads. The number of tensors is then a guard on these sizes.
    """
    config = delta_rule_config(v.dtype, int(q.shape[3]), int(v.shape[3])) if config is None else config
    problem = describe(q, v, level_scales, sizes_of_tables(cu_seqlens), config)
    return map_shapes(problem, v.dtype) if keeps_maps(problem, v.element_size()) else []


def run_forward(inputs: list, scale: float, config: DeltaRuleConfig, keep: bool) -> tuple[Tensor, ...]:
    """The launches of ``forward``."""
    q, k, v, g, beta, level_scales, *tables = inputs
    problem = describe(q, v, level_scales, tuple(tables), config)
    keep = keep and keeps_maps(problem, v.element_size())
    maps = launch_maps(problem, k, v, g, beta, prefixes=keep)
    states = launch_path_states(problem, maps.entries)
    o = launch_output(problem, q, k, v, level_scales, scale, maps, states)
    return o, *(maps.tensors if keep else ())
