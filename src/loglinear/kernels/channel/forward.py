"""FORWARD of the gate per channel: three launches."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from loglinear.kernels.channel.decays import sums_kernel
from loglinear.kernels.channel.entries import entries_kernel
from loglinear.kernels.channel.output import output_kernel
from loglinear.kernels.channel.scores import scores_kernel
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import Inputs, gather
from loglinear.kernels.tree.problem import Problem, cdiv, describe, packed_tables, token_rows
from loglinear.kernels.tuning import ChannelConfig, Launch, channel_config, widths


class Prepared(NamedTuple):
    """The facts about the chunks that depend on no λ and no value. A *chunk* is a chunk of a sequence; logs in base 2.

    chunk_log: ``[chunks, H, K]`` float32.
    sums: ``[B*T, H, 1 or 2, K]`` float32, running sums of the gates inside each chunk; for float32 inputs with their rounding
        errors; None once nothing more reads them.
    q, k: ``[B*T, H, K]`` of v's dtype, queries as seen from the start of their chunk, keys as seen from its end.
    scores: ``[chunks, H, C, C]`` of v's dtype, under their decays, zero above the diagonal.
    starts, overlaps: for the delta rule, keys as seen from the start of their chunk, as k, and the scores of keys with keys
        ``[chunks, H, C, C]`` float32, the diagonal not finite for a token that is not.
    """

    chunk_log: Tensor
    sums: Tensor | None
    q: Tensor | None
    k: Tensor | None
    scores: Tensor | None
    starts: Tensor | None = None
    overlaps: Tensor | None = None


class States(NamedTuple):
    """``scores`` and ``chunk_log`` as above.

    entries: ``[chunks, H, K, V]``, the Fenwick array. entry_log: ``[chunks, H, K]``.
    """

    scores: Tensor | None
    chunk_log: Tensor
    entries: Tensor | None
    entry_log: Tensor


def tile_sizes(problem: Problem, launch: Launch, tiles: str) -> dict[str, int]:
    """Tiles of K and V; with no "k" in ``tiles`` all of K in one."""
    wide_k, wide_v = problem.tile(problem.key_width), problem.tile(problem.value_width)
    return {"BK": min(launch.block_k or wide_k, wide_k) if "k" in tiles else wide_k, "BV": min(launch.block_v, wide_v)}


def start(
    kernel, problem: Problem, launch: Launch, dtype, arguments, *numbers, tiles="", each=1, constants=None, **sizes
) -> None:
    """Launch a kernel of ``each`` programs for each chunk and head, times the ``tiles`` of "k", of "v" or of both, "kv".

    arguments: all that stands before the place of a chunk in the kernel; numbers: all that stands after it. sizes: in place of
    those of ``tile_sizes``. dtype: of v.
    """
    sizes = tile_sizes(problem, launch, tiles) | sizes
    counts = {"k": cdiv(problem.key_width, sizes["BK"]), "v": cdiv(problem.value_width, sizes["BV"])}
    programs = problem.all_chunks * problem.heads * each * prod(counts[tile] for tile in tiles)
    options = {"S": problem.sizes(dtype, **sizes), **(constants or {}), **launch.options}
    launching.launch(kernel, programs, *arguments, *problem.of_chunks, *numbers, **options)


def prepared_shapes(problem: Problem, dtype: torch.dtype, delta: bool) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of the tensors of ``Prepared``."""
    H, K, C = problem.heads, problem.key_width, problem.config.chunk
    tokens, squares = (problem.tokens, H, K), (problem.all_chunks, H, C, C)
    logs = (problem.all_chunks, H, K), (problem.tokens, H, 2 if dtype == torch.float32 else 1, K)
    shapes = [*((log, torch.float32) for log in logs), (tokens, dtype), (tokens, dtype), (squares, dtype)]
    return shapes + [(tokens, dtype), (squares, torch.float32)] * delta


def launch_scores(problem: Problem, x: Inputs) -> Prepared:
    """The prepared chunks, with the running sums of their gates."""
    launch, dtype = problem.config.scores, x.v.dtype
    shapes = prepared_shapes(problem, dtype, x.beta is not None)
    made = Prepared(*(launching.scratch(*y, x.v.device) for y in shapes))
    gates = x._replace(q=None, k=None, v=None, beta=None, scales=None, do=None)
    of_sums = Launch(warps=4, stages=1, block_k=64)  # 0.15 ms, and 0.25 with 128 columns (H200, B=2, T=16,384, H=16)
    start(sums_kernel, problem, of_sums, dtype, (gates, made.sums), tiles="k")
    given = x._replace(g=None, v=None, scales=None, do=None), made
    start(scores_kernel, problem, launch, dtype, given, **tile_sizes(problem, launch, "k"), HEADS=problem.heads)
    return made


def decayed(x: Inputs, made: Prepared) -> Inputs:
    """The inputs of the stages between: decayed queries and keys, a pair for each value head, and no gate."""
    q, k = made.q.unsqueeze(1), made.k.unsqueeze(1)  # type: ignore[union-attr]
    return x._replace(q=q, k=k, g=None, stride_q=made.q.stride(0), stride_k=made.k.stride(0), stride_g=None)


def launch_entries(problem: Problem, x: Inputs, made: Prepared) -> States:
    """The Fenwick array."""
    H, K, V, dtype, device = problem.heads, problem.key_width, problem.value_width, x.v.dtype, x.v.device
    entries = launching.scratch((problem.all_chunks, H, K, V), dtype, device)
    entry_log = launching.scratch((problem.all_chunks, H, K), torch.float32, device)
    arguments = x._replace(q=None, scales=None, do=None), made.chunk_log, entries, entry_log
    start(entries_kernel, problem, problem.config.entries, dtype, arguments, problem.levels, tiles="kv")
    return States(made.scores, made.chunk_log, entries, entry_log)


def launch_output(problem: Problem, x: Inputs, states: States) -> Tensor:
    """o, from the chunks themselves and the entries before them."""
    o = launching.scratch(tuple(x.v.shape), x.v.dtype, x.v.device)
    arguments = x._replace(k=None, do=None), states, o
    start(output_kernel, problem, problem.config.output, x.v.dtype, arguments, problem.levels, tiles="v")
    return o


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    level_scales: Tensor,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    config: ChannelConfig | None = None,
) -> tuple[Tensor]:
    """Log-linear attention with a gate per key channel, from nothing before the first token.

    Args:
        q, k: ``[B, T, G, K]`` of v's dtype. v: ``[B, T, H, V]``, bfloat16, float16 or float32.
        g: ``[B, T, H, K]`` natural log-decay <= 0, any floating dtype; -inf is a reset of its channel.
        level_scales: λ ``[B, T, H, L]``, any floating dtype. scale: factor of o.
        cu_seqlens: ``[n+1]`` on the same device, for a batch of one. config: None is the tuned one.

    Returns:
        o ``[B, T, H, V]`` of v's dtype, contiguous, alone.
    """
    config = config or channel_config(v.dtype, *widths(q, v))
    inputs = [token_rows(x) for x in (q, k, v, g, level_scales)]
    tables = packed_tables(cu_seqlens, q.shape[1], config.chunk, tree=False)
    return launching.replay(run_forward, [*inputs, *tables], scale, config)


def run_forward(inputs: list, scale: float, config: ChannelConfig) -> tuple[Tensor]:
    """The launches of ``forward``."""
    q, k, v, g, level_scales, *tables = inputs
    problem = describe(q, v, level_scales, tuple(tables), config)
    x = gather(q, k, v, g, None, level_scales, None, scale)
    made = launch_scores(problem, x)._replace(sums=None)
    x = decayed(x, made)
    return (launch_output(problem, x, launch_entries(problem, x, made)),)
