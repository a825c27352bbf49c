"""Log-linear attention in JAX: the ops, states and steps of ``loglinear``, without PyTorch and without Triton.

``pip install 'loglinear[jax]'``. Start at ``log_linear_attention`` and ``log_linear_delta_rule``.
"""

from loglinear.jax.foreign import use_torch
from loglinear.jax.ops import log_linear_attention, log_linear_delta_rule
from loglinear.jax.state import LinearState, LogLinearState, empty_state, slots_for
from loglinear.jax.step import log_linear_attention_step, log_linear_delta_rule_step

__all__ = [
    "LinearState",
    "LogLinearState",
    "empty_state",
    "log_linear_attention",
    "log_linear_attention_step",
    "log_linear_delta_rule",
    "log_linear_delta_rule_step",
    "slots_for",
    "use_torch",
]
