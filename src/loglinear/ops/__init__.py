"""Public functions on tensors: ``log_linear_attention`` (scalar gate), ``log_linear_delta_rule``, their steps and states."""

from loglinear.decoding_state import DecodingState
from loglinear.ops.attention import log_linear_attention, log_linear_delta_rule
from loglinear.ops.step import log_linear_attention_step, log_linear_delta_rule_step
from loglinear.state import LinearState, LogLinearState

__all__ = [
    "DecodingState",
    "LinearState",
    "LogLinearState",
    "log_linear_attention",
    "log_linear_attention_step",
    "log_linear_delta_rule",
    "log_linear_delta_rule_step",
]
