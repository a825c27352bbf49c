"""CONFIGURATION: the fields of ``config.json`` that the mixers here have, and the mixers by their names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flax import nnx

from loglinear.jax.attention import SoftmaxAttention
from loglinear.jax.kda import LogLinearKDA
from loglinear.jax.layers import LogLinearGatedDeltaNet, LogLinearMamba2, Mixer
from loglinear.jax.linear_attention import LogLinearGLA, LogLinearRetention


class Kind(NamedTuple):
    """A mixer. arguments: of its class, by the fields that hold them. fixed: the same in every config."""

    layer: type[Mixer]
    arguments: dict[str, str]
    fixed: dict[str, Any] = {}  # noqa: RUF012


def _behind(prefix: str, names: str, **others: str) -> dict[str, str]:
    return {name: f"{prefix}_{name}" for name in names.split()} | {"conv_width": "conv_size"} | others


_WIDTHS = "num_heads num_kv_heads key_dim value_dim conv_bias qk_activation gate_activation"
_KDA = "num_heads num_key_heads key_dim value_dim conv_bias decay_rank gate_rank gate_bias decay_bound neg_eigval"
_LIGHTNING = {
    "num_heads": "lightning_num_heads",
    "key_dim": "lightning_head_dim",
    "value_dim": "lightning_head_dim",
}
_AS_MINIMAX = {
    "conv_width": 0,
    "conv_activation": "silu",
    "gate_activation": "sigmoid",
    "norm_per_head": False,
    "decays": "slopes",
    "rotary_base": None,
}
KINDS = {
    "mamba2": Kind(LogLinearMamba2, _behind("mamba", "num_heads head_dim state_size num_groups")),
    "gated_deltanet": Kind(LogLinearGatedDeltaNet, _behind("delta", "num_heads key_dim value_dim num_key_heads")),
    "kda": Kind(LogLinearKDA, _behind("kda", _KDA)),
    "gla": Kind(
        LogLinearGLA, _behind("gla", f"{_WIDTHS} decay_rank decay_normalizer decay_min", conv_width="gla_conv_size")
    ),
    "retnet": Kind(LogLinearRetention, _behind("retnet", _WIDTHS, conv_width="retnet_conv_size")),
    "lightning": Kind(LogLinearRetention, _LIGHTNING, _AS_MINIMAX),
}
MIXERS = {f"{prefix}{name}": name for name in KINDS for prefix in ("log_linear_", "")} | {"attention": "attention"}
# Fields of the PyTorch side's configuration for which there is no other code here than this value's.
FIXED: dict[str, Any] = {
    **{"mamba_use_bias": False, "mamba_conv_bias": True, "mamba_norm": True, "mamba_norm_groups": 1},
    **{"mamba_norm_before_gate": False, "mamba_dt_limit": None, "mamba_skip_per_channel": False},
    **{"delta_conv_bias": False, "delta_gate_activation": "silu", "delta_decay": True, "delta_use_beta": True},
    **{"delta_neg_eigval": False, "delta_qk_activation": "silu", "delta_qk_norm": "l2", "level_scale_bias": False},
}


@dataclass(frozen=True)
class LogLinearConfig:
    """The fields of the PyTorch side's ``LogLinearConfig`` that the mixers here have, under the same names; None is
    left out there too.

    others: what ``config.json`` held besides, which ``save_pretrained`` writes back.
    """

    mixer: str | list[str] = "log_linear_mamba2"
    vocab_size: int = 32_000
    hidden_size: int = 1536
    num_hidden_layers: int = 21
    intermediate_size: int | None = None
    max_position_embeddings: int = 16_384
    conv_size: int = 4
    level_scale_start: str = "paper"
    mamba_head_dim: int = 64
    mamba_num_heads: int | None = None
    mamba_state_size: int = 128
    mamba_num_groups: int = 1
    delta_num_heads: int = 6
    delta_num_key_heads: int | None = None
    delta_key_dim: int | None = None
    delta_value_dim: int | None = None
    kda_num_heads: int | None = None
    kda_num_key_heads: int | None = None
    kda_key_dim: int | None = None
    kda_value_dim: int | None = None
    kda_conv_bias: bool = False
    kda_decay_rank: int | None = None
    kda_gate_rank: int | None = None
    kda_gate_bias: bool = False
    kda_decay_bound: float | None = None
    kda_neg_eigval: bool = False
    gla_num_heads: int = 4
    gla_num_kv_heads: int | None = None
    gla_key_dim: int | None = None
    gla_value_dim: int | None = None
    gla_conv_size: int = 0
    gla_conv_bias: bool = False
    gla_qk_activation: str = "identity"
    gla_gate_activation: str | None = "silu"
    gla_decay_rank: int = 16
    gla_decay_normalizer: float = 16.0
    gla_decay_min: float | None = None
    retnet_num_heads: int = 8
    retnet_num_kv_heads: int | None = None
    retnet_key_dim: int | None = None
    retnet_value_dim: int | None = None
    retnet_conv_size: int = 0
    retnet_conv_bias: bool = False
    retnet_qk_activation: str = "identity"
    retnet_gate_activation: str | None = "silu"
    lightning_num_heads: int | None = None
    lightning_head_dim: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-6
    mixer_norm_eps: float | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    others: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._derive_widths()
        for name in self.layer_mixers:
            if name not in MIXERS:
                raise ValueError(f"mixer must be one of {list(MIXERS)} or a list of them: got {name!r}")
        if len(self.layer_mixers) != self.num_hidden_layers:
            raise ValueError(
                f"mixer must name {self.num_hidden_layers} layers (num_hidden_layers): got {len(self.layer_mixers)} names"
            )
        for name, value in FIXED.items():
            if self.others.get(name, value) != value:
                raise ValueError(f"{name} must be {value!r} in JAX: got {self.others[name]!r}")

    def _derive_widths(self) -> None:
        """Fill in the widths that were left out, in the order in which they need each other."""
        hidden = self.hidden_size

        def default(name: str, value: float) -> Any:
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
            return getattr(self, name)

        default("intermediate_size", -(-8 * hidden // (3 * 64)) * 64)
        default("mixer_norm_eps", self.rms_norm_eps)
        default("mamba_num_heads", max(1, 2 * hidden // self.mamba_head_dim))
        default("delta_num_key_heads", self.delta_num_heads)
        default("delta_value_dim", 2 * default("delta_key_dim", max(1, 3 * hidden // (4 * self.delta_num_heads))))
        heads = default("kda_num_heads", max(1, hidden // 128))
        default("kda_num_key_heads", heads)
        width = default("kda_value_dim", default("kda_key_dim", max(1, hidden // heads)))
        default("kda_decay_rank", width)
        default("kda_gate_rank", width)
        default("gla_num_kv_heads", self.gla_num_heads)
        default("gla_key_dim", max(1, hidden // (2 * self.gla_num_heads)))
        default("gla_value_dim", max(1, hidden // self.gla_num_heads))
        default("retnet_num_kv_heads", self.retnet_num_heads)
        default("retnet_value_dim", 2 * default("retnet_key_dim", max(2, hidden // (2 * self.retnet_num_heads) * 2)))
        default("lightning_head_dim", max(1, hidden // default("lightning_num_heads", max(1, hidden // 128))))
        heads = default("num_attention_heads", max(1, hidden // 64))
        default("num_key_value_heads", heads)
        default("head_dim", hidden // heads)

    @property
    def layer_mixers(self) -> list[str]:
        """Name of each layer's mixer."""
        return [self.mixer] * self.num_hidden_layers if isinstance(self.mixer, str) else list(self.mixer)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LogLinearConfig:
        """From the content of ``config.json``. Raises ValueError for a field whose value has no code here."""
        if fields.get("model_type", "loglinear") != "loglinear":
            raise ValueError(f"config.json must be of model_type 'loglinear': got {fields['model_type']!r}")
        own = set(cls.__dataclass_fields__) - {"others"}
        others = {name: value for name, value in fields.items() if name not in own}
        return cls(**{name: value for name, value in fields.items() if name in own}, others=others)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "others"}
        return {"model_type": "loglinear", "architectures": ["LogLinearForCausalLM"], **self.others, **own}


def build_mixer(config: LogLinearConfig, layer: int, rngs: nnx.Rngs) -> Mixer | SoftmaxAttention:
    """The mixer of this layer."""
    name = config.layer_mixers[layer]
    if name == "attention":
        heads: Any = (config.num_attention_heads, config.head_dim, config.num_key_value_heads)
        std = config.initializer_range
        return SoftmaxAttention(config.hidden_size, *heads, rope_theta=config.rope_theta, rngs=rngs, std=std)
    make: Any
    make, arguments, fixed = KINDS[MIXERS[name]]
    options: dict[str, Any] = {argument: getattr(config, field) for argument, field in arguments.items()} | fixed
    if MIXERS[name] == "lightning":  # later layers forget more slowly
        options["decay_factor"] = 1 - layer / (config.num_hidden_layers - 1 + 1e-5) + 1e-5
    sizes = [options.pop(size) for size in ("num_heads", "key_dim", "value_dim") if size in options]
    if "head_dim" in options:
        sizes += [options.pop(size) for size in ("head_dim", "state_size", "num_groups")]
    return make(
        config.hidden_size,
        *sizes,
        num_levels=max(config.max_position_embeddings - 1, 0).bit_length() + 1,
        norm_eps=config.mixer_norm_eps,
        log_linear=name.startswith("log_linear_"),
        level_scale_start=config.level_scale_start,
        std=config.initializer_range,
        rngs=rngs,
        **options,
    )
