"""BACKWARD with span kernels: the query side and the key side."""

from __future__ import annotations

from torch import Tensor

from loglinear.kernels.decay.backward import Gains, head_blocks, partial_sums
from loglinear.kernels.decay.forward import States
from loglinear.kernels.decay.span.forward import OPTIONS, described
from loglinear.kernels.decay.span.key_grads import span_key_grads_kernel
from loglinear.kernels.decay.span.local_grads import span_local_grads_kernel
from loglinear.kernels.decay.span.query_grads import span_query_grads_kernel
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import Inputs
from loglinear.kernels.tree.head_sums import sum_heads
from loglinear.kernels.tree.problem import Problem

LOCAL_OPTIONS = {"num_warps": 4, "maxnreg": 255}  # two programs share a multiprocessor; three spill, and take longer


def launch_local(problem: Problem, x: Inputs, states: States, gains: Gains) -> tuple[Tensor, Tensor]:
    """The results of ``launch_local_grads``."""
    heads, blocks = head_blocks(problem)
    H, G, K, V, tokens = problem.heads, problem.groups, problem.key_width, problem.value_width, problem.tokens
    dscales = launching.scratch(tuple(x.scales.shape), x.scales.dtype, x.v.device)
    score_grads = launching.scratch((problem.all_chunks, blocks, 64, 64), x.v.dtype, x.v.device)
    descriptors = (
        described(x.q, tokens, G * K, x.stride_q, 64),
        described(x.k, tokens, G * K, x.stride_k, 64),
        described(x.v, tokens, H * V, x.stride_v, 64),
        described(x.do, tokens, H * V, x.stride_do, 64),
    )
    places = *problem.of_chunks, tokens, states.sums.stride(0)
    arguments = *descriptors, x, problem.levels, states, score_grads, dscales, gains, *places
    S, programs = problem.sizes(x.v.dtype, HEADS=heads), problem.all_chunks * blocks
    launching.launch(span_local_grads_kernel, programs, *arguments, S=S, **LOCAL_OPTIONS)
    return dscales, score_grads


def launch_query_side(
    problem: Problem, x: Inputs, states: States, score_grads: Tensor, dscales: Tensor, gains: Gains
) -> Tensor:
    """dq; completes dλ and the gains of the rows, and fills those by level."""
    blocks, partial = head_blocks(problem)[1], partial_sums(problem, x.q)
    H, G, K, V, tokens = problem.heads, problem.groups, problem.key_width, problem.value_width, problem.tokens
    descriptors = (
        described(x.q, tokens, G * K, x.stride_q, 128),
        described(x.k, tokens, G * K, x.stride_k, 128),
        described(x.v, tokens, H * V, x.stride_v, 128),
        described(x.do, tokens, H * V, x.stride_do, 128),
        described(states.entries, states.entries.shape[0] * H * K, V, V, K),
    )
    sizes = *problem.of_octets, tokens, problem.all_chunks, states.sums.stride(0)
    arguments = *descriptors, x, problem.levels, states, score_grads, partial, dscales, gains, *sizes
    S = problem.sizes(x.v.dtype, HEADS=H // blocks, LEVELS=16 if problem.levels <= 16 else 32)
    launching.launch(span_query_grads_kernel, problem.all_octets * 4 * blocks, *arguments, S=S, **OPTIONS)
    return sum_heads(partial, x.q)


def launch_key_side(
    problem: Problem, x: Inputs, states: States, chunk_grads: Tensor, score_grads: Tensor, gains: Gains
) -> tuple[Tensor, Tensor]:
    """(dk, dv), from the gradients of the states at the ends of tiles; completes the gains ``columns``, fills ``chunks`` and,
    for entries of two chunks, ``beyond``.
    """
    H, G, K, V, tokens = problem.heads, problem.groups, problem.key_width, problem.value_width, problem.tokens
    blocks = head_blocks(problem)[1]
    dv, partial = launching.scratch(tuple(x.v.shape), x.v.dtype, x.v.device), partial_sums(problem, x.k)
    descriptors = (
        described(x.q, tokens, G * K, x.stride_q, 128),
        described(x.k, tokens, G * K, x.stride_k, 128),
        described(x.v, tokens, H * V, x.stride_v, 128),
        described(x.do, tokens, H * V, x.stride_do, 128),
        described(chunk_grads, chunk_grads.shape[0] * H * K, V, V, K),
        described(dv, tokens, H * V, H * V, 64),
    )
    sizes = *problem.of_octets, tokens, states.sums.stride(0)
    arguments = *descriptors, x, problem.levels, states, score_grads, partial, dv, gains, *sizes
    S = problem.sizes(x.v.dtype, HEADS=H // blocks)
    launching.launch(span_key_grads_kernel, problem.all_octets * 4 * blocks, *arguments, S=S, **OPTIONS)
    return sum_heads(partial, x.k), dv
