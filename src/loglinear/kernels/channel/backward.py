"""BACKWARD of the gate per channel: its launches, in the order in which the gradients flow."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from loglinear.kernels.channel.entries import chunk_grads_kernel
from loglinear.kernels.channel.forward import Launcher, States, decayed, launch_entries, launch_scores
from loglinear.kernels.channel.gains import window_sums_kernel
from loglinear.kernels.channel.gate_grads import gate_grads_kernel
from loglinear.kernels.channel.key_grads import key_grads_kernel
from loglinear.kernels.channel.local_grads import local_grads_kernel
from loglinear.kernels.channel.query_grads import query_grads_kernel
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import Inputs, Results, gather, results_of
from loglinear.kernels.tree.head_sums import partial_sums, sum_heads
from loglinear.kernels.tree.levels import SUB
from loglinear.kernels.tree.problem import cdiv, describe, packed_tables, padded
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


def around(call: Launcher) -> Tensor:
    """Memory for ``Gradients.around``."""
    problem = call.problem
    blocks = problem.config.chunk // SUB.value
    return call.memory(problem.all_chunks, problem.heads, blocks, problem.key_width, dtype=torch.float32)


def launch_gate_grads(
    call: Launcher, x: Inputs, sums: Tensor, score_grads: Tensor, grads: Gradients, out: Results, planes: int = 1
) -> None:
    """dq, dk and dg of the inputs."""
    arguments = x._replace(v=None, do=None, scales=None), sums, score_grads, grads, out, out.dq.stride(0)
    sizes = {"each": call.config.chunk // SUB.value, "HEADS": sums.stride(0) // sums.stride(1), "PLANES": planes}
    call.start(gate_grads_kernel, call.config.gate_grads, arguments, tiles="k", **sizes)


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
    tables = packed_tables(cu_seqlens, q.shape[1], config.chunk, tree=False)
    return launching.replay(run_backward, [do, q, k, v, g, level_scales, *tables], scale, config, rows=6)


def run_backward(inputs: list, scale: float, config: ChannelConfig) -> tuple[Tensor, ...]:
    """The launches of ``backward``."""
    do, q, k, v, g, level_scales, *tables = inputs
    problem = describe(q, v, level_scales, tuple(tables), config)
    given = gather(q, k, v, g, None, level_scales, do, scale)
    call, N, L = Launcher(problem, v.dtype, v.device), problem.all_chunks, problem.levels
    made = launch_scores(call, given)
    x, of_rows = decayed(given, made), {"LEVELS": padded(L)}
    entries = launch_entries(call, x._replace(q=None, scales=None, do=None), made.chunk_log)
    states = States(made.scores, made.chunk_log, *entries)

    score_grads, dscales = call.memory(*made.scores.shape), call.memory(*level_scales.shape, dtype=level_scales.dtype)
    arguments = x._replace(q=None, k=None), states._replace(entries=None), score_grads, dscales
    call.start(local_grads_kernel, config.local_grads, arguments, L, **of_rows)
    grads = Gradients(q=call.memory(*made.q.shape), levels=call.logs(problem.tree_levels), around=around(call))
    arguments = x._replace(k=None, v=None), states._replace(scores=None), grads, dscales
    call.start(query_grads_kernel, config.query_grads, arguments, L, **of_rows)

    entries, window_log = launch_entries(call, x._replace(k=None, v=None), made.chunk_log)
    tiles = cdiv(problem.value_width, min(config.entries.block_v, problem.tile(problem.value_width)))
    ends = Gradients(entries=entries, window_log=window_log, chunks=call.states(), beyond=call.logs(tiles))
    arguments = states._replace(scores=None, chunk_log=None), ends
    call.start(chunk_grads_kernel, config.entries, arguments, N, tiles="kv")
    call.start(window_sums_kernel, replace(config.entries, warps=1), (Gradients(levels=grads.levels),), N, tiles="k")
    grads, states = grads._replace(chunks=ends.chunks, beyond=ends.beyond), states._replace(entries=None)
    del entries, ends, arguments  # a third of the memory

    dv, dk = call.memory(*v.shape), call.memory(*made.k.shape)
    arguments = x._replace(q=None), states, grads._replace(q=None, k=dk), dv
    call.start(key_grads_kernel, config.key_grads, arguments, L, tiles, **of_rows)
    found = Gradients(q=grads.q, k=dk, around=grads.around)
    del grads, arguments
    dq, dk, dg = partial_sums(problem, q), partial_sums(problem, k), call.memory(*g.shape, dtype=g.dtype)
    launch_gate_grads(call, given, made.sums, score_grads, found, results_of(dq, dk, dg=dg))
    return sum_heads(dq, q), sum_heads(dk, k), dv, dg, dscales
