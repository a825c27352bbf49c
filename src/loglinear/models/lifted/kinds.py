"""KINDS: which linear mixers can be lifted, and how one is recognised."""

from __future__ import annotations

import re

from torch import nn

from loglinear.models.lifted.gated_deltanet import (
    LiftedInterleavedDeltaNet,
    LiftedOlmoDeltaNet,
    LiftedSeparateDeltaNet,
)
from loglinear.models.lifted.kda import LiftedKDA
from loglinear.models.lifted.lightning import LiftedLightning
from loglinear.models.lifted.mamba2 import LiftedMamba2
from loglinear.models.lifted.mixer import LiftedMixer

# By the class of the original, in transformers.
KINDS: dict[str, type[LiftedMixer]] = {
    "Mamba2Mixer": LiftedMamba2,
    "BambaMixer": LiftedMamba2,
    "GraniteMoeHybridMambaLayer": LiftedMamba2,
    "NemotronHMamba2Mixer": LiftedMamba2,
    "Zamba2MambaMixer": LiftedMamba2,
    "FalconH1Mixer": LiftedMamba2,
    "Qwen3NextGatedDeltaNet": LiftedInterleavedDeltaNet,
    "Qwen3_5GatedDeltaNet": LiftedSeparateDeltaNet,
    "Qwen3_5MoeGatedDeltaNet": LiftedSeparateDeltaNet,
    "Qwen4ExpTextGatedDeltaNet": LiftedSeparateDeltaNet,
    "OlmoHybridGatedDeltaNet": LiftedOlmoDeltaNet,
    "KimiLinearDeltaAttention": LiftedKDA,
    "Glm5NextTextLinearAttention": LiftedKDA,
    "BailingHybridDeltaAttention": LiftedKDA,
    "MiniMaxLightningAttention": LiftedLightning,
}

SOFTMAX = ("KimiLinearAttention",)  # by its name a linear mixer
_LINEAR = re.compile(
    r"(Mamba\w*(Mixer|Layer)|DeltaNet|DeltaAttention|Linear\w*Attention|LightningAttention|RecurrentBlock|Retention"
    r"|(Rwkv|RWKV)\w*(Attention|SelfAttention)|MambaMixer)$"
)


def kind_of(original: nn.Module) -> type[LiftedMixer] | None:
    """The lifted form of a module; None for a module that is no linear mixer.

    Raises ValueError for a linear mixer without one.
    """
    kind, origin = type(original).__name__, type(original).__module__
    if kind in KINDS:
        if not origin.startswith("transformers."):
            raise ValueError(f"its class must be that of transformers: got one of {origin}")
        return KINDS[kind]
    if kind in SOFTMAX:
        return None
    if "A_log" in original._parameters or (_LINEAR.search(kind) and "DecoderLayer" not in kind):
        raise ValueError(f"linear mixer must be one of {list(KINDS)}: got {kind}")
    return None


def is_attention(module: nn.Module) -> bool:
    """Whether the module is softmax attention, by its name."""
    return type(module).__name__.endswith("Attention")
