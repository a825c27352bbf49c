"""MODELS: a Hugging Face causal language model over every mixer. Importing this package registers it with the Auto classes."""

from typing import Any

from loglinear.extras import explained

try:
    import transformers
except ModuleNotFoundError as error:
    raise explained(error, "loglinear.models") from None
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

from loglinear.layers.table import MIXERS
from loglinear.models.cache import cache_nbytes, restore_cache, snapshot_cache
from loglinear.models.causal import LogLinearForCausalLM
from loglinear.models.configuration import LogLinearConfig, opened_as_ours
from loglinear.models.decoding import DecodingGraph
from loglinear.models.foreign.conversion import ConversionReport, convert
from loglinear.models.foreign.options import TRANSLATIONS
from loglinear.models.levels_file import load_levels, save_levels
from loglinear.models.lift import LiftReport, lift
from loglinear.models.modeling import LogLinearModel
from loglinear.versions import warn_untested

warn_untested()
AutoConfig.register(LogLinearConfig.model_type, LogLinearConfig, exist_ok=True)
AutoModel.register(LogLinearConfig, LogLinearModel, exist_ok=True)
AutoModelForCausalLM.register(LogLinearConfig, LogLinearForCausalLM, exist_ok=True)
for kind in TRANSLATIONS:
    if kind not in CONFIG_MAPPING:  # transformers' own models, and those of a library that is imported, stay theirs
        AutoConfig.register(kind, opened_as_ours(kind))
library: Any = transformers
library.LogLinearForCausalLM = LogLinearForCausalLM  # where `transformers serve` looks for an architecture

__all__ = [
    "MIXERS",
    "ConversionReport",
    "DecodingGraph",
    "LiftReport",
    "LogLinearConfig",
    "LogLinearForCausalLM",
    "LogLinearModel",
    "cache_nbytes",
    "convert",
    "lift",
    "load_levels",
    "restore_cache",
    "save_levels",
    "snapshot_cache",
]
