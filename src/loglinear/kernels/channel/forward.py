"""FORWARD of the gate per channel: three launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loglinear.kernels.channel.decays import sums_kernel
from loglinear.kernels.channel.entries import entries_kernel
from loglinear.kernels.channel.output import output_kernel
from loglinear.kernels.channel.scores import scores_kernel
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import Inputs, gather
from loglinear.kernels.tree.problem import Problem, cdiv, describe, packed_tables
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


@dataclass(frozen=True)
class Launcher:
    """Starts the kernels of a call whose v is of ``dtype``, and allocates what stands between them."""

    problem: Problem
    dtype: torch.dtype
    device: torch.device

    @property
    def config(self) -> Any:
        return self.problem.config

    def memory(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return launching.scratch(shape, dtype or self.dtype, self.device)

    def logs(self, *shape: int) -> Tensor:
        """Memory for ``[*shape, chunks, H, K]``, float32."""
        problem = self.problem
        return self.memory(*shape, problem.all_chunks, problem.heads, problem.key_width, dtype=torch.float32)

    def states(self) -> Tensor:
        """Memory for ``[chunks, H, K, V]``."""
        problem = self.problem
        return self.memory(problem.all_chunks, problem.heads, problem.key_width, problem.value_width)

    def start(self, kernel, launch: Launch, arguments: tuple, *numbers: int, tiles="", each=1, PLANES=None, **sizes):
        """``each`` programs for each chunk and head, times the ``tiles`` of "k", of "v" or of both; else all of K is one tile.

        arguments: all that stands before the place of a chunk in the kernel; numbers: all that stands after it. sizes: beside
        those of tiles, or in their place.
        """
        problem = self.problem
        K, V = problem.key_width, problem.value_width
        wide_k, wide_v = problem.tile(K), problem.tile(V)
        tile_k = min(launch.block_k or wide_k, wide_k) if "k" in tiles else wide_k
        sizes = {"BK": tile_k, "BV": min(launch.block_v, wide_v)} | sizes
        count = {"": 1, "k": cdiv(K, sizes["BK"]), "v": cdiv(V, sizes["BV"])}
        programs = problem.all_chunks * problem.heads * each * count[tiles[:1]] * count[tiles[1:]]
        options = launch.options if PLANES is None else {"PLANES": PLANES, **launch.options}
        S = problem.sizes(self.dtype, **sizes)
        launching.launch(kernel, programs, *arguments, *problem.of_chunks, *numbers, S=S, **options)


def prepared_shapes(problem: Problem, dtype: torch.dtype, delta: bool) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of the tensors of ``Prepared``."""
    H, K, C = problem.heads, problem.key_width, problem.config.chunk
    tokens, squares = (problem.tokens, H, K), (problem.all_chunks, H, C, C)
    logs = (problem.all_chunks, H, K), (problem.tokens, H, 2 if dtype == torch.float32 else 1, K)
    shapes = [*((log, torch.float32) for log in logs), (tokens, dtype), (tokens, dtype), (squares, dtype)]
    return shapes + [(tokens, dtype), (squares, torch.float32)] * delta


def launch_scores(call: Launcher, x: Inputs) -> Prepared:
    """The prepared chunks, with the running sums of their gates."""
    problem, launch = call.problem, call.config.scores
    shapes = prepared_shapes(problem, call.dtype, x.beta is not None)
    made = Prepared(*(call.memory(*shape, dtype=dtype) for shape, dtype in shapes))
    gates = x._replace(q=None, k=None, v=None, beta=None, scales=None, do=None)
    of_sums = Launch(warps=4, stages=1, block_k=64)  # 0.15 ms, and 0.25 with 128 columns (H200, B=2, T=16,384, H=16)
    call.start(sums_kernel, of_sums, (gates, made.sums), tiles="k")
    wide = problem.tile(problem.key_width)
    tile = {"BK": min(launch.block_k or wide, wide), "HEADS": problem.heads}
    call.start(scores_kernel, launch, (x._replace(g=None, v=None, scales=None, do=None), made), **tile)
    return made


def decayed(x: Inputs, made: Prepared) -> Inputs:
    """The inputs of the stages between: decayed queries and keys, a pair for each value head, and no gate."""
    q, k = made.q.unsqueeze(1), made.k.unsqueeze(1)  # type: ignore[union-attr]
    return x._replace(q=q, k=k, g=None, stride_q=made.q.stride(0), stride_k=made.k.stride(0), stride_g=None)


def launch_entries(call: Launcher, x: Inputs, chunk_log: Tensor) -> tuple[Tensor, Tensor]:
    """The Fenwick array or, from x without keys, the gradients of its entries: ``[chunks, H, K, V]``, and the log of each."""
    made = call.states(), call.logs()
    call.start(entries_kernel, call.config.entries, (x, chunk_log, *made), call.problem.levels, tiles="kv")
    return made


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
    tables = packed_tables(cu_seqlens, q.shape[1], config.chunk, tree=False)
    return launching.replay(run_forward, [q, k, v, g, level_scales, *tables], scale, config, rows=5)


def run_forward(inputs: list, scale: float, config: ChannelConfig) -> tuple[Tensor]:
    """The launches of ``forward``."""
    q, k, v, g, level_scales, *tables = inputs
    call = Launcher(describe(q, v, level_scales, tuple(tables), config), v.dtype, v.device)
    x = gather(q, k, v, g, None, level_scales, None, scale)
    made = launch_scores(call, x)._replace(sums=None)
    x = decayed(x, made)
    entries = launch_entries(call, x._replace(q=None, scales=None), made.chunk_log)
    o = call.memory(*v.shape)
    arguments = x._replace(k=None), States(made.scores, made.chunk_log, *entries), o
    call.start(output_kernel, config.output, arguments, call.problem.levels, tiles="v")
    return (o,)
