"""Public functions on tensors. ``log_linear_attention`` (scalar gate), ``log_linear_delta_rule``, and their states."""

from loglinear.ops.attention import log_linear_attention, log_linear_delta_rule
from loglinear.state import LinearState, LogLinearState

__all__ = ["LinearState", "LogLinearState", "log_linear_attention", "log_linear_delta_rule"]
