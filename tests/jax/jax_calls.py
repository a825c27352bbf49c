"""The JAX ops called as the oracle is: PyTorch's tensors in, PyTorch's tensors out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch

from loglinear.jax import (
    log_linear_attention,
    log_linear_attention_step,
    log_linear_delta_rule,
    log_linear_delta_rule_step,
)

DTYPES = {torch.bfloat16: jnp.bfloat16}


def to_jax(x):
    """One tensor, or all of a dictionary, also where NumPy does not know the dtype."""
    if isinstance(x, dict):
        return {name: to_jax(y) for name, y in x.items()}
    x = x.detach()
    return jnp.asarray(x.float().numpy(), DTYPES[x.dtype]) if x.dtype in DTYPES else jnp.asarray(x.numpy())


def to_torch(x):
    return torch.from_numpy(np.array(x, np.float64))


def op(x, **kwargs):
    """``(o, final_state)``: the delta rule when there is a beta."""
    function = log_linear_delta_rule if "beta" in x else log_linear_attention
    return function(**{"g": None, "level_scales": None, **x}, **kwargs)


def step(x, state, **kwargs):
    function = log_linear_delta_rule_step if "beta" in x else log_linear_attention_step
    return function(**{"g": None, "level_scales": None, **x}, state=state, **kwargs)


@partial(jax.jit, static_argnames="options")
def _with_gradients(x, weights, arrays, options):
    o, pull = jax.vjp(lambda x: op(x, **arrays, **dict(options))[0], x)
    return o, pull(weights.astype(o.dtype))[0]


def with_gradients(x, arrays=None, **options):
    """o and the gradients by name, of the weighting of ``oracle.gradients``, from one compilation."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(x["v"].shape, generator=generator, dtype=torch.float64)
    o, grads = _with_gradients(to_jax(x), to_jax(weights), arrays or {}, tuple(options.items()))
    return to_torch(o), {name: to_torch(grads[name]) for name in x}, o.dtype


def tokens(x, *part):
    return {name: y[:, slice(*part)] for name, y in x.items()}
