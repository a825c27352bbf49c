"""Log-linear attention: O(T log T) training and O(log T) decoding, between linear attention and softmax attention.

The op is ``log_linear_attention`` (scalar gate) or ``log_linear_delta_rule``; ``loglinear.layers`` has the mixers and
``loglinear.models`` the Hugging Face model. Importing this package needs torch alone: no Triton, no GPU, no transformers.
"""

from importlib import import_module

from loglinear.ops import (
    DecodingState,
    LinearState,
    LogLinearState,
    log_linear_attention,
    log_linear_attention_step,
    log_linear_delta_rule,
    log_linear_delta_rule_step,
)

__version__ = "0.1.0"

# These import transformers, when asked for.
_MODELS = ("LiftReport", "LogLinearConfig", "LogLinearForCausalLM", "LogLinearModel", "lift")

__all__ = [
    "DecodingState",
    "LinearState",
    "LogLinearState",
    "log_linear_attention",
    "log_linear_attention_step",
    "log_linear_delta_rule",
    "log_linear_delta_rule_step",
]


def __getattr__(name: str):
    if name in _MODELS:
        return getattr(import_module("loglinear.models"), name)
    raise AttributeError(f"module 'loglinear' has no attribute {name!r}")
