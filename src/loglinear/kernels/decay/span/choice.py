"""CHOICE: which calls of the scalar gate the span kernels take, and why not the others."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from loglinear.kernels.tree.bundles import Inputs
from loglinear.kernels.tree.problem import Problem
from loglinear.state import CHUNK_SIZE

CAPABILITY = (9, 0)  # the products of sm_90 alone have the form that the kernels use
TRITON = ((3, 6), (3, 7))  # from, and below: Gluon is experimental, and changes names and code between releases
LEAST_ENTRY = 4  # chunks of the shortest entry that is read
KEY_WIDTHS = (64, 128)
MOST_HEADS = 12  # that a program handles in turn, at most 16
LEAST_HEADS = 4  # the fewest that are worth keeping scores for
MOST_CHUNKS = 1 << 16  # of a sequence in the backward pass, which has 14 rows of shared memory for a path
LEAST_LEVELS, MOST_LEVELS = 8, 32  # of the backward pass: one that no chunk has
TILE_ROWS = 1 << 31  # a coordinate of a TMA copy is an int32


def why_not(problem: Problem, x: Inputs, reach: int = 0) -> str | None:
    """Why the portable kernels take a call; None where the span kernels do."""
    return why_not_here(x.v.device) or why_not_sizes(problem, x.v.dtype, reach) or why_not_strides(x)


def why_not_backward(problem: Problem, x: Inputs, reach: int = 0) -> str | None:
    """The same of the kernels of the backward pass."""
    return why_not_kept(problem, x.v.dtype, x.v.device, reach) or why_not_strides(x, ("q", "k", "v", "do"))


def why_not_kept(problem: Problem, dtype: torch.dtype, device: torch.device, reach: int = 0) -> str | None:
    """Why the forward pass has no states to keep for these kernels. Only sizes and dtypes decide, and they may be symbolic."""
    if dtype != torch.bfloat16 or (problem.key_width, problem.value_width) != (128, 64):
        return "not bfloat16, K=128 and V=64"
    if problem.chunks > MOST_CHUNKS or not LEAST_LEVELS <= problem.levels <= MOST_LEVELS:
        return f"more than {MOST_CHUNKS} chunks, or {problem.levels} levels, not {LEAST_LEVELS} to {MOST_LEVELS}"
    return why_not_here(device) or why_not_sizes(problem, dtype, reach)


@lru_cache(maxsize=64)
def why_not_here(device: torch.device) -> str | None:
    """Why no call on this device can have the span kernels."""
    if device.type != "cuda" or torch.version.hip is not None or triton.knobs.runtime.interpret:
        return "the span kernels need an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return f"a GPU of compute capability {capability}, where the span kernels need {CAPABILITY}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    first, end = TRITON
    return None if first <= version < end else f"Triton {triton.__version__}, where {first} to below {end} is tested"


def why_not_sizes(problem: Problem, dtype: torch.dtype, reach: int) -> str | None:
    """Why a problem of this size does not have them."""
    if problem.tokens == 0:
        return "no tokens"
    K, V, rows = problem.key_width, problem.value_width, problem.all_chunks * problem.heads * problem.key_width
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype}, where the span kernels take 16 bits"
    if K not in KEY_WIDTHS or V % 64:
        return f"K={K}, V={V}, where the span kernels take K in {KEY_WIDTHS} and V a multiple of 64"
    if divisors(problem)[-1] < LEAST_HEADS:
        return f"{problem.heads_per_group} heads a group, where span kernels share the scores of {LEAST_HEADS} or more"
    if problem.config.chunk != CHUNK_SIZE:
        return f"chunks of {problem.config.chunk} tokens, where the span kernels take {CHUNK_SIZE}"
    if reach > 0:
        return "sequences that go on from earlier tokens"
    return None if rows < TILE_ROWS else f"{rows} rows of states, where TMA takes fewer than {TILE_ROWS}"


def why_not_strides(x: Inputs, names: tuple[str, ...] = ("q", "k", "v")) -> str | None:
    """Why TMA cannot read the inputs where they are."""
    for name in names:
        tensor: Tensor = getattr(x, name)
        if tensor.data_ptr() % 16 or tensor.stride(1) * tensor.element_size() % 16:
            return f"{name} whose tokens do not begin at multiples of 16 bytes"
    return None


def heads_of_program(problem: Problem) -> int:
    """Heads that one program handles in turn: a divisor of the heads of a group, fewer where programs would be too few.

    They share scores and nothing else, so results do not depend on their number.
    """
    shared, tiles = [n for n in divisors(problem) if n >= LEAST_HEADS], problem.all_octets * 4
    return max((n for n in shared if tiles * (problem.heads // n) >= 128), default=shared[0])


def divisors(problem: Problem) -> list[int]:
    """The divisors of the heads of a group, up to ``MOST_HEADS``."""
    shared = problem.heads_per_group
    return [n for n in range(1, min(MOST_HEADS, shared) + 1) if shared % n == 0]
