"""Log-linear attention: O(T log T) training and O(log T) decoding, between linear attention and softmax attention.

The op is ``log_linear_attention`` (scalar gate) or ``log_linear_delta_rule``; ``loglinear.layers`` has the mixers and
``loglinear.models`` the Hugging Face model. ``loglinear.jax`` is the same library for JAX. Importing this package
imports nothing else: the names below import torch when they are asked for, and no Triton, no GPU, no transformers.
Where transformers is installed, its Auto classes know the model from then on.
"""

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from loglinear.auto_classes import register_with_auto_classes
from loglinear.extras import explained

if TYPE_CHECKING:
    from loglinear.models import LiftReport as LiftReport
    from loglinear.models import LogLinearConfig as LogLinearConfig
    from loglinear.models import LogLinearForCausalLM as LogLinearForCausalLM
    from loglinear.models import LogLinearModel as LogLinearModel
    from loglinear.models import load_levels as load_levels
    from loglinear.models import save_levels as save_levels
    from loglinear.models.lift import lift as lift
    from loglinear.ops import DecodingState as DecodingState
    from loglinear.ops import LinearState as LinearState
    from loglinear.ops import LogLinearState as LogLinearState
    from loglinear.ops import log_linear_attention as log_linear_attention
    from loglinear.ops import log_linear_attention_step as log_linear_attention_step
    from loglinear.ops import log_linear_delta_rule as log_linear_delta_rule
    from loglinear.ops import log_linear_delta_rule_step as log_linear_delta_rule_step

__version__ = "0.2.0"

# These import transformers, when asked for.
_MODELS = (
    "LiftReport",
    "LogLinearConfig",
    "LogLinearForCausalLM",
    "LogLinearModel",
    "lift",
    "load_levels",
    "save_levels",
)
_PACKAGES = (
    "decoding_state",
    "kernels",
    "ops",
    "reference",
    "state",
    "transition",
)  # attributes without an import of their own

__all__ = [  # these import torch
    "DecodingState",
    "LinearState",
    "LogLinearState",
    "log_linear_attention",
    "log_linear_attention_step",
    "log_linear_delta_rule",
    "log_linear_delta_rule_step",
]


if not TYPE_CHECKING:  # a checker knows the names above, and reports every other

    def __getattr__(name: str):
        if name in _PACKAGES:
            return import_module(f"loglinear.{name}")
        if name not in (*_MODELS, *__all__):
            raise AttributeError(f"module 'loglinear' has no attribute {name!r}")
        try:
            return getattr(import_module("loglinear.models" if name in _MODELS else "loglinear.ops"), name)
        except ModuleNotFoundError as error:
            raise explained(error, f"loglinear.{name}") from None


register_with_auto_classes(partial(import_module, "loglinear.models"))
