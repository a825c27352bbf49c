"""Warnings are errors in this suite, but for some of others, and two of ours that tests cause by their sizes and dtypes."""

import warnings

import pytest

PASSING = [
    "log_linear_attention runs in plain PyTorch on the GPU, not in a kernel: float64 inputs, where kernels take",
    "q of log_linear_attention has shape [2, 1, 2, 3], fewer tokens (T=1) than heads (G=2): all inputs must be",
    "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the primary context...",
    "The AccumulateGrad node's stream does not match the stream of the node that produced the incoming gradient. This may",
    "Benchmarks are automatically disabled because xdist plugin is active.Benchmarks cannot be performed reliably in a",
]


@pytest.mark.parametrize("message", PASSING)
def test_these_warnings_pass(message):
    """PyTorch's two would end a backward pass on a GPU, the last one the whole run."""
    warnings.warn(message, stacklevel=1)


def test_any_other_warning_is_an_error():
    with pytest.raises(UserWarning, match="anything else"):
        warnings.warn("anything else", stacklevel=1)
