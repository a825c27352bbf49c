"""BACKWARD of the scalar gate: its launches, in the order in which the gradients flow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loglinear.kernels.decay.chunk_grads import chunk_grads_kernel
from loglinear.kernels.decay.forward import States, launch_states
from loglinear.kernels.decay.gate_grads import gate_grads_kernel
from loglinear.kernels.decay.key_grads import key_grads_kernel
from loglinear.kernels.decay.local_grads import local_grads_kernel
from loglinear.kernels.decay.node_grads import segment_sums_kernel, window_grads_kernel
from loglinear.kernels.decay.query_grads import query_grads_kernel
from loglinear.kernels.decay.value_grads import value_grads_kernel
from loglinear.kernels.devices import shared_memory
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.head_sums import sum_heads
from loglinear.kernels.tree.problem import Problem, cdiv, common_constants, describe, packed_tables, padded, token_rows
from loglinear.kernels.tree.replay import replay
from loglinear.kernels.tuning import Launch, ScalarGateConfig, scalar_gate_config


@dataclass(frozen=True)
class Inputs:
    """The inputs of a forward pass, laid out by ``token_rows``, and the gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    level_scales: Tensor
    do: Tensor
    factor: float


@dataclass(frozen=True)
class Gains:
    """Shares of q·dq and k·dk that the gate's gradient is made of; empty without a gate. See gate_grads.py."""

    rows: Tensor
    columns: Tensor
    chunks: Tensor
    levels: Tensor
    beyond: Tensor


def state_tiles(problem: Problem, launch: Launch) -> tuple[int, int, int]:
    """(BK, BV, number of tiles) of kernels whose program owns a tile of a state."""
    K, V = problem.key_width, problem.value_width
    tile_k, tile_v = min(problem.config.block_k, problem.tile(K)), min(launch.block_v, problem.tile(V))
    return tile_k, tile_v, cdiv(K, tile_k) * cdiv(V, tile_v)


def allocate_gains(problem: Problem, device: torch.device, gated: bool) -> Gains:
    H, tokens = problem.heads, problem.tokens
    tiles = state_tiles(problem, problem.config.chunk_grads)[2]
    shapes = (
        (H, tokens),
        (H, tokens),
        (problem.rows, H),
        (problem.tree_levels, H, problem.rows),
        (problem.rows, H, tiles),
    )
    return Gains(*(launching.scratch(shape if gated else (0,), torch.float32, device) for shape in shapes))


def launch_node_grads(problem: Problem, x: Inputs, states: States) -> Tensor:
    """Gradients of the entries of whole groups, ``[groups, H, K, V]`` by the group that ends them."""
    H, K, V, levels = problem.heads, problem.key_width, problem.value_width, problem.high_levels
    launch, segment = problem.config.windows, problem.config.segment
    segment_levels = max(levels - segment.bit_length(), 0)
    slots = problem.row_groups // segment + 1 + (0 if problem.sequences is None else problem.sequences.shape[0])
    if problem.sequences is None:
        slots += problem.batch
    node_grads = launching.scratch((problem.row_groups if levels else 0, H, K, V), x.v.dtype, x.v.device)
    if levels == 0:
        return node_grads
    segments = launching.scratch((segment_levels, slots, H, K, V), x.v.dtype, x.v.device)
    tile_k, tile_v, tiles = state_tiles(problem, launch)
    constants = common_constants(problem, x.v.dtype, without=("EXACT",))
    launching.launch(
        window_grads_kernel, levels * problem.row_groups * H * tiles,
        x.q, x.do, x.level_scales, states.sums, states.chunk_log, node_grads, segments, problem.group_sequence,
        *problem.table, states.sums.stride(0), x.q.stride(1), x.do.stride(1), x.level_scales.stride(1), x.factor,
        problem.levels, problem.row_groups, slots, **constants, BK=tile_k, BV=tile_v, SEGMENT=segment,
        HIGH_LEVELS=levels, **launch.options,
    )  # fmt: skip
    if segment_levels:
        block = min(2048, padded(K * V))
        launching.launch(
            segment_sums_kernel, segment_levels * problem.row_groups * H * cdiv(K * V, block),
            segments, states.group_log, node_grads, problem.group_sequence, *problem.table, problem.row_groups, slots,
            H=H, STATE=K * V, C=problem.config.chunk, SEGMENT=segment, BLOCK=block, PACKED=problem.packed, num_warps=4,
        )  # fmt: skip
    return node_grads


def launch_chunk_grads(problem: Problem, x: Inputs, states: States, node_grads: Tensor, gains: Gains) -> Tensor:
    """Gradients of the states of all chunks, ``[rows, H, K, V]``."""
    H, K, V = problem.heads, problem.key_width, problem.value_width
    launch = problem.config.chunk_grads
    tile_k, tile_v, tiles = state_tiles(problem, launch)
    chunk_grads = launching.scratch((problem.rows, H, K, V), x.v.dtype, x.v.device)
    constants = common_constants(problem, x.v.dtype, without=("EXACT",))
    launching.launch(
        chunk_grads_kernel, problem.row_groups * H * tiles,
        x.q, x.do, x.level_scales, states.sums, states.chunk_log, states.group_log, states.entries, node_grads,
        chunk_grads, gains.beyond, problem.group_sequence, *problem.table, states.sums.stride(0), x.q.stride(1),
        x.do.stride(1), x.level_scales.stride(1), x.factor, problem.levels, **constants,
        BK=tile_k, BV=tile_v, HAS_GATE=x.g is not None, **launch.options,
    )  # fmt: skip
    return chunk_grads


def head_blocks(problem: Problem) -> tuple[int, int]:
    """(heads that a program of the query and key sides handles in turn, number of such blocks)."""
    heads = problem.config.heads_per_program(problem.heads_per_group)
    return heads, problem.heads // heads


def launch_local_grads(problem: Problem, x: Inputs, states: States, gains: Gains) -> tuple[Tensor, Tensor]:
    """(dλ of the levels inside a chunk, gradient of the scores ``[rows, head blocks, C, C]``)."""
    chunk, launch = problem.config.chunk, problem.config.local
    heads, blocks = head_blocks(problem)
    dscales = launching.scratch(tuple(x.level_scales.shape), x.level_scales.dtype, x.v.device)
    score_grads = launching.scratch((problem.rows, blocks, chunk, chunk), x.v.dtype, x.v.device)
    launching.launch(
        local_grads_kernel, problem.rows * blocks,
        x.q, x.k, x.v, x.do, x.level_scales, states.sums, score_grads, dscales, gains.rows, gains.columns, problem.row_sequence,
        *problem.table, problem.tokens, states.sums.stride(0), x.q.stride(1), x.k.stride(1), x.v.stride(1),
        x.do.stride(1), x.level_scales.stride(1), x.factor, problem.levels, **common_constants(problem, x.v.dtype),
        LOG_C=chunk.bit_length() - 1, BK=problem.tile(problem.key_width),
        BV=min(launch.block_v, problem.tile(problem.value_width)), HEADS=heads, LEVELS=padded(problem.levels),
        HAS_GATE=x.g is not None, **launch.options,
    )  # fmt: skip
    return dscales, score_grads


def launch_value_grads(problem: Problem, x: Inputs, states: States, chunk_grads: Tensor, gains: Gains) -> Tensor:
    """dv."""
    launch = problem.config.value
    heads, blocks = head_blocks(problem)
    dv = launching.scratch(tuple(x.v.shape), x.v.dtype, x.v.device)
    launching.launch(
        value_grads_kernel, problem.rows * blocks,
        x.q, x.k, x.v, x.do, x.level_scales, states.sums, chunk_grads, dv, gains.columns, gains.chunks,
        problem.row_sequence, *problem.table, problem.tokens, states.sums.stride(0), x.q.stride(1), x.k.stride(1),
        x.v.stride(1), x.do.stride(1), x.level_scales.stride(1), x.factor, problem.levels,
        **common_constants(problem, x.v.dtype), BK=problem.tile(problem.key_width),
        BV=min(launch.block_v, problem.tile(problem.value_width)), HEADS=heads, HAS_GATE=x.g is not None,
        **launch.options,
    )  # fmt: skip
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
    launch = problem.config.query
    partial = partial_sums(problem, x.q)
    heads, blocks = head_blocks(problem)
    constants = common_constants(problem, x.v.dtype, without=("EXACT",))
    launching.launch(
        query_grads_kernel, problem.rows * blocks,
        x.q, x.k, x.do, x.level_scales, states.sums, states.entries, states.entry_log, score_grads, partial, dscales,
        gains.rows, gains.levels, problem.row_sequence, *problem.table, problem.tokens, states.sums.stride(0),
        x.q.stride(1), x.k.stride(1), x.do.stride(1), x.level_scales.stride(1), x.factor, problem.levels, **constants,
        LOG_C=problem.config.chunk.bit_length() - 1, BK=problem.tile(problem.key_width),
        BV=min(launch.block_v, problem.tile(problem.value_width)), HEADS=heads, LEVELS=padded(problem.levels),
        HAS_GATE=x.g is not None, **launch.options,
    )  # fmt: skip
    return sum_heads(partial, x.q)


def launch_key_grads(problem: Problem, x: Inputs, states: States, chunk_grads: Tensor, score_grads: Tensor) -> Tensor:
    """dk."""
    launch = problem.config.key
    partial = partial_sums(problem, x.k)
    heads, blocks = head_blocks(problem)
    launching.launch(
        key_grads_kernel, problem.rows * blocks,
        x.q, x.v, states.sums, chunk_grads, score_grads, partial, problem.row_sequence, *problem.table, problem.tokens,
        states.sums.stride(0), x.q.stride(1), x.v.stride(1), **common_constants(problem, x.v.dtype),
        BK=problem.tile(problem.key_width), BV=min(launch.block_v, problem.tile(problem.value_width)), HEADS=heads,
        **launch.options,
    )  # fmt: skip
    return sum_heads(partial, x.k)


def launch_gate_grads(problem: Problem, x: Inputs, gains: Gains) -> Tensor:
    """dg."""
    dg = launching.scratch(tuple(x.g.shape), x.g.dtype, x.g.device)
    tiles = state_tiles(problem, problem.config.chunk_grads)[2]
    launching.launch(
        gate_grads_kernel, problem.row_groups * problem.heads,
        x.g, gains.beyond, gains.levels, gains.chunks, gains.rows, gains.columns, dg, problem.group_sequence,
        *problem.table, problem.tokens, x.g.stride(1), problem.rows, problem.high_levels, H=problem.heads,
        C=problem.config.chunk, TILES=tiles, PACKED=problem.packed, num_warps=4,
    )  # fmt: skip
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of ``forward``: (dq, dk, dv, dg, dlevel_scales), each contiguous and of its input's dtype; dg None if g is.

    ``do [B, T, H, V]`` is of v's dtype; the other arguments are those of ``forward``.
    """
    config = config or scalar_gate_config(v.dtype, q.shape[3], v.shape[3], shared_memory(v.device))
    inputs = [None if x is None else token_rows(x) for x in (do, q, k, v, g, level_scales)]
    tables = packed_tables(cu_seqlens, q.shape[1], config.chunk, tree=False, first_chunks=first_chunks)
    return replay(run_backward, [*inputs, *tables], scale, config, reach)  # type: ignore[return-value]


def run_backward(inputs: list, scale: float, config: ScalarGateConfig, reach: int) -> tuple[Tensor | None, ...]:
    """The launches of ``backward``."""
    do, q, k, v, g, level_scales, *tables = inputs
    x = Inputs(q, k, v, g, level_scales, do, scale)
    problem = describe(q, v, level_scales, tuple(tables), config, reach)
    gains = allocate_gains(problem, v.device, g is not None)
    states = launch_states(problem, k, v, g, leaves=True)
    dscales, score_grads = launch_local_grads(problem, x, states, gains)
    dq = launch_query_grads(problem, x, states, score_grads, dscales, gains)
    node_grads = launch_node_grads(problem, x, states)
    chunk_grads = launch_chunk_grads(problem, x, states, node_grads, gains)
    # The entries are a third of the memory. They are freed before the results of the key side are allocated.
    states = states._replace(entries=None)
    del node_grads
    dv = launch_value_grads(problem, x, states, chunk_grads, gains)
    dk = launch_key_grads(problem, x, states, chunk_grads, score_grads)
    dg = None if g is None else launch_gate_grads(problem, x, gains)
    return dq, dk, dv, dg, dscales
