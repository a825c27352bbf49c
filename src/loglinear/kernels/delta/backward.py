"""BACKWARD of the delta rule: its launches, in the order in which the gradients flow, for some heads at a time.

Slices of heads come in pairs, and each slice of a pair runs on its own stream. A kernel of few heads leaves half of the GPU
empty while its last programs end. The kernel of the other slice fills this half.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from loglinear.kernels.channel.backward import Gradients, around, launch_gate_grads
from loglinear.kernels.channel.forward import Launcher, launch_scores
from loglinear.kernels.delta.entry_grads import entry_grads_kernel
from loglinear.kernels.delta.forward import (
    FIRST_OF_TWO,
    launch_chunk_maps,
    launch_octet_maps,
    launch_path_queries,
    launch_path_states,
    of_heads,
    tables_of,
    tuned,
)
from loglinear.kernels.delta.key_grads import key_grads_kernel
from loglinear.kernels.delta.map_grads import map_grads_kernel
from loglinear.kernels.delta.memory import Maps, heads_at_a_time
from loglinear.kernels.delta.octet_grads import SPARE, octet_grads_kernel
from loglinear.kernels.delta.path_grads import path_grads_kernel
from loglinear.kernels.delta.score_grads import PLANES, PRODUCT_GRADS, score_grads_kernel
from loglinear.kernels.delta.transport_grads import path_state_grads_kernel, transport_grads_kernel
from loglinear.kernels.delta.unit_grads import unit_grads_kernel
from loglinear.kernels.delta.wide_entry_grads import segment_sums_kernel, wide_entry_grads_kernel
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import Inputs, Results, gather, results_of
from loglinear.kernels.tree.head_sums import partial_sums, sum_heads
from loglinear.kernels.tree.place import OCTET
from loglinear.kernels.tree.problem import Problem, cdiv, describe, padded
from loglinear.kernels.tuning import DeltaRuleConfig, Launch
from loglinear.transition import is_per_channel


def heads_of(x: Inputs, out: Results, first: int, count: int, per_group: int) -> tuple[Inputs, Results]:
    """The inputs and gradients of ``count`` heads: of whole groups, or of some heads of one group."""
    groups = slice(first // per_group, cdiv(first + count, per_group))
    parts = slice(first % per_group, first % per_group + min(count, per_group))
    heads = slice(first, first + count)

    def some(bundle, names: tuple[str, ...]) -> dict:
        return {name: y[:, :, heads] for name in names if (y := getattr(bundle, name)) is not None}

    inputs = x._replace(q=x.q[:, :, groups], k=x.k[:, :, groups], **some(x, ("v", "g", "beta", "scales", "do")))
    shared = {"dq": out.dq[parts, :, groups], "dk": out.dk[parts, :, groups]}
    return inputs, out._replace(**shared, **some(out, ("dv", "dg", "dbeta", "dscales")))


def tiles(problem: Problem, launch: Launch, width: int) -> tuple[int, int]:
    """(width of a tile, number of tiles)."""
    tile = min(launch.block_v, problem.tile(width))
    return tile, cdiv(width, tile)


def launch_path_grads(
    problem: Problem, x: Inputs, out: Results, maps: Maps, states: Tensor, queries: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of (the queries after each entry within their octet, those at the start of their chunk ``[chunks, H, C,
    K]``).
    """
    H, K, C = problem.heads, problem.key_width, problem.config.chunk
    inner_grads = launching.scratch(tuple(queries[0].shape), x.v.dtype, x.v.device)
    query_grads = launching.scratch((problem.all_chunks, H, C, K), x.v.dtype, x.v.device)
    launch, levels = problem.config.path_grads, padded(problem.levels)
    tile_v = tiles(problem, launch, problem.value_width)[0]
    places = problem.path_starts, *problem.of_chunks, problem.path_entries, problem.tokens, maps.sums.stride(0)
    arguments = x, problem.levels, maps.chunks, states, *queries, inner_grads, query_grads, out, *places
    S = problem.sizes(x.v.dtype, BK=problem.tile(K), BV=tile_v, HEADS=maps.heads, LEVELS=levels)
    launching.launch(path_grads_kernel, problem.all_chunks * H, *arguments, S=S, **launch.options)
    return inner_grads, query_grads


def launch_entry_grads(problem: Problem, x: Inputs, inner_queries: Tensor, inner_grads: Tensor, grads: Tensor) -> None:
    """Rows of ``grads``: the gradients of the entries within an octet."""
    H, K, V = problem.heads, problem.key_width, problem.value_width
    launch = problem.config.entry_grads
    block = min(launch.block_v, problem.tile(max(K, V)))
    programs = problem.all_chunks * H * (cdiv(K, block) + cdiv(V, block))
    S = problem.sizes(x.v.dtype, BK=problem.tile(K), BN=block)
    arguments = x, problem.levels, inner_queries, inner_grads, grads, *problem.of_chunks
    launching.launch(entry_grads_kernel, programs, *arguments, S=S, **launch.options)


def launch_transport_grads(problem: Problem, x: Inputs, maps: Maps, octet_queries: Tensor) -> Tensor:
    """Gradients of ``T_j [A_j | S_j]``, ``[slots, H, K, K+V]``, for entry j of every octet's path; no dA for the last."""
    H, K, V, dtype = problem.heads, problem.key_width, problem.value_width, x.v.dtype
    path_grads = launching.scratch((problem.path_slots, H, K, K + V), x.v.dtype, x.v.device)
    launch = problem.config.path_state_grads
    block, blocks = tiles(problem, launch, V)
    longest, places = problem.high_levels, (problem.path_starts, *problem.of_octets, problem.path_entries)
    arguments = x, problem.levels, octet_queries, path_grads, *places, longest
    programs, S = problem.all_octets * H * longest * blocks, problem.sizes(dtype, BK=problem.tile(K), BN=block)
    launching.launch(path_state_grads_kernel, programs, *arguments, S=S, **launch.options)
    if problem.sequence_octets > FIRST_OF_TWO:
        launch = problem.config.transport_grads
        block, blocks = tiles(problem, launch, K)
        # An IEEE product holds its operands in registers over the whole inner size.
        inner = min(block if dtype == torch.float32 else 128, problem.tile(V))
        programs = problem.all_octets * H * blocks
        S = problem.sizes(dtype, BK=problem.tile(K), BV=inner, HEADS=maps.heads)
        arguments = maps.entries, path_grads, *places
        launching.launch(transport_grads_kernel, programs, *arguments, S=S, BM=block, **launch.options)
    return path_grads


def launch_wide_entry_grads(problem: Problem, maps: Maps, states: Tensor, path_grads: Tensor, grads: Tensor) -> None:
    """Rows of ``grads``: the gradients of the entries of whole octets."""
    H, K, V, dtype = problem.heads, problem.key_width, problem.value_width, states.dtype
    launch, segment = problem.config.wide_entry_grads, problem.config.segment
    block = min(launch.block_v, problem.tile(max(K, V)))
    # Levels of entries longer than a segment. They include the entry that ends with the last octet; nothing reads it.
    levels = max(problem.sequence_octets.bit_length() - segment.bit_length(), 0)
    slots = problem.all_octets // segment + 1 + problem.sequence_count
    segments = launching.scratch((levels, slots, H, K, K + V), dtype, states.device)
    programs = problem.all_octets * H * (cdiv(K, block) + cdiv(V, block))
    places = problem.path_starts, *problem.of_octets, problem.path_entries, problem.all_octets, slots
    for long in (levels, 0) if levels else (0,):
        S = problem.sizes(dtype, BK=problem.tile(K), BN=block, HEADS=maps.heads, LEVELS=long)
        arguments = maps.entries, states, path_grads, segments if long else grads, *places
        constants = {"S": S, "BT": min(launch.block_v, 64, problem.tile(K)), "SEGMENT": segment, "LONG": long > 0}
        launching.launch(wide_entry_grads_kernel, programs * max(long, 1), *arguments, **constants, **launch.options)
    if levels:
        size, S = K * (K + V), problem.sizes(dtype)
        part = min(2048, padded(size))
        programs, arguments = problem.all_octets * H * cdiv(size, part), (segments, grads, *problem.of_octets, slots)
        launching.launch(segment_sums_kernel, programs, *arguments, S=S, SEGMENT=segment, BLOCK=part, num_warps=4)


def launch_tree_grads(problem: Problem, x: Inputs, maps: Maps, grads: Tensor) -> None:
    """Turns ``grads`` of the entries into gradients of the maps after each chunk, from the top of the tree down."""
    H, K, V = problem.heads, problem.key_width, problem.value_width
    walk, outer = problem.config.octet_grads, problem.config.unit_grads
    block, blocks = tiles(problem, walk, K + V)
    tile_n = min(outer.block_v, problem.tile(max(K, V)))
    S = problem.sizes(x.v.dtype, BK=problem.tile(K), BN=block, HEADS=maps.heads)
    BW = min(walk.block_v, problem.tile(K + V))
    unit_sizes = problem.sizes(x.v.dtype, BK=problem.tile(K), BN=tile_n, HEADS=maps.heads)
    map_grads, places = grads, (problem.tokens, maps.sums.stride(0), x.stride_k, problem.all_chunks)
    for t, tier in reversed(list(enumerate(problem.tiers))):
        top, units = t + 1 == len(problem.tiers), maps.octets[t - 1] if t else maps.writes
        arguments = x.k, units, maps.sums, maps.chunk_log, map_grads, grads, *tier.of_octets, *places
        launching.launch(octet_grads_kernel, tier.octets * H * blocks, *arguments, S=S, TIER=t, TOP=top, **walk.options)
        if t == 0:
            return
        map_grads = launching.scratch((tier.units, H, K, K + V), x.v.dtype, x.v.device)
        programs = tier.octets * OCTET.value * H * (cdiv(K, tile_n) + cdiv(V, tile_n))
        arguments = maps.prefixes[t], maps.entries, grads, map_grads, *tier.of_octets, problem.all_chunks
        launching.launch(unit_grads_kernel, programs, *arguments, S=unit_sizes, BW=BW, TIER=t, **outer.options)


def launch_score_grads(
    problem: Problem, x: Inputs, out: Results, maps: Maps, query_grads: Tensor
) -> tuple[Tensor, Tensor]:
    """(the four matrices of each chunk's scores, gains of its queries); completes dλ."""
    H, C = problem.heads, problem.config.chunk
    launch = problem.config.score_grads
    tile_k, tile_v = (tiles(problem, launch, width)[0] for width in (problem.key_width, problem.value_width))
    scores = launching.scratch((problem.all_chunks, H, PLANES.value, C, C), x.v.dtype, x.v.device)
    gains = launching.scratch((H, problem.tokens if x.g is not None else 0), torch.float32, x.v.device)
    places = *problem.of_chunks, problem.tokens, maps.sums.stride(0)
    arguments = x, problem.levels, maps.chunks, query_grads, scores, out, gains, *places
    S = problem.sizes(x.v.dtype, BK=tile_k, BV=tile_v, HEADS=maps.heads, LEVELS=padded(problem.levels))
    launching.launch(score_grads_kernel, problem.all_chunks * H, *arguments, S=S, **launch.options)
    return scores, gains


def launch_map_grads(
    problem: Problem, x: Inputs, out: Results, maps: Maps, grads: Tensor, query_grads: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(shares of dk ``[chunks, H, 2, C, K]``, gains of the chunks' ends, gains of the chunks); dv, and dT in ``scores``."""
    H, K, V, C = problem.heads, problem.key_width, problem.value_width, problem.config.chunk
    launch, gated, device = problem.config.map_grads, x.g is not None, x.v.device
    tile_v = tiles(problem, launch, V)[0]
    key_grads = launching.scratch((problem.all_chunks, H, 2, C, K), x.v.dtype, device)
    ends = launching.scratch((H, problem.tokens if gated else 0), torch.float32, device)
    of_channels = (problem.all_chunks, H, K) if problem.channels else (problem.all_chunks if gated else 0, H)
    chunk_gains = launching.scratch(of_channels, torch.float32, device)
    places = *problem.of_chunks, problem.tokens, maps.sums.stride(0), problem.all_chunks
    made = key_grads, out, ends, chunk_gains
    arguments = x, maps.chunks, maps.prefixes[0], grads, query_grads, scores, *made, *places
    S = problem.sizes(x.v.dtype, BK=problem.tile(K), BV=tile_v, BN=tiles(problem, launch, K)[0], HEADS=maps.heads)
    launching.launch(map_grads_kernel, problem.all_chunks * H, *arguments, S=S, **launch.options)
    return key_grads, ends, chunk_gains


def launch_key_grads(
    problem: Problem,
    x: Inputs,
    out: Results,
    maps: Maps,
    query_grads: Tensor,
    scores: Tensor,
    shares: tuple[Tensor, ...],
    around: Tensor | None,
) -> None:
    """dq, dk, dβ and dg, or for gates per channel dβ and ``around``. ``shares``: of dk, and the gains of queries, of the
    chunks' ends and of the chunks.
    """
    launch = problem.config.key_grads
    chunks = maps.chunks._replace(writes=None, entries=None)  # a kernel that is given them would keep their memory
    strides = maps.sums.stride(0), out.dq.stride(0), out.dk.stride(0)
    arguments = x, chunks, query_grads, scores, *shares, around, out, *problem.of_chunks, problem.tokens, *strides
    S = problem.sizes(x.v.dtype, BK=tiles(problem, launch, problem.key_width)[0], HEADS=maps.heads)
    launching.launch(key_grads_kernel, problem.all_chunks * problem.heads, *arguments, S=S, **launch.options)


def backward_of_heads(problem: Problem, x: Inputs, out: Results, maps: Maps | None) -> None:
    """The whole backward of the heads that x and out hold; their maps are made again if they were not kept."""
    K, V, given, call = problem.key_width, problem.value_width, x, Launcher(problem, x.v.dtype, x.v.device)
    prepared = maps.prepared if maps is not None else launch_scores(call, x) if problem.channels else None
    problem, x = of_heads(problem, x, prepared)
    if maps is None:
        maps = launch_octet_maps(problem, x, launch_chunk_maps(problem, x, prepared), prepared, prefixes=True)
    states = launch_path_states(problem, maps.entries, maps=True)
    queries = launch_path_queries(problem, x, maps)
    inner_grads, query_grads = launch_path_grads(problem, x, out, maps, states, queries)
    inner_queries, octet_queries = queries
    deep = problem.sequence_octets > 1
    path_grads = launch_transport_grads(problem, x, maps, octet_queries) if deep else None
    del queries, octet_queries
    spare = SPARE.value * max(tier.octets for tier in problem.tiers)
    grads = launching.scratch((problem.all_chunks + spare, problem.heads, K, K + V), x.v.dtype, x.v.device)
    launch_entry_grads(problem, x, inner_queries, inner_grads, grads)
    if path_grads is not None:
        launch_wide_entry_grads(problem, maps, states, path_grads, grads)
    del states, path_grads, inner_queries, inner_grads
    launch_tree_grads(problem, x, maps, grads)
    scores, gains = launch_score_grads(problem, x, out, maps, query_grads)
    key_grads, ends, chunk_gains = launch_map_grads(problem, x, out, maps, grads, query_grads, scores)
    del grads
    beside = None if prepared is None else around(call)
    launch_key_grads(problem, x, out, maps, query_grads, scores, (key_grads, gains, ends, chunk_gains), beside)
    if prepared is not None:
        found, out = Gradients(q=query_grads, k=key_grads, around=beside), results_of(out.dq, out.dk, dg=out.dg)
        launch_gate_grads(call, given, prepared.sums, scores[:, :, PRODUCT_GRADS.value :], found, out, PLANES.value)


def allocate(problem: Problem, x: Inputs) -> Results:
    """Memory for all gradients."""

    def like(y: Tensor) -> Tensor:
        return launching.scratch(tuple(y.shape), y.dtype, y.device)

    dq, dk, dg = partial_sums(problem, x.q), partial_sums(problem, x.k), None if x.g is None else like(x.g)
    return results_of(dq, dk, like(x.v), dg, like(x.beta), like(x.scales))


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

    ``do [B, T, H, V]`` is of v's dtype; the other arguments are those of ``forward``. ``kept`` is what ``forward``
    returned after o, if it was called with the same arguments: no bit depends on it.
    """
    inputs = [do, q, k, v, g, beta, level_scales, *tables_of(q, v, cu_seqlens, config), *kept]
    return launching.replay(run_backward, inputs, scale, config, len(kept), rows=7)


def run_backward(inputs: list, scale: float, config: DeltaRuleConfig | None, kept: int) -> tuple[Tensor | None, ...]:
    """The launches of ``backward``; the last ``kept`` inputs are the forward's maps."""
    do, q, k, v, g, beta, level_scales, *tables = inputs[: len(inputs) - kept]
    x = gather(q, k, v, g, beta, level_scales, do, scale)
    channels = is_per_channel(g)
    maps = Maps.of(tuple(inputs[len(inputs) - kept :]), channels) if kept else None
    problem = describe(q, v, level_scales, tuple(tables), tuned(config, q, v))
    problem = dataclasses.replace(problem, channels=channels)
    out = allocate(problem, x)
    count, per_group = heads_at_a_time(problem, v.element_size(), kept > 0), problem.heads_per_group
    if count == problem.heads:
        backward_of_heads(problem, x, out, maps)
    else:
        part = dataclasses.replace(problem, heads=count, groups=cdiv(count, per_group))
        for first in range(0, problem.heads, count):
            own = heads_of(x, out, first, count, per_group)
            backward_of_heads(part, *own, None if maps is None else maps.part(first, count))
    dq, dk = sum_heads(out.dq, q), sum_heads(out.dk, k)
    return dq, dk, out.dv, out.dg, out.dbeta, out.dscales
