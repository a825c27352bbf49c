"""FORWARD of the scalar gate: three launches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loglinear.kernels.decay.chunk_states import chunk_states_kernel, chunk_sums_kernel
from loglinear.kernels.decay.node_states import node_states_kernel
from loglinear.kernels.decay.output import output_kernel
from loglinear.kernels.decay.span import choice as span
from loglinear.kernels.devices import shared_memory
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import Inputs, gather
from loglinear.kernels.tree.problem import Problem, cdiv, describe, packed_tables, padded, sizes_of_tables
from loglinear.kernels.tuning import Launch, ScalarGateConfig, scalar_gate_config, widths

LEAST_ENTRY = 2  # chunks of the shortest entry that ``output`` reads


class States(NamedTuple):
    """The facts about the chunks that depend on no query. Chunks are those of all sequences; logs in base 2.

    The backward builds it again, but for that of span kernels, which is a fourth as large and is kept (``kept_layout``).

    sums: ``[H, planes, B*T]`` float32, cumulative log-decay inside each chunk. chunk_log, entry_log: ``[chunks, H]`` float32.
    octet_log: ``[octets, H]``. entries: ``[chunks, H, K, V]``, the Fenwick array, or a fourth of its rows (least of 4).
    octet_states: ``[octets, H, K, V]``.
    checks: ``[octets, H, tiles]`` float32, finite where the tokens of an octet are.
    """

    sums: Tensor
    chunk_log: Tensor
    entry_log: Tensor
    octet_log: Tensor
    entries: Tensor | None
    octet_states: Tensor | None
    checks: Any  # a tensor, or None in the backward pass

    @classmethod
    def of(cls, problem: Problem, dtype: torch.dtype, floats: Tensor, entries: Tensor) -> States:
        """From the tensors of ``kept_layout``, as the backward pass takes it."""
        pieces = zip(shapes_of_floats(problem, dtype), floats.split(sizes_of_floats(problem, dtype)))
        fields = (piece[: math.prod(shape)].view(shape) for shape, piece in pieces)
        return cls(*fields, entries, None, None)


def state_tiles(problem: Problem, launch: Launch) -> tuple[int, int, int]:
    """(BK, BV, number of tiles) of kernels whose program owns a tile of a state."""
    K, V = problem.key_width, problem.value_width
    tile_k, tile_v = min(problem.config.block_k, problem.tile(K)), min(launch.block_v, problem.tile(V))
    return tile_k, tile_v, cdiv(K, tile_k) * cdiv(V, tile_v)


def launch_states(problem: Problem, x: Inputs, least: int) -> tuple[States, tuple[Tensor, ...]]:
    """The entries of the Fenwick array that have ``least`` chunks or more: those inside octets, and then the longer ones.

    Returns the tensors of ``kept_layout`` besides.
    """
    launch = problem.config.states
    H, dtype, device, every = problem.heads, x.v.dtype, x.v.device, least if least == 4 else 1
    tile_k, tile_v, tiles = state_tiles(problem, launch)
    kept = tuple(launching.scratch(*layout, device) for layout in kept_layout(problem, dtype, every))
    octet_states = launching.scratch((problem.all_octets, H, problem.key_width, problem.value_width), dtype, device)
    checks = launching.scratch((problem.all_octets, H, tiles), torch.float32, device)
    states = States.of(problem, dtype, *kept)._replace(octet_states=octet_states, checks=checks)
    arguments = x, states, *problem.of_octets, problem.tokens, states.sums.stride(0)
    S = problem.sizes(dtype, BK=tile_k, BV=tile_v)
    if least == 4:
        launch_chunk_sums(problem, x, states)
    launching.launch(
        chunk_states_kernel, problem.all_octets * H * tiles, *arguments, S=S, LEAST=least, **launch.options
    )
    launch_node_states(problem, states, dtype, every)
    return states._replace(octet_states=None), kept  # a kernel that is given them would keep their memory


def shapes_of_floats(problem: Problem, dtype: torch.dtype) -> list[tuple[int, ...]]:
    """The shapes of the float32 fields of ``States`` before ``entries``."""
    H, chunks, octets = problem.heads, problem.all_chunks, problem.all_octets
    return [(H, 2 if dtype == torch.float32 else 1, problem.tokens), (chunks, H), (chunks, H), (octets, H)]


def sizes_of_floats(problem: Problem, dtype: torch.dtype) -> list[int]:
    """Their elements, and as many more that each begins at a multiple of 16 bytes."""
    return [-(-math.prod(shape) // 4) * 4 for shape in shapes_of_floats(problem, dtype)]


def kept_layout(problem: Problem, dtype: torch.dtype, every: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of the fields of ``States`` up to ``entries``: of all that are float32 in one, and of the entries.

    every: chunks that share a row of the entries. Two tensors cost a call's host less than five.
    """
    rows = max(problem.all_chunks // every, 1)  # there must be one for TMA
    entries = rows, problem.heads, problem.key_width, problem.value_width
    return [((sum(sizes_of_floats(problem, dtype)),), torch.float32), (entries, dtype)]


def launch_chunk_sums(problem: Problem, x: Inputs, states: States) -> None:
    """``sums`` and ``chunk_log``."""
    heads = min(padded(problem.heads), 16)
    programs, S = problem.all_chunks * cdiv(problem.heads, heads), problem.sizes(x.v.dtype)
    arguments = x, states, *problem.of_chunks, states.sums.stride(0)
    launching.launch(chunk_sums_kernel, programs, *arguments, S=S, HEADS=heads, num_warps=4)


def launch_node_states(problem: Problem, states: States, dtype: torch.dtype, every: int) -> None:
    """Entries of two octets or more; ``every``: chunks that share a row of the entries."""
    if problem.sequence_octets < 2:
        return
    state = problem.key_width * problem.value_width
    block = min(2048, padded(state))
    programs = problem.all_octets * problem.heads * cdiv(state, block)
    sizes = problem.sizes(dtype)
    launching.launch(
        node_states_kernel, programs, states, *problem.of_octets, S=sizes, BLOCK=block, EVERY=every, num_warps=4
    )


def launch_output(problem: Problem, x: Inputs, states: States) -> Tensor:
    """o, from the chunks themselves and the entries before them."""
    launch, tree, tiles = problem.config.output, padded(problem.tree_levels), states.checks.shape[2]
    tile_v = min(launch.block_v, problem.tile(problem.value_width))
    programs = problem.all_chunks * problem.heads * cdiv(problem.value_width, tile_v)
    o = launching.scratch(tuple(x.v.shape), x.v.dtype, x.v.device)
    arguments = x, problem.levels, states, o, *problem.of_chunks, problem.tokens, states.sums.stride(0)
    S = problem.sizes(x.v.dtype, BK=problem.tile(problem.key_width), BV=tile_v)
    launching.launch(output_kernel, programs, *arguments, S=S, TREE=tree, TILES=tiles, **launch.options)
    return o


def forward(
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
    keep: bool = False,
) -> tuple[Tensor, ...]:
    """Log-linear attention with a scalar gate, from nothing before the first token.

    Args:
        q, k: ``[B, T, G, K]`` of v's dtype. v: ``[B, T, H, V]``, bfloat16, float16 or float32.
        g: ``[B, T, H]`` natural log-decay <= 0, any floating dtype; -inf is a reset. None is no decay.
        level_scales: λ ``[B, T, H, L]``, any floating dtype. scale: factor of o.
        cu_seqlens: ``[n+1]``, for a batch of one, on the same device or on the CPU. config: None is the tuned one.
        first_chunks: ``[n]`` integers, with cu_seqlens: how many chunks of ``CHUNK_SIZE`` tokens stand before each sequence in
            a longer one. It has the chunks and levels of the longer one, and sees nothing before itself.
        reach: with first_chunks, a bound on the positions of all tokens; results do not depend on it.

    Returns:
        o ``[B, T, H, V]`` of v's dtype, contiguous; with ``keep`` also tensors that save ``backward`` some work: none where its
        kernels read others.
    """
    inputs = [q, k, v, g, level_scales, *tables_of(q, v, cu_seqlens, config, first_chunks)]
    return launching.replay(run_forward, inputs, scale, config, reach, keep, rows=5)


def kept_shapes(
    q: Tensor,
    v: Tensor,
    level_scales: Tensor,
    cu_seqlens: Tensor | None = None,
    config: ScalarGateConfig | None = None,
    channels: bool = False,
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of what ``forward`` with ``keep`` returns after o. Nothing is computed: the tensors may be fake.

    Sizes may be symbolic, except the widths of heads. The number of tensors is then a guard on these sizes.
    """
    if channels or span.why_not_here(v.device) is not None:
        return []
    problem = describe(q, v, level_scales, sizes_of_tables(cu_seqlens), tuned(config, q, v))
    kept = span.why_not_kept(problem, v.dtype, v.device) is None
    return kept_layout(problem, v.dtype, span.LEAST_ENTRY) if kept else []


def tuned(config: ScalarGateConfig | None, q: Tensor, v: Tensor) -> ScalarGateConfig:
    """The configuration; None is the tuned one for such inputs."""
    return config or scalar_gate_config(v.dtype, *widths(q, v), shared_memory(v.device))


def tables_of(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, config: ScalarGateConfig | None, first_chunks: Tensor | None
) -> tuple[Tensor, ...]:
    """The tables of packed sequences, on the device of q; arguments as in ``forward``."""
    if cu_seqlens is None:
        return ()
    tables = packed_tables(cu_seqlens, q.shape[1], tuned(config, q, v).chunk, tree=False, first_chunks=first_chunks)
    return tuple(x.to(q.device, non_blocking=True) for x in tables)


def run_forward(
    inputs: list, scale: float, config: ScalarGateConfig | None, reach: int, keep: bool
) -> tuple[Tensor, ...]:
    """The launches of ``forward``."""
    q, k, v, g, level_scales, *tables = inputs
    problem = describe(q, v, level_scales, tuple(tables), tuned(config, q, v), reach)
    x = gather(q, k, v, g, None, level_scales, None, scale)
    keep = keep and span.why_not_kept(problem, v.dtype, v.device, reach) is None
    spans = span.why_not(problem, x, reach) is None
    states, kept = launch_states(problem, x, span.LEAST_ENTRY if spans or keep else LEAST_ENTRY)
    kept = kept if keep else ()
    if not spans:
        return launch_output(problem, x, launch_states(problem, x, LEAST_ENTRY)[0] if keep else states), *kept
    from loglinear.kernels.decay.span import forward as of_spans  # Triton has Gluon there

    return of_spans.launch_span_output(problem, x, states), *kept
