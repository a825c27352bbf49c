"""FORWARD of the delta rule: chunk maps, one launch per tier of the tree, path states, output."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from loglinear.kernels.channel.forward import Launcher, Prepared, decayed, launch_scores
from loglinear.kernels.delta.chunk_maps import chunk_maps_kernel
from loglinear.kernels.delta.memory import Maps, keeps_maps, map_shapes
from loglinear.kernels.delta.octet_maps import octet_maps_kernel
from loglinear.kernels.delta.output import output_kernel
from loglinear.kernels.delta.path_queries import path_queries_kernel
from loglinear.kernels.delta.path_states import path_states_kernel
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import Inputs, gather
from loglinear.kernels.tree.problem import Problem, cdiv, describe, packed_tables, sizes_of_tables
from loglinear.kernels.tuning import DeltaRuleConfig, delta_rule_config, widths
from loglinear.transition import is_per_channel

FIRST_OF_TWO = 3  # the first octet, from 0, with two entries before it


def of_heads(problem: Problem, x: Inputs, prepared: Prepared | None) -> tuple[Problem, Inputs]:
    """The problem and inputs of kernels that know no gate per channel: prepared chunks have queries and keys for each head."""
    return (problem, x) if prepared is None else (replace(problem, groups=problem.heads), decayed(x, prepared))


def launch_chunk_maps(problem: Problem, x: Inputs, prepared: Prepared | None) -> tuple[Tensor, ...]:
    """sums, chunk_log, solve and writes of ``Maps``."""
    launch, dtype = problem.config.chunk_maps, x.v.dtype
    known = {} if prepared is None else {1: prepared.chunk_log}
    shapes = enumerate(map_shapes(problem, dtype)[:4])
    made = tuple(known[i] if i in known else launching.scratch(*y, x.v.device) for i, y in shapes)
    tile_k, tile_v = (min(launch.block_v, problem.tile(width)) for width in (problem.key_width, problem.value_width))
    solve = "tf32x3" if torch.version.hip is None and dtype != torch.float32 else "ieee"
    programs, S = problem.all_chunks * problem.heads, problem.sizes(dtype, BK=tile_k, BV=tile_v)
    given = None if prepared is None else prepared._replace(sums=None, q=None, k=None, scores=None)
    arguments = x, given, *made, *problem.of_chunks, problem.tokens, made[0].stride(0)
    launching.launch(chunk_maps_kernel, programs, *arguments, S=S, SOLVE=solve, **launch.options)
    return made


def launch_octet_maps(
    problem: Problem, x: Inputs, chunks: tuple[Tensor, ...], prepared: Prepared | None, prefixes: bool = False
) -> Maps:
    """All maps, from those of the chunks: of the Fenwick array and, with ``prefixes``, for the backward's way down the tree."""
    H, K, V = problem.heads, problem.key_width, problem.value_width
    sums, chunk_log, solve, writes = chunks
    tiers = problem.tiers
    shapes = map_shapes(problem, x.v.dtype)[4 : 4 + len(tiers) * (2 if prefixes else 1)]
    maps = [launching.scratch(*y, x.v.device) for y in shapes]
    entries, octets, before = maps[0], tuple(maps[1 : len(tiers)]), tuple(maps[len(tiers) :])
    launch = problem.config.octet_maps
    block = min(launch.block_v, problem.tile(K + V))
    S, places = problem.sizes(x.v.dtype, BK=problem.tile(K), BN=block), (problem.tokens, sums.stride(0), x.stride_k)
    for t, tier in enumerate(tiers):
        top, programs = t + 1 == len(tiers), tier.octets * H * cdiv(K + V, block) * 2
        made = entries, entries if top else octets[t], before[t] if prefixes else entries
        arguments = x.k, octets[t - 1] if t else writes, sums, chunk_log, *made, *tier.of_octets, *places
        constants = {"S": S, "TIER": t, "TOP": top, "STORE_PREFIXES": prefixes}
        launching.launch(octet_maps_kernel, programs, *arguments, **constants, **launch.options)
    return Maps(sums, chunk_log, solve, writes, entries, octets, before, prepared)


def launch_path_states(problem: Problem, entries: Tensor, maps: bool = False) -> Tensor:
    """``[slots, H, K, V]`` low: the states on the path of each octet, as seen from its start. If ``maps``,
    ``[slots, H, K, K+V]``: ``[T | T S]``, with the transition from the end of the entry to the start of the octet.

    Entry j > 0 on the path of octet m is at slot ``path_states.path_start + j``; undefined for j = 0.
    """
    H, K, V = problem.heads, problem.key_width, problem.value_width
    states = launching.scratch((problem.path_slots, H, K, K + V if maps else V), entries.dtype, entries.device)
    if problem.sequence_octets <= FIRST_OF_TWO:
        return states
    launch = problem.config.path_states
    block = min(launch.block_v, problem.tile(K))
    programs = problem.all_octets * H * cdiv(K, block)
    arguments = entries, states, problem.path_starts, *problem.of_octets, problem.path_entries
    S = problem.sizes(entries.dtype, BK=problem.tile(K), HEADS=entries.stride(0) // (K * (K + V)))
    launching.launch(path_states_kernel, programs, *arguments, S=S, BM=block, MAPS=maps, **launch.options)
    return states


def launch_output(problem: Problem, x: Inputs, maps: Maps, states: Tensor) -> Tensor:
    """o, from the chunks themselves and the entries before them."""
    launch = problem.config.output
    tile = problem.tile(problem.key_width)
    o = launching.scratch(tuple(x.v.shape), x.v.dtype, x.v.device)
    programs = problem.all_chunks * problem.heads * cdiv(problem.value_width, tile)
    places = problem.path_starts, *problem.of_chunks, problem.path_entries, problem.tokens, maps.sums.stride(0)
    arguments = x, problem.levels, maps.chunks, states, o, *places
    launching.launch(output_kernel, programs, *arguments, S=problem.sizes(x.v.dtype, BK=tile), **launch.options)
    return o


def launch_path_queries(problem: Problem, x: Inputs, maps: Maps) -> tuple[Tensor, Tensor]:
    """(the queries of each chunk before each entry of its path within the octet, as seen from the start of the octet), low.

    ``[1.5 chunks, H, C, K]``, entry i of chunk n at slot ``path_queries.inner_start + i``, nearest first; and
    ``[chunks, H, C, K]``, undefined in the first octet of a sequence.
    """
    shape = (problem.heads, problem.config.chunk, problem.key_width)
    inner_queries = launching.scratch((problem.all_chunks * 3 // 2, *shape), x.q.dtype, x.q.device)
    octet_queries = launching.scratch((problem.all_chunks, *shape), x.q.dtype, x.q.device)
    launch = problem.config.path_queries
    arguments = x, maps.chunks, inner_queries, octet_queries, *problem.of_chunks, problem.tokens, maps.sums.stride(0)
    S = problem.sizes(x.q.dtype, BK=problem.tile(problem.key_width), HEADS=maps.heads)
    launching.launch(path_queries_kernel, problem.all_chunks * problem.heads, *arguments, S=S, **launch.options)
    return inner_queries, octet_queries


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
    keep: bool = False,
) -> tuple[Tensor, ...]:
    """Log-linear attention with the delta rule, from nothing before the first token.

    Args:
        q, k: ``[B, T, G, K]`` of v's dtype. v: ``[B, T, H, V]``, bfloat16, float16 or float32.
        g: ``[B, T, H]``, or ``[B, T, H, K]`` for each key channel: natural log-decay <= 0, any floating dtype; -inf is a
            reset. None is no decay.
        beta: ``[B, T, H]`` writing strength, any floating dtype. level_scales: λ ``[B, T, H, L]``, any floating dtype.
        scale: factor of o. cu_seqlens: ``[n+1]`` on the same device, for a batch of one. config: None is the tuned one.

    Returns:
        o ``[B, T, H, V]`` of v's dtype, contiguous; with ``keep`` also tensors that save ``backward`` some work: none if they
        take too much memory.
    """
    inputs = [q, k, v, g, beta, level_scales, *tables_of(q, v, cu_seqlens, config)]
    return launching.replay(run_forward, inputs, scale, config, keep, rows=6)


def tuned(config: DeltaRuleConfig | None, q: Tensor, v: Tensor) -> DeltaRuleConfig:
    """The configuration; None is the tuned one for such inputs."""
    return config or delta_rule_config(v.dtype, *widths(q, v))


def tables_of(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, config: DeltaRuleConfig | None) -> tuple[Tensor, ...]:
    """The tables of packed sequences; arguments as in ``forward``."""
    return () if cu_seqlens is None else packed_tables(cu_seqlens, q.shape[1], tuned(config, q, v).chunk, tree=True)


def kept_shapes(
    q: Tensor,
    v: Tensor,
    level_scales: Tensor,
    cu_seqlens: Tensor | None = None,
    config: DeltaRuleConfig | None = None,
    channels: bool = False,
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of what ``forward`` with ``keep`` returns after o. Nothing is computed: the tensors may be fake.

    Sizes may be symbolic, except the widths of heads. The number of tensors is then a guard on these sizes.
    """
    problem = describe(q, v, level_scales, sizes_of_tables(cu_seqlens), tuned(config, q, v))
    problem = replace(problem, channels=channels)
    return map_shapes(problem, v.dtype) if keeps_maps(problem, v.element_size()) else []


def run_forward(inputs: list, scale: float, config: DeltaRuleConfig | None, keep: bool) -> tuple[Tensor, ...]:
    """The launches of ``forward``."""
    q, k, v, g, beta, level_scales, *tables = inputs
    problem = describe(q, v, level_scales, tuple(tables), tuned(config, q, v))
    problem = replace(problem, channels=is_per_channel(g))
    keep = keep and keeps_maps(problem, v.element_size())
    x = gather(q, k, v, g, beta, level_scales, None, scale)
    prepared = launch_scores(Launcher(problem, v.dtype, v.device), x) if problem.channels else None
    problem, x = of_heads(problem, x, prepared)
    if prepared is not None and not keep:
        prepared = prepared._replace(sums=None)
    chunks = launch_chunk_maps(problem, x, prepared)
    maps = launch_octet_maps(problem, x, chunks, prepared, prefixes=keep)
    o = launch_output(problem, x, maps, launch_path_states(problem, maps.entries))
    return o, *(maps.tensors if keep else ())
