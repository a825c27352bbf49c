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
NOT_IN_JAX = (
    "on the device of q",
    "cu_seqlens_cpu",
    "initial_state.position must be",
    "initial_state.chunk_size",
    "initial_state.open_k",
)
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


CASES = [(kind, *case) for kind, cases in ((ValueError, shared.VALUES), (TypeError, shared.TYPES)) for case in cases]


@pytest.mark.parametrize("case", [case for case in CASES if not any(word in case[2] for word in NOT_IN_JAX)])
def test_jax_refuses(case):
    exception, changed, *words = case
    changed = {"kind": "scalar", **changed}
    x = {**shared.X[changed.pop("kind")], **changed}
    with pytest.raises((TypeError, ValueError)) as raised:
        op({key: arrays(value) for key, value in x.items()})
    assert raised.type is exception, raised.value
    for word in words:
        for theirs, ours in WORDS.items():
            word = word.replace(theirs, ours)
        assert word in str(raised.value)
