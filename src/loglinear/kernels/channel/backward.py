"""BACKWARD of the gate per channel: its launches, in the order in which the gradients flow."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from loglinear.kernels.channel.entries import chunk_grads_kernel, entries_kernel
from loglinear.kernels.channel.forward import States, decayed, launch_entries, launch_scores, start, tile_sizes
from loglinear.kernels.channel.gains import window_sums_kernel
from loglinear.kernels.channel.gate_grads import gate_grads_kernel
from loglinear.kernels.channel.key_grads import key_grads_kernel
from loglinear.kernels.channel.local_grads import local_grads_kernel
from loglinear.kernels.channel.query_grads import query_grads_kernel
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import Inputs, gather
from loglinear.kernels.tree.head_sums import sum_heads
from loglinear.kernels.tree.levels import SUB
from loglinear.kernels.tree.problem import Problem, cdiv, describe, packed_tables, padded, token_rows
from loglinear.kernels.tuning import ChannelConfig, channel_config, widths


class Gradients(NamedTuple):
    """Gradients between the stages; None before they are made and after they are used.

    q, k: of the decayed queries and keys ``[B*T, H, K]``. entries, chunks: of the Fenwick array and of the state at the end
    of each chunk ``[chunks, H, K, V]``. window_log: log-decay of an entry's window ``[chunks, H, K]``. levels, beyond:
    gains of gates, see query_grads and chunk_grads. around: gains ``[chunks, H, C / 16, K]`` of the pairs of two chunks around
    each block of 16 tokens, or around its chunk.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    entries: Tensor | None = None
    chunks: Tensor | None = None
    window_log: Tensor | None = None
    levels: Tensor | None = None
    beyond: Tensor | None = None
    around: Tensor | None = None


def around_shape(problem: Problem) -> tuple[int, ...]:
    """The shape of ``Gradients.around``."""
    return problem.all_chunks, problem.heads, problem.config.chunk // SUB.value, problem.key_width


def launch_local_grads(problem: Problem, x: Inputs, states: States) -> tuple[Tensor, Tensor]:
    """(gradient of the scores ``[chunks, H, C, C]``, dλ, complete for the levels inside a chunk)."""
    launch, C, dtype = problem.config.local_grads, problem.config.chunk, x.v.dtype
    score_grads = launching.scratch((problem.all_chunks, problem.heads, C, C), dtype, x.v.device)
    dscales = launching.scratch(tuple(x.scales.shape), x.scales.dtype, x.v.device)
    arguments = x._replace(q=None, k=None), states._replace(entries=None), score_grads, dscales
    start(local_grads_kernel, problem, launch, dtype, arguments, problem.levels, LEVELS=padded(problem.levels))
    return score_grads, dscales


def launch_query_grads(problem: Problem, x: Inputs, states: States, dscales: Tensor) -> Gradients:
    """The gradients of the decayed queries, and gains by level; completes dλ."""
    H, K, dtype, device = problem.heads, problem.key_width, x.v.dtype, x.v.device
    dq = launching.scratch((problem.tokens, H, K), dtype, device)
    levels = launching.scratch((problem.tree_levels, problem.all_chunks, H, K), torch.float32, device)
    around = launching.scratch(around_shape(problem), torch.float32, device)
    grads, launch = Gradients(q=dq, levels=levels, around=around), problem.config.query_grads
    arguments = x._replace(k=None, v=None), states._replace(scores=None), grads, dscales
    start(query_grads_kernel, problem, launch, dtype, arguments, problem.levels, LEVELS=padded(problem.levels))
    return grads


def launch_tree_grads(problem: Problem, x: Inputs, states: States, grads: Gradients) -> Gradients:
    """The gradients of all entries and of the states of all chunks, and the gains of pairs that skip a chunk."""
    H, K, V, dtype, device = problem.heads, problem.key_width, problem.value_width, x.v.dtype, x.v.device
    launch, N = problem.config.entries, problem.all_chunks
    entries = launching.scratch((N, H, K, V), dtype, device)
    found = Gradients(entries=entries, window_log=launching.scratch((N, H, K), torch.float32, device))
    arguments = x._replace(k=None, v=None), states.chunk_log, entries, found.window_log
    start(entries_kernel, problem, launch, dtype, arguments, problem.levels, tiles="kv")
    tiles_v = cdiv(V, tile_sizes(problem, launch, "kv")["BV"])
    beyond = launching.scratch((tiles_v, N, H, K), torch.float32, device)
    found = found._replace(chunks=launching.scratch((N, H, K, V), dtype, device), beyond=beyond)
    kept = states._replace(scores=None, chunk_log=None)
    start(chunk_grads_kernel, problem, launch, dtype, (kept, found), N, tiles="kv")
    levels = Gradients(levels=grads.levels)
    start(window_sums_kernel, problem, replace(launch, warps=1), dtype, (levels,), N, tiles="k")
    return grads._replace(chunks=found.chunks, beyond=beyond)


def launch_key_grads(problem: Problem, x: Inputs, states: States, grads: Gradients) -> tuple[Tensor, Gradients]:
    """dv, and the gradients of the decayed keys."""
    launch, dtype, levels = problem.config.key_grads, x.v.dtype, problem.levels
    dv = launching.scratch(tuple(x.v.shape), dtype, x.v.device)
    dk = launching.scratch((problem.tokens, problem.heads, problem.key_width), dtype, x.v.device)
    arguments = x._replace(q=None), states._replace(entries=None), grads._replace(q=None, k=dk), dv
    numbers = levels, grads.beyond.shape[0]
    start(key_grads_kernel, problem, launch, dtype, arguments, *numbers, LEVELS=padded(levels))
    return dv, Gradients(q=grads.q, k=dk, around=grads.around)


class Results(NamedTuple):
    """Where the gradients of the inputs go, with the distance of two tokens.

    dq and dk are ``[H/G, B*T, G, K]``: float32 partial sums, or the result if H == G.
    """

    dq: Tensor
    dk: Tensor
    dg: Tensor
    stride_dq: int
    stride_dk: int
    stride_dg: int


def launch_gate_grads(
    problem: Problem, x: Inputs, sums: Tensor, score_grads: Tensor, grads: Gradients, out: Results, planes: int = 1
) -> None:
    """dq, dk and dg of the inputs."""
    given = x._replace(v=None, do=None, scales=None)
    arguments = given, sums, score_grads, grads, out, out.dq.stride(0)
    shape = {"tiles": "k", "each": problem.config.chunk // SUB.value, "HEADS": sums.stride(0) // sums.stride(1)}
    start(
        gate_grads_kernel,
        problem,
        problem.config.gate_grads,
        x.v.dtype,
        arguments,
        constants={"PLANES": planes},
        **shape,
    )


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    level_scales: Tensor,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    config: ChannelConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``forward``: (dq, dk, dv, dg, dlevel_scales), each contiguous and of its input's dtype.

    ``do [B, T, H, V]`` is of v's dtype; the other arguments are those of ``forward``.
    """
    config = config or channel_config(v.dtype, *widths(q, v))
    inputs = [token_rows(x) for x in (do, q, k, v, g, level_scales)]
    tables = packed_tables(cu_seqlens, q.shape[1], config.chunk, tree=False)
    return launching.replay(run_backward, [*inputs, *tables], scale, config)


def run_backward(inputs: list, scale: float, config: ChannelConfig) -> tuple[Tensor, ...]:
    """The launches of ``backward``."""
    do, q, k, v, g, level_scales, *tables = inputs
    problem = describe(q, v, level_scales, tuple(tables), config)
    given = gather(q, k, v, g, None, level_scales, do, scale)
    made = launch_scores(problem, given)
    x = decayed(given, made)
    states = launch_entries(problem, x, made)
    score_grads, dscales = launch_local_grads(problem, x, states)
    grads = launch_query_grads(problem, x, states, dscales)
    grads = launch_tree_grads(problem, x, states, grads)
    states = states._replace(entries=None)
    dv, grads = launch_key_grads(problem, x, states, grads)
    parts = problem.heads_per_group
    shape = (parts, problem.tokens, problem.groups, problem.key_width)
    dq, dk = (launching.scratch(shape, y.dtype if parts == 1 else torch.float32, y.device) for y in (q, k))
    dg = launching.scratch(tuple(g.shape), g.dtype, g.device)
    out = Results(dq, dk, dg, dq.stride(1), dk.stride(1), dg.stride(1))
    launch_gate_grads(problem, given, made.sums, score_grads, grads, out)
    return sum_heads(dq, q), sum_heads(dk, k), dv, dg, dscales
