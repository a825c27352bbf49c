"""LiftedMamba2: the Mamba-2 mixers of transformers, which differ in their norms, time steps and multipliers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from loglinear.layers.mamba2 import LogLinearMamba2
from loglinear.models.lifted.mixer import LiftedMixer, check_convolution


class LiftedMamba2(LiftedMixer, LogLinearMamba2):
    """``Mamba2Mixer`` and the mixers of Bamba, Granite 4, Nemotron-H, Zamba2 and Falcon-H1, log-linear.

    Their code clamps the time step in prefill and in training, and not in its step of one token. This mixer always clamps.
    """

    parts = frozenset({"in_proj", "conv1d", "act", "dt_bias", "A_log", "D", "norm", "out_proj", "mup_vector"})

    @classmethod
    def fields(cls, original: Any) -> dict[str, Any]:
        check_convolution(original.conv1d)
        if original.activation not in ("silu", "swish"):
            raise ValueError(f"activation of the convolution must be 'silu': got {original.activation!r}")
        inner = original.num_heads * original.head_dim
        if inner != original.intermediate_size:
            raise ValueError(
                f"intermediate_size must be num_heads · head_dim = {inner}: got {original.intermediate_size}"
            )
        limit = getattr(original, "time_step_limit", None)
        return {
            "hidden_size": original.hidden_size,
            "num_heads": original.num_heads,
            "head_dim": original.head_dim,
            "state_size": original.ssm_state_size,
            "num_groups": original.n_groups,
            "conv_width": original.conv_kernel_size,
            "conv_activation": original.activation,
            "dt_limit": limit,
            "in_multiplier": getattr(original, "ssm_in_multiplier", 1.0),
            **norm_fields(original.norm),
        }

    def column_scale(self) -> Tensor | None:
        mup_vector = self._buffers.get("mup_vector")
        return None if mup_vector is None else mup_vector.flatten()


def norm_fields(norm: Any) -> dict[str, Any]:
    """The arguments of ``LogLinearMamba2`` for an output norm; ``Identity`` stands where there is the gate alone.

    Raises ValueError for a norm of an unknown class.
    """
    if isinstance(norm, nn.Identity):
        return {"norm": False}
    known = type(norm).__name__.endswith("RMSNormGated") and hasattr(norm, "variance_epsilon")
    if not known or [*norm._parameters] != ["weight"] or norm._modules:
        raise ValueError(f"norm must be a gated RMSNorm with a weight, or Identity: got {type(norm).__name__}")
    width = norm.weight.shape[0]
    if hasattr(norm, "group_size"):
        groups = width // norm.group_size
    else:
        groups = getattr(norm, "n_groups", 1)  # transformers 5.17 has neither in most models, and one mean over all
    return {
        "norm_eps": norm.variance_epsilon,
        "norm_groups": groups,
        "norm_before_gate": getattr(norm, "norm_before_gate", False),
    }
