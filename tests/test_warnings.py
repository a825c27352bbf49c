"""Warnings are errors in this suite, but for those of others that say nothing about the library."""

import warnings

import pytest

OTHERS = [
    "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the primary context...",
    "The AccumulateGrad node's stream does not match the stream of the node that produced the incoming gradient. This may",
    "Benchmarks are automatically disabled because xdist plugin is active.Benchmarks cannot be performed reliably in a",
]


@pytest.mark.parametrize("message", OTHERS)
def test_warnings_of_others_pass(message):
    """The first two end a backward pass on a GPU, the last one the whole run."""
    warnings.warn(message, stacklevel=1)


def test_any_other_warning_is_an_error():
    with pytest.raises(UserWarning, match="anything else"):
        warnings.warn("anything else", stacklevel=1)
