"""Triton kernels, without autograd and without argument checks. Nothing here imports Triton before a kernel is asked for.

A room, as ``kernels.decoding``, is imported when it is first named.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    try:
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def installed() -> bool:
    """Whether Triton can be imported. Importing loglinear does not look for it."""
    from loglinear.kernels.installation import INSTALLED

    return INSTALLED
