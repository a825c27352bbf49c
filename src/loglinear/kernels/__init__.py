"""Triton kernels, without autograd and without argument checks. Nothing here imports Triton before a kernel is asked for."""


def installed() -> bool:
    """Whether Triton can be imported. Importing loglinear does not look for it."""
    from loglinear.kernels.installation import INSTALLED

    return INSTALLED
