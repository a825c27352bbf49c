"""FORWARD with the span output: what the host allocates, describes and launches."""

from __future__ import annotations

from torch import Tensor
from triton.experimental.gluon.language._layouts import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from loglinear.kernels.decay.forward import States
from loglinear.kernels.decay.span.choice import heads_of_program
from loglinear.kernels.decay.span.output import span_output_kernel
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import Inputs
from loglinear.kernels.tree.problem import Problem

LOCAL_LEVELS = 9  # inside a span
OPTIONS = {"num_warps": 4, "maxnreg": 128}


def described(x: Tensor, rows: int, columns: int, stride: int, block: int) -> TensorDescriptor:
    """Tiles ``[block, 64]`` of a matrix ``[rows, columns]`` of 16-bit numbers, whose rows are ``stride`` numbers apart."""
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(x, [rows, columns], [stride, 1], [block, 64], layout)


def launch_span_output(problem: Problem, x: Inputs, states: States) -> Tensor:
    """o, from tokens and from the entries of ``LEAST_ENTRY`` chunks or more."""
    H, G, K, V, tokens = problem.heads, problem.groups, problem.key_width, problem.value_width, problem.tokens
    heads = heads_of_program(problem)
    o = launching.scratch(tuple(x.v.shape), x.v.dtype, x.v.device)
    descriptors = (
        described(x.q, tokens, G * K, x.stride_q, 128),
        described(x.k, tokens, G * K, x.stride_k, 128),
        described(x.v, tokens, H * V, x.stride_v, 128),
        described(states.entries, states.entries.shape[0] * H * K, V, V, K),
        described(o, tokens, H * V, H * V, 64),
    )
    arguments = *descriptors, x, problem.levels, states, o, *problem.of_octets, states.sums.stride(0)
    programs = problem.all_octets * 4 * (H // heads)
    S = problem.sizes(x.v.dtype, HEADS=heads, LEVELS=min(problem.levels, LOCAL_LEVELS))
    launching.launch(span_output_kernel, programs, *arguments, S=S, CHECKS=states.checks.shape[2], **OPTIONS)
    return o
