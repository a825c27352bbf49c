"""BACKWARD of the scalar gate: its launches, in the order in which the gradients flow."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loglinear.kernels.decay.chunk_grads import chunk_grads_kernel
from loglinear.kernels.decay.forward import States, launch_states, state_tiles, tables_of, tuned
from loglinear.kernels.decay.gate_grads import gate_grads_kernel
from loglinear.kernels.decay.key_grads import key_grads_kernel
from loglinear.kernels.decay.local_grads import local_grads_kernel
from loglinear.kernels.decay.node_grads import segment_sums_kernel, window_grads_kernel
from loglinear.kernels.decay.query_grads import query_grads_kernel
from loglinear.kernels.decay.span import choice as span
from loglinear.kernels.decay.value_grads import value_grads_kernel
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import Inputs, gather
from loglinear.kernels.tree.head_sums import sum_heads
from loglinear.kernels.tree.problem import Problem, cdiv, describe, padded
from loglinear.kernels.tuning import Launch, ScalarGateConfig


class Gains(NamedTuple):
    """Shares of q·dq and k·dk that the gate's gradient is made of, float32; empty without a gate. See gate_grads.py.

    rows, columns: ``[H, B*T]``, of a token with all keys before it, and with all queries after it. chunks: ``[chunks, H]``.
    levels: ``[tree levels, H, chunks]``. beyond: ``[chunks, H, tiles]``.
    """

    rows: Tensor
    columns: Tensor
    chunks: Tensor
    levels: Tensor
    beyond: Tensor


class NodeGrads(NamedTuple):
    """nodes: ``[octets, H, K, V]`` gradients of the entries of whole octets, by the octet that ends them; segments: ``[levels,
    slots, H, K, V]`` parts of those with more octets than a segment.
    """

    nodes: Tensor
    segments: Tensor


def allocate_gains(problem: Problem, x: Inputs) -> Gains:
    H, tokens, all_chunks = problem.heads, problem.tokens, problem.all_chunks
    tiles = state_tiles(problem, problem.config.chunk_grads)[2]
    shapes = (H, tokens), (H, tokens), (all_chunks, H), (problem.tree_levels, H, all_chunks), (all_chunks, H, tiles)
    return Gains(*(launching.scratch(s if x.g is not None else (0,), torch.float32, x.v.device) for s in shapes))


def launch_node_grads(problem: Problem, x: Inputs, states: States) -> Tensor:
    """``NodeGrads.nodes``; none where a sequence is one octet."""
    H, state, levels, octets = (
        problem.heads,
        (problem.key_width, problem.value_width),
        problem.high_levels,
        problem.all_octets,
    )
    launch, segment, dtype, device = problem.config.windows, problem.config.segment, x.v.dtype, x.v.device
    segment_levels = max(levels - segment.bit_length(), 0)
    slots = octets // segment + 1 + problem.sequence_count
    nodes = launching.scratch((octets if levels else 0, H, *state), dtype, device)
    if levels == 0:
        return nodes
    out = NodeGrads(nodes, launching.scratch((segment_levels, slots, H, *state), dtype, device))
    tile_k, tile_v, tiles = state_tiles(problem, launch)
    arguments = x, problem.levels, states, out, *problem.of_octets, states.sums.stride(0), octets, slots
    S = problem.sizes(dtype, BK=tile_k, BV=tile_v, LEVELS=levels)
    launching.launch(
        window_grads_kernel, levels * octets * H * tiles, *arguments, S=S, SEGMENT=segment, **launch.options
    )
    if segment_levels:
        block = min(2048, padded(state[0] * state[1]))
        programs = segment_levels * octets * H * cdiv(state[0] * state[1], block)
        arguments = states, out, *problem.of_octets, octets, slots
        constants = {"S": problem.sizes(dtype), "SEGMENT": segment, "BLOCK": block}
        launching.launch(segment_sums_kernel, programs, *arguments, **constants, num_warps=4)
    return nodes


def launch_chunk_grads(
    problem: Problem, x: Inputs, states: States, node_grads: Tensor, gains: Gains, pairs: bool
) -> Tensor:
    """Gradients of the states of all chunks, ``[chunks, H, K, V]``; with ``pairs`` of every second chunk of a sequence only."""
    launch = problem.config.chunk_grads
    tile_k, tile_v, tiles = state_tiles(problem, launch)
    shape = max(problem.all_chunks // (2 if pairs else 1), 1), problem.heads, problem.key_width, problem.value_width
    chunk_grads = launching.scratch(shape, x.v.dtype, x.v.device)
    programs = problem.all_octets * problem.heads * tiles
    arguments = x, problem.levels, states, node_grads, chunk_grads, gains, *problem.of_octets, states.sums.stride(0)
    S = problem.sizes(x.v.dtype, BK=tile_k, BV=tile_v)
    launching.launch(chunk_grads_kernel, programs, *arguments, S=S, PAIRS=pairs, **launch.options)
    return chunk_grads


def head_blocks(problem: Problem) -> tuple[int, int]:
    """(heads that a program of the query and key sides handles in turn, number of such blocks)."""
    heads = problem.config.heads_per_program(problem.heads_per_group)
    return heads, problem.heads // heads


def launch_chunks(kernel, launch: Launch, problem: Problem, x: Inputs, states: States, *arguments) -> None:
    """A kernel whose program owns a chunk and a block of heads."""
    heads, blocks = head_blocks(problem)
    tile_k, tile_v = problem.tile(problem.key_width), min(launch.block_v, problem.tile(problem.value_width))
    S = problem.sizes(x.v.dtype, BK=tile_k, BV=tile_v, HEADS=heads, LEVELS=padded(problem.levels))
    places = *problem.of_chunks, problem.tokens, states.sums.stride(0)
    launching.launch(
        kernel, problem.all_chunks * blocks, x, problem.levels, states, *arguments, *places, S=S, **launch.options
    )


def launch_local_grads(problem: Problem, x: Inputs, states: States, gains: Gains) -> tuple[Tensor, Tensor]:
    """(dλ of the levels inside a chunk, gradient of the scores ``[chunks, head blocks, C, C]``)."""
    chunk, device = problem.config.chunk, x.v.device
    dscales = launching.scratch(tuple(x.scales.shape), x.scales.dtype, device)
    score_grads = launching.scratch((problem.all_chunks, head_blocks(problem)[1], chunk, chunk), x.v.dtype, device)
    launch_chunks(local_grads_kernel, problem.config.local, problem, x, states, score_grads, dscales, gains)
    return dscales, score_grads


def launch_value_grads(problem: Problem, x: Inputs, states: States, chunk_grads: Tensor, gains: Gains) -> Tensor:
    """dv."""
    dv = launching.scratch(tuple(x.v.shape), x.v.dtype, x.v.device)
    launch_chunks(value_grads_kernel, problem.config.value, problem, x, states, chunk_grads, dv, gains)
    return dv


def partial_sums(problem: Problem, like: Tensor) -> Tensor:
    """Where programs put their share of dq or dk: the result itself if one program has all heads of a group."""
    parts = head_blocks(problem)[1] // problem.groups
    shape = (parts, problem.tokens, problem.groups, problem.key_width)
    return launching.scratch(shape, like.dtype if parts == 1 else torch.float32, like.device)


def launch_query_grads(
    problem: Problem, x: Inputs, states: States, score_grads: Tensor, dscales: Tensor, gains: Gains
) -> Tensor:
    """dq; completes dλ and the gains of the rows."""
    partial = partial_sums(problem, x.q)
    launch_chunks(query_grads_kernel, problem.config.query, problem, x, states, score_grads, partial, dscales, gains)
    return sum_heads(partial, x.q)


def launch_key_grads(problem: Problem, x: Inputs, states: States, chunk_grads: Tensor, score_grads: Tensor) -> Tensor:
    """dk."""
    partial = partial_sums(problem, x.k)
    launch_chunks(key_grads_kernel, problem.config.key, problem, x, states, chunk_grads, score_grads, partial)
    return sum_heads(partial, x.k)


def launch_gate_grads(problem: Problem, x: Inputs, gains: Gains, pairs: bool) -> Tensor:
    """dg."""
    dg, tiles = launching.scratch(tuple(x.g.shape), x.g.dtype, x.g.device), gains.beyond.shape[2]
    arguments = x, gains, dg, *problem.of_octets, problem.tokens, problem.all_chunks, problem.high_levels
    programs, S = problem.all_octets * problem.heads, problem.sizes(x.v.dtype)
    launching.launch(gate_grads_kernel, programs, *arguments, S=S, TILES=tiles, PAIRS=pairs, num_warps=4)
    return dg


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    level_scales: Tensor,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    config: ScalarGateConfig | None = None,
    first_chunks: Tensor | None = None,
    reach: int = 0,
    kept: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of ``forward``: (dq, dk, dv, dg, dlevel_scales), each contiguous and of its input's dtype; dg None if g is.

    ``do [B, T, H, V]`` is of v's dtype; the other arguments are those of ``forward``. ``kept`` is what ``forward``
    returned after o, if it was called with the same arguments: no bit depends on it.
    """
    inputs = [do, q, k, v, g, level_scales, *tables_of(q, v, cu_seqlens, config, first_chunks), *kept]
    return launching.replay(run_backward, inputs, scale, config, reach, len(kept), rows=6)


def run_backward(
    inputs: list, scale: float, config: ScalarGateConfig | None, reach: int, kept: int
) -> tuple[Tensor | None, ...]:
    """The launches of ``backward``; the last ``kept`` inputs are the forward's states."""
    do, q, k, v, g, level_scales, *tables = inputs[: len(inputs) - kept]
    x = gather(q, k, v, g, None, level_scales, do, scale)
    problem = describe(q, v, level_scales, tuple(tables), tuned(config, q, v), reach)
    gains = allocate_gains(problem, x)
    spans = span.why_not_backward(problem, x, reach) is None
    if spans:
        from loglinear.kernels.decay.span import backward as of_spans  # Triton has Gluon there

    if spans and kept:
        states = States.of(problem, v.dtype, *inputs[len(inputs) - kept :])
    else:  # only the output reads checks
        states = launch_states(problem, x, span.LEAST_ENTRY if spans else 1)[0]._replace(checks=None)
    local_grads = of_spans.launch_local if spans else launch_local_grads
    dscales, score_grads = local_grads(problem, x, states, gains)
    query_side = of_spans.launch_query_side if spans else launch_query_grads
    dq = query_side(problem, x, states, score_grads, dscales, gains)
    node_grads = launch_node_grads(problem, x, states)
    chunk_grads = launch_chunk_grads(problem, x, states, node_grads, gains, pairs=spans)
    # The entries are a third of the memory. They are freed before the results of the key side are allocated.
    states = states._replace(entries=None)
    del node_grads
    if spans:
        dk, dv = of_spans.launch_key_side(problem, x, states, chunk_grads, score_grads, gains)
    else:
        dv = launch_value_grads(problem, x, states, chunk_grads, gains)
        dk = launch_key_grads(problem, x, states, chunk_grads, score_grads)
    dg = None if g is None else launch_gate_grads(problem, x, gains, pairs=spans)
    return dq, dk, dv, dg, dscales
