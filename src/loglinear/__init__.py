"""Log-linear attention: O(T log T) training and O(log T) decoding, between linear attention and softmax attention.

The op is ``log_linear_attention`` (scalar gate) or ``log_linear_delta_rule``; ``loglinear.layers`` has the mixers and
``loglinear.models`` the Hugging Face model. Importing this package needs torch alone: no Triton, no GPU, no transformers.
Where transformers is installed, its Auto classes know the model from then on.
"""

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from loglinear.auto_classes import register_with_auto_classes
from loglinear.extras import explained
from loglinear.ops import (
    DecodingState,
    LinearState,
    LogLinearState,
    log_linear_attention,
    log_linear_attention_step,
    log_linear_delta_rule,
    log_linear_delta_rule_step,
)

if TYPE_CHECKING:
    from loglinear.models import LiftReport as LiftReport
    from loglinear.models import LogLinearConfig as LogLinearConfig
    from loglinear.models import LogLinearForCausalLM as LogLinearForCausalLM
    from loglinear.models import LogLinearModel as LogLinearModel
    from loglinear.models import load_levels as load_levels
    from loglinear.models import save_levels as save_levels
    from loglinear.models.lift import lift as lift

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

__all__ = [
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
        if name in _MODELS:
            try:
                return getattr(import_module("loglinear.models"), name)
            except ModuleNotFoundError as error:
                raise explained(error, f"loglinear.{name}") from None
        raise AttributeError(f"module 'loglinear' has no attribute {name!r}")


register_with_auto_classes(partial(import_module, "loglinear.models"))
