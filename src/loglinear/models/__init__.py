"""MODELS: a Hugging Face causal language model over every mixer. Importing this package registers it with the Auto classes."""

from typing import Any

from loglinear.extras import explained

try:
    import transformers
except ModuleNotFoundError as error:
    raise explained(error, "loglinear.models") from None
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from loglinear.models.cache import cache_nbytes, restore_cache, snapshot_cache
from loglinear.models.causal import LogLinearForCausalLM
from loglinear.models.configuration import MIXERS, LogLinearConfig
from loglinear.models.decoding import DecodingGraph
from loglinear.models.levels_file import load_levels, save_levels
from loglinear.models.lift import LiftReport, lift
from loglinear.models.modeling import LogLinearModel
from loglinear.versions import warn_untested

warn_untested()
AutoConfig.register(LogLinearConfig.model_type, LogLinearConfig, exist_ok=True)
AutoModel.register(LogLinearConfig, LogLinearModel, exist_ok=True)
AutoModelForCausalLM.register(LogLinearConfig, LogLinearForCausalLM, exist_ok=True)
library: Any = transformers
library.LogLinearForCausalLM = LogLinearForCausalLM  # where `transformers serve` looks for an architecture

__all__ = [
    "MIXERS",
    "DecodingGraph",
    "LiftReport",
    "LogLinearConfig",
    "LogLinearForCausalLM",
    "LogLinearModel",
    "cache_nbytes",
    "lift",
    "load_levels",
    "restore_cache",
    "save_levels",
    "snapshot_cache",
]
