"""Triton kernels, without autograd and without argument checks. Nothing here imports Triton before a kernel is asked for."""

from functools import cache
from importlib.util import find_spec


@cache
def installed() -> bool:
    """Whether Triton is there to be imported."""
    return find_spec("triton") is not None
