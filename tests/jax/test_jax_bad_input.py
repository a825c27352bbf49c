"""The JAX ops refuse what the PyTorch ops refuse, with the same errors: every case of tests/ops/test_bad_input.py."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import test_bad_input as shared
import torch
from jax_calls import op

import loglinear
from loglinear import jax as lj

pytestmark = pytest.mark.default_packages
# Devices are JAX's affair, offsets have no copy, positions are int32, and C is the size of the open chunk's arrays.
NOT_IN_JAX = ("elsewhere", "CPU bounds", "a position of 32 bits", "a chunk of 48", "another chunk", "open_k of another")
WORDS = {"a tensor": "an array", "tensor": "array", "torch.": "", "got Tensor": "got ArrayImpl"}


def arrays(x):
    """Tensors and states in JAX; other values as they are."""
    if isinstance(x, torch.Tensor):
        narrow = x.float() if x.dtype == torch.float8_e4m3fn else x.detach()
        return jnp.asarray(np.asarray(narrow), str(x.dtype).removeprefix("torch."))
    if isinstance(x, (loglinear.LogLinearState, loglinear.LinearState)):
        kind = getattr(lj, type(x).__name__)
        return kind(**{f.name: arrays(getattr(x, f.name)) for f in dataclasses.fields(kind)})
    return x


@pytest.mark.parametrize(
    "name", [name for name in (*shared.VALUES, *shared.TYPES) if not any(word in name for word in NOT_IN_JAX)]
)
def test_jax_refuses(name):
    exception = TypeError if name in shared.TYPES else ValueError
    changed, *words = (shared.VALUES | shared.TYPES)[name]
    changed = {"kind": "scalar", **changed}
    x = {**shared.X[changed.pop("kind")], **changed}
    with pytest.raises((TypeError, ValueError)) as raised:
        op({key: arrays(value) for key, value in x.items()})
    assert raised.type is exception, raised.value
    for word in words:
        for theirs, ours in WORDS.items():
            word = word.replace(theirs, ours)
        assert word in str(raised.value)
