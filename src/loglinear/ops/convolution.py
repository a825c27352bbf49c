"""``loglinear::convolution``: the short convolution's kernels as autograd and PyTorch's compiler see them."""

from __future__ import annotations

from torch import Tensor

from loglinear import kernels
from loglinear.ops import checks, dispatch
from loglinear.ops.operators import Operator, like

MAX_TAPS = 7


def has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take these inputs: CUDA, at most 32 bits, at most 7 taps."""
    what, taps = "the short convolution", weight.shape[1]
    if checks.transforming() or not dispatch.on_kernels(what, x):
        return False
    return taps <= MAX_TAPS or dispatch.plain(what, f"{taps} taps, where the kernel takes up to {MAX_TAPS}")


# ``silu(bias + Σ_j weight[:, W-1-j] · x_{t-j})`` ``[B, T, channels]``, as ``kernels.pointwise.convolution.forward``.
convolve = Operator(
    "convolution",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? place",
    1,
    lambda *inputs: [kernels.pointwise.convolution.forward(*inputs)],
    lambda *inputs: kernels.pointwise.convolution.backward(*inputs),
    lambda x, *others: like(x),
)
