"""OPTIONS: the config.json of another library as fields of ``LogLinearConfig``.

A layout reads its options one by one. An option that our models lack raises a ValueError that names it. An option that no
layout knows is a warning, because it may change the model.
"""

from __future__ import annotations

import math
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
    *("auto_map", "dtype", "torch_dtype"),
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
        """Options that nothing has read. Names with an underscore are notes of transformers to itself."""
        return sorted(name for name in self.given.keys() - self.known if not name.startswith("_"))


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


def _mlp(options: Options, usual_ratio: int = 4) -> dict[str, Any]:
    """The width of the MLP: 2/3 of ``hidden_ratio`` times the hidden size, up to a multiple of 256."""
    ratio, width = options("hidden_ratio", default=usual_ratio), options("intermediate_size", default=None)
    if width is None:
        width = -(-int(options("hidden_size") * (4 if ratio is None else ratio) * 2 / 3) // 256) * 256
    return {"intermediate_size": width}


def _mamba2(options: Options) -> dict[str, Any]:
    """Fields of a Mamba-2 mixer and of the model around it, with the names of flash-linear-attention and transformers."""
    inner = int(options("expand") * options("hidden_size"))
    head_dim, groups = options("head_dim"), options("n_groups")
    heads = options("num_heads", default=None) or inner // head_dim
    if heads * head_dim != inner:
        raise ValueError(
            f"config.json must hold num_heads and head_dim whose product is expand · hidden_size, {inner}: got {heads} "
            f"and {head_dim}"
        )
    limit = options("dt_limit", "time_step_limit", default=None)
    return _shared(options, 1e-5) | {
        "max_position_embeddings": LEVELS_CONTEXT,
        "conv_size": options("conv_kernel"),
        "mamba_head_dim": head_dim,
        "mamba_num_heads": heads,
        "mamba_state_size": options("state_size"),
        "mamba_num_groups": groups,
        "mamba_norm_groups": groups,
        "mamba_use_bias": options("use_bias", default=False),
        "mamba_conv_bias": options("use_conv_bias", default=True),
        "mamba_norm": options("rmsnorm", "rms_norm", default=True),
        "mamba_norm_before_gate": options("norm_before_gate", default=False),
        "mamba_skip_per_channel": options("D_has_hdim", default=False),
        "mamba_dt_limit": None if limit is None or list(limit) == [0.0, math.inf] else list(limit),
    }


def mamba2(options: Options) -> dict[str, Any]:
    """Mamba-2: no MLP."""
    return _mamba2(options) | {"mixer": "mamba2", "intermediate_size": 0}


def log_linear_mamba2(options: Options) -> dict[str, Any]:
    """Log-Linear Mamba-2, the paper's and flash-linear-attention's; its MLPs have one width."""
    fields = _mamba2(options) | _mlp(options) | {"mixer": "log_linear_mamba2"}
    return fields | {"level_scale_bias": fields["mamba_use_bias"]}


def _delta(options: Options, key_dim: int) -> dict[str, Any]:
    """Fields of a mixer of the delta rule and of the model around it."""
    gate, taps = options("output_gate_activation", default="silu"), options("conv_size", default=4)
    return (
        _shared(options, 1e-6)
        | _mlp(options)
        | {
            "max_position_embeddings": options("max_position_embeddings", default=2048),
            "conv_size": taps if options("use_short_conv", default=True) else 0,
            "delta_num_heads": options("num_heads"),
            "delta_num_key_heads": options("num_heads"),
            "delta_key_dim": key_dim,
            "delta_conv_bias": options("conv_bias", default=False),
            "delta_gate_activation": gate if options("use_gate") else None,
            "delta_neg_eigval": options("allow_neg_eigval", default=False),
        }
    )


def _scaled_queries(fields: dict[str, Any], key_dim: str = "delta_key_dim") -> dict[str, Any]:
    """The norm behind queries that are multiplied by K^-1/2: its eps is K times as large where they are not."""
    return {"mixer_norm_eps": fields["rms_norm_eps"] * fields[key_dim]}


def _gated_deltanet(options: Options) -> dict[str, Any]:
    fields = _delta(options, options("head_dim"))
    heads = options("num_v_heads", default=None) or fields["delta_num_heads"]
    width = int(fields["delta_key_dim"] * options("expand_v"))
    return fields | {"delta_num_heads": heads, "delta_value_dim": width}


def log_linear_gated_deltanet(options: Options) -> dict[str, Any]:
    """The paper's Log-Linear Gated DeltaNet. It scales queries by K^-1/2 and λ by the inverse."""
    options.expect("attn", default=None)
    fields = _gated_deltanet(options)
    return fields | {"mixer": "log_linear_gated_deltanet", "max_position_embeddings": LEVELS_CONTEXT}


def gated_deltanet(options: Options) -> dict[str, Any]:
    """flash-linear-attention's Gated DeltaNet, with softmax attention in some layers or in none."""
    fields = _gated_deltanet(options)
    return fields | _scaled_queries(fields) | _hybrid(options)


def delta_net(options: Options) -> dict[str, Any]:
    """flash-linear-attention's DeltaNet: no decay."""
    heads, hidden = options("num_heads"), options("hidden_size")
    fields = _delta(options, round(hidden * options("expand_k")) // heads) | {
        "delta_value_dim": round(hidden * options("expand_v")) // heads,
        "delta_decay": False,
        "delta_use_beta": options("use_beta", default=True),
        "delta_qk_activation": options("qk_activation", default="silu"),
        "delta_qk_norm": options("qk_norm", default="l2"),
    }
    return fields | _scaled_queries(fields) | _hybrid(options)


def kda(options: Options) -> dict[str, Any]:
    """flash-linear-attention's Kimi Delta Attention. ``safe_gate`` chooses a kernel and a start."""
    options("safe_gate", default=False)
    heads, width, taps = options("num_heads"), options("head_dim"), options("conv_size", default=4)
    fields = (
        _shared(options, 1e-6)
        | _mlp(options)
        | {
            "max_position_embeddings": options("max_position_embeddings", default=2048),
            "conv_size": taps if options("use_short_conv", default=True) else 0,
            "kda_num_heads": options("num_v_heads", default=None) or heads,
            "kda_num_key_heads": heads,
            "kda_key_dim": width,
            "kda_value_dim": int(width * options("expand_v", default=1.0)),
            "kda_gate_bias": True,
            "kda_decay_bound": options("lower_bound", default=None),
            "kda_neg_eigval": options("allow_neg_eigval", default=False),
        }
    )
    return fields | _scaled_queries(fields, "kda_key_dim") | _hybrid(options, "kda")


def _linear_attention(options: Options, name: str, expand_k: float, expand_v: float) -> dict[str, Any]:
    """Fields of gated linear attention and of retention, and of the model around them."""
    options.expect("elementwise_affine", default=True)
    hidden, heads = options("hidden_size"), options("num_heads")
    feature_map = options("feature_map", default=None)
    fields = _shared(options, 1e-6) | {
        "max_position_embeddings": options("max_position_embeddings", default=2048),
        f"{name}_num_heads": heads,
        f"{name}_num_kv_heads": options("num_kv_heads", default=None) or heads,
        f"{name}_key_dim": round(hidden * options("expand_k", default=expand_k)) // heads,
        f"{name}_value_dim": round(hidden * options("expand_v", default=expand_v)) // heads,
        f"{name}_qk_activation": "identity" if feature_map is None else feature_map,
        f"{name}_gate_activation": "silu" if options("use_output_gate", default=True) else None,
    }
    return fields | _scaled_queries(fields, f"{name}_key_dim") | _hybrid(options, name)


def gla(options: Options) -> dict[str, Any]:
    """flash-linear-attention's gated linear attention, whose decay has a rank and a divisor of 16."""
    options.expect("use_gk", default=True)
    options.expect("use_gv", default=False)
    taps = options("conv_size", default=4)
    return (
        _linear_attention(options, "gla", 0.5, 1.0)
        | _mlp(options)
        | {
            "gla_conv_size": taps if options("use_short_conv", default=False) else 0,
            "gla_decay_min": options("clamp_min", default=None),
        }
    )


def retnet(options: Options) -> dict[str, Any]:
    """flash-linear-attention's RetNet. Its model gives no convolution to the mixers, whatever its config says."""
    options("use_short_conv", default=False)
    options("conv_size", default=4)
    return _linear_attention(options, "retnet", 1.0, 2.0) | _mlp(options, usual_ratio=2)


def _hybrid(options: Options, linear: str = "gated_deltanet") -> dict[str, Any]:
    """Fields of the mixers' names: all layers are ``linear``, except those that ``attn`` names."""
    given = options("attn", default=None)
    if given is None:
        return {"mixer": linear}
    parts = [Options({"model_type": options.kind, **part}) for part in ([given] if isinstance(given, dict) else given)]
    found = []
    for part in parts:
        part.expect("qkv_bias", default=False)
        part.expect("window_size", default=None)
        part.expect("qk_norm", default=False)
        heads = part("num_heads")
        kv_heads, base = part("num_kv_heads", default=None) or heads, part("rope_theta", default=10_000.0)
        found.append({"num_attention_heads": heads, "num_key_value_heads": kv_heads, "rope_theta": base})
        if found[-1] != found[0]:
            raise ValueError(f"config.json must hold one kind of attention in attn: got {found[0]} and {found[-1]}")
    layers = {layer for part in parts for layer in part("layers")}
    names = ["attention" if i in layers else linear for i in range(options("num_hidden_layers"))]
    return found[0] | {"mixer": names, "head_dim": options("hidden_size") // found[0]["num_attention_heads"]}


TRANSLATIONS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "h_gated_deltanet": log_linear_gated_deltanet,
    "hattention": log_linear_mamba2,
    "log_linear_mamba2": log_linear_mamba2,
    "mamba2": mamba2,
    "gated_deltanet": gated_deltanet,
    "delta_net": delta_net,
    "kda": kda,
    "gla": gla,
    "retnet": retnet,
}
LINEAR = ("mamba2", "gated_deltanet", "delta_net", "kda", "gla", "retnet")  # layouts of linear models


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
