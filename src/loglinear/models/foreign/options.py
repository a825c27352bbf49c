"""OPTIONS: the config.json of another library as fields of ``LogLinearConfig``.

A layout reads its options one by one. An option that our models lack raises a ValueError that names it. An option that no
layout knows is a warning, because it may change the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

LEVELS_CONTEXT = 16_384  # tokens that the 15 levels of both published layouts cover
SILU = ("silu", "swish")
REQUIRED: Any = object()
# Options of training, of kernels and of caches: they change no logits.
NEUTRAL = (
    *("fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp", "attn_mode"),
    *("chunk_size", "conv_init", "A_init_range", "rescale_prenorm_residual", "residual_in_fp32", "use_output_norm"),
    *("dt_min", "dt_max", "dt_init_floor", "time_step_min", "time_step_max", "time_step_floor", "time_step_rank"),
    *("auto_map", "dtype", "torch_dtype", "_name_or_path", "_attn_implementation_autoset"),
)
CARRIED = ("initializer_range", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id")


class Options:
    """The options in one config.json. ``given`` is its content. Options that are read are known from then on."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given, self.kind = given, given.get("model_type")
        self.known = {*PreTrainedConfig().to_dict(), *NEUTRAL, *CARRIED}

    def __call__(self, *names: str, default: Any = REQUIRED) -> Any:
        """The value of an option that goes by several names; ``default`` where none is given."""
        self.known.update(names)
        found = {name: self.given[name] for name in names if name in self.given}
        values = list(found.values())
        if not values:
            if default is REQUIRED:
                raise ValueError(f"config.json (model_type {self.kind!r}) must hold {names[0]}: got none")
            return default
        if any(value != values[0] for value in values[1:]):
            raise ValueError(f"config.json must hold one value for {' and '.join(found)}: got {found}")
        return values[0]

    def expect(self, *names: str, allowed: tuple[Any, ...] = (), default: Any = REQUIRED) -> None:
        """Raise ValueError unless an option has an allowed value. The default is allowed."""
        value = self(*names, default=default)
        if value not in allowed and value != default:
            wanted = [*allowed] or [default]
            raise ValueError(
                f"config.json must hold {names[0]}={' or '.join(map(repr, wanted))}, because our models have no other: "
                f"got {value!r}"
            )

    def unknown(self) -> list[str]:
        """Options that nothing has read."""
        return sorted(self.given.keys() - self.known)


def _shared(options: Options, eps: float) -> dict[str, Any]:
    """Fields that every layout has."""
    options.expect("hidden_act", allowed=SILU, default="silu")
    options.expect("attnres_block_size", default=None)
    given = options.given
    fields = {name: given[name] for name in CARRIED if name in given}
    dtype = given.get("dtype", given.get("torch_dtype"))
    return fields | {
        "vocab_size": options("vocab_size"),
        "hidden_size": options("hidden_size"),
        "num_hidden_layers": options("num_hidden_layers"),
        "rms_norm_eps": options("norm_eps", "layer_norm_epsilon", default=eps),
        "tie_word_embeddings": options("tie_word_embeddings", default=False),
        **({} if dtype is None else {"dtype": dtype}),
    }


def _mlp(options: Options) -> dict[str, Any]:
    """The width of the MLP: 2/3 of ``hidden_ratio`` times the hidden size, up to a multiple of 256."""
    ratio, width = options("hidden_ratio", default=4), options("intermediate_size", default=None)
    if width is None:
        width = -(-int(options("hidden_size") * (4 if ratio is None else ratio) * 2 / 3) // 256) * 256
    return {"intermediate_size": width}


def _mamba2(options: Options, linear: bool) -> dict[str, Any]:
    """Fields of a Mamba-2 mixer and of the model around it."""
    inner = int(options("expand", default=2) * options("hidden_size"))
    head_dim = options("head_dim", default=64)
    heads = options("num_heads", default=None) or inner // head_dim
    if heads * head_dim != inner:
        raise ValueError(
            f"config.json must hold num_heads and head_dim whose product is expand · hidden_size, {inner}: got {heads} "
            f"and {head_dim}"
        )
    options.expect("use_bias", default=False)
    options.expect("use_conv_bias", default=True)
    options.expect("rmsnorm", "rms_norm", default=True)
    options.expect("norm_before_gate", default=False)
    options.expect("D_has_hdim", default=False)
    options.expect("dt_limit", "time_step_limit", allowed=([0.0, float("inf")],), default=(0.0, float("inf")))
    groups = options("n_groups", default=1)
    if groups != 1:
        raise ValueError(f"config.json must hold n_groups=1: got {groups}")
    return _shared(options, 1e-5) | {
        "mixer": "mamba2" if linear else "log_linear_mamba2",
        "max_position_embeddings": LEVELS_CONTEXT,
        "conv_size": options("conv_kernel", default=4),
        "mamba_head_dim": head_dim,
        "mamba_num_heads": heads,
        "mamba_state_size": options("state_size", default=128),
        "mamba_num_groups": groups,
    }


def log_linear_mamba2(options: Options) -> dict[str, Any]:
    """The paper's Log-Linear Mamba-2, which flash-linear-attention has too."""
    return _mamba2(options, linear=False) | _mlp(options)


def log_linear_gated_deltanet(options: Options) -> dict[str, Any]:
    """The paper's Log-Linear Gated DeltaNet."""
    options("max_position_embeddings", default=None)  # no number of levels follows from it there
    return _gated_deltanet(options) | {
        "mixer": "log_linear_gated_deltanet",
        "max_position_embeddings": LEVELS_CONTEXT,
    }


def _gated_deltanet(options: Options) -> dict[str, Any]:
    """Fields of a Gated DeltaNet mixer and of the model around it."""
    options.expect("attn", default=None)
    options.expect("use_gate", default=True)
    options.expect("use_short_conv", default=True)
    options.expect("conv_bias", default=False)
    options.expect("allow_neg_eigval", default=False)
    options.expect("output_gate_activation", allowed=SILU, default="swish")
    heads, key_dim = options("num_heads"), options("head_dim")
    return (
        _shared(options, 1e-6)
        | _mlp(options)
        | {
            "conv_size": options("conv_size", default=4),
            "delta_num_key_heads": heads,
            "delta_num_heads": options("num_v_heads", default=None) or heads,
            "delta_key_dim": key_dim,
            "delta_value_dim": int(key_dim * options("expand_v", default=2)),
        }
    )


TRANSLATIONS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "h_gated_deltanet": log_linear_gated_deltanet,
    "hattention": log_linear_mamba2,
    "log_linear_mamba2": log_linear_mamba2,
}
LINEAR = ("mamba2", "gated_deltanet", "delta_net")  # layouts of linear models


def is_foreign(given: dict[str, Any]) -> bool:
    """Whether the content of a config.json is that of a layout of another library that can be opened."""
    return given.get("model_type") in TRANSLATIONS


def translated(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of ``LogLinearConfig`` for the content of a config.json of another library. Anything else comes back as it is.

    Warns of options that no layout knows. Raises ValueError for an option that our models lack.
    """
    if not is_foreign(given):
        return given
    options = Options(given)
    fields = TRANSLATIONS[given["model_type"]](options)
    if unknown := options.unknown():
        reason = (
            f"config.json (model_type {options.kind!r}) has options that loglinear does not know: {', '.join(unknown)}"
        )
        warnings.warn(f"{reason}; the model may differ from the original", UserWarning, stacklevel=2)
    return {"model_type": "loglinear", "architectures": ["LogLinearForCausalLM"], **fields}
