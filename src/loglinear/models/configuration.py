"""LogLinearConfig: one decoder, whose sequence mixers are a field.

Transformer, linear and log-linear models differ by one word, ``mixer``. A hybrid is a list of such words, one per layer.
Missing widths follow from ``hidden_size`` in the proportions of the paper's models, so one small config serves every mixer.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from loglinear.fenwick import num_levels
from loglinear.layers.level_scale import OFFSETS
from loglinear.layers.table import MIXERS
from loglinear.models.foreign.options import translated

_MULTIPLES = {
    "mamba_num_heads": "mamba_num_groups",
    "delta_num_heads": "delta_num_key_heads",
    "kda_num_heads": "kda_num_key_heads",
    "gla_num_heads": "gla_num_kv_heads",
    "retnet_num_heads": "retnet_num_kv_heads",
    "num_attention_heads": "num_key_value_heads",
}


# Integers that may be 0; the others are at least 1.
_MAY_BE_ZERO = {
    "intermediate_size",
    "conv_size",
    "gla_conv_size",
    "retnet_conv_size",
    "kda_decay_rank",
    "kda_gate_rank",
}


class LogLinearConfig(PreTrainedConfig):
    """Configuration of ``LogLinearModel``. The defaults are the Log-Linear Mamba-2 of the paper (825M parameters).

    Args:
        mixer: a name in ``loglinear.models.MIXERS`` for all layers, such as ``"log_linear_gated_deltanet"``, ``"mamba2"`` or
            ``"attention"``, or a list with one for each.
        vocab_size: token ids. hidden_size: width of the residual stream. num_hidden_layers: blocks of mixer and MLP.
        intermediate_size: inner width of the SwiGLU MLP; None is 8/3 · hidden_size rounded up to a multiple
            of 64, and 0 leaves the MLPs out.
        max_position_embeddings: longest context with a λ for every level. Longer inputs work; the last level is shared.
        conv_size: taps of the short convolutions in Mamba-2, Gated DeltaNet and KDA mixers; 0 leaves their activations alone.
        gla_conv_size, retnet_conv_size: of those in GLA and RetNet mixers, which have none by default.
        level_scale_start: where the λ of log-linear mixers start: ``"paper"``, near ln 2 on every level, or ``"one"``, near 1,
            which is the linear model.
        level_scale_std: standard deviation of the weights of λ's projections at the start; None: initializer_range. The paper's
            training has 0.006: λ then starts alike for all tokens.
        mamba_head_dim, mamba_num_heads, mamba_state_size, mamba_num_groups: V, H, K, G of the Mamba-2 mixers;
            num_heads None makes the inner width twice hidden_size.
        delta_num_heads, delta_num_key_heads, delta_key_dim, delta_value_dim: H, G, K, V of the Gated DeltaNet mixers;
            None: G = H, keys of 3/4 · hidden_size together, values twice as wide as keys.
        kda_num_heads, kda_num_key_heads, kda_key_dim, kda_value_dim: H, G, K, V of the KDA mixers; None: heads of 128, G = H.
        gla_num_heads, gla_num_kv_heads, gla_key_dim, gla_value_dim: H, key/value heads, K, V of the GLA mixers; None: all
            queries with own keys, keys of hidden_size / 2 and values of hidden_size together.
        retnet_num_heads, retnet_num_kv_heads, retnet_key_dim, retnet_value_dim: the same of the RetNet mixers; None: keys of
            hidden_size together, values twice as wide as keys.
        lightning_num_heads, lightning_head_dim: H and K = V of the lightning attention mixers; None: heads of 128.
        mamba_use_bias, mamba_conv_bias, mamba_norm, mamba_norm_groups, mamba_norm_before_gate, mamba_dt_limit,
        mamba_skip_per_channel: fields of ``LogLinearMamba2`` by these names without their first word.
        delta_conv_bias, delta_gate_activation, delta_decay, delta_use_beta, delta_neg_eigval, delta_qk_activation,
        delta_qk_norm: fields of ``LogLinearGatedDeltaNet``, likewise.
        kda_conv_bias, kda_decay_rank, kda_gate_rank, kda_gate_bias, kda_decay_bound, kda_neg_eigval: fields of
            ``LogLinearKDA``, likewise.
        gla_conv_bias, gla_qk_activation, gla_gate_activation, gla_decay_rank, gla_decay_normalizer, gla_decay_min: fields of
            ``LogLinearGLA``, likewise.
        retnet_conv_bias, retnet_qk_activation, retnet_gate_activation: fields of ``LogLinearRetention``, likewise.
        level_scale_bias: whether λ's projections in Mamba-2 mixers have a bias.
        num_attention_heads, num_key_value_heads, head_dim: of softmax attention; None: heads of 64, all with own keys.
        rope_theta: base of the rotary frequencies of softmax attention.
        residual_in_fp32: whether, under autocast, the residual stream stays float32 as the embeddings are; False makes it
            autocast's dtype: half the memory of checkpointed activations, and a rounding at each layer's sum.
        rms_norm_eps: of every norm. mixer_norm_eps: of the norms in recurrent mixers; None: rms_norm_eps.
        initializer_range: standard deviation of linear and embedding weights.
        decoding_entry_dtype: of the entries of log-linear decoding states: ``"float32"``, or ``"bfloat16"`` for half the
            memory and an error as of rounding keys and values.
        use_cache: whether a model in evaluation mode returns a cache. tie_word_embeddings: share input and output ones.
        bos_token_id, eos_token_id, pad_token_id: special tokens, for ``generate`` and data collators.

    Raises:
        TypeError, ValueError: a field does not fit; the message names it, what came and what is needed.
    """

    model_type = "loglinear"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    # Widths that may be left out are None here and integers from __post_init__ on.
    mixer: str | list[str] = "log_linear_mamba2"
    vocab_size: int = 32_000
    hidden_size: int = 1536
    num_hidden_layers: int = 21
    intermediate_size: int = None  # type: ignore[assignment]
    max_position_embeddings: int = 16_384
    conv_size: int = 4
    level_scale_start: str = "paper"
    level_scale_std: float | None = None
    mamba_head_dim: int = 64
    mamba_num_heads: int = None  # type: ignore[assignment]
    mamba_state_size: int = 128
    mamba_num_groups: int = 1
    delta_num_heads: int = 6
    delta_num_key_heads: int = None  # type: ignore[assignment]
    delta_key_dim: int = None  # type: ignore[assignment]
    delta_value_dim: int = None  # type: ignore[assignment]
    mamba_use_bias: bool = False
    mamba_conv_bias: bool = True
    mamba_norm: bool = True
    mamba_norm_groups: int = 1
    mamba_norm_before_gate: bool = False
    mamba_dt_limit: list[float] | None = None
    mamba_skip_per_channel: bool = False
    delta_conv_bias: bool = False
    delta_gate_activation: str | None = "silu"
    delta_decay: bool = True
    delta_use_beta: bool = True
    delta_neg_eigval: bool = False
    delta_qk_activation: str = "silu"
    delta_qk_norm: str = "l2"
    kda_num_heads: int = None  # type: ignore[assignment]
    kda_num_key_heads: int = None  # type: ignore[assignment]
    kda_key_dim: int = None  # type: ignore[assignment]
    kda_value_dim: int = None  # type: ignore[assignment]
    kda_conv_bias: bool = False
    kda_decay_rank: int = None  # type: ignore[assignment]
    kda_gate_rank: int = None  # type: ignore[assignment]
    kda_gate_bias: bool = False
    kda_decay_bound: float | None = None
    kda_neg_eigval: bool = False
    gla_num_heads: int = 4
    gla_num_kv_heads: int = None  # type: ignore[assignment]
    gla_key_dim: int = None  # type: ignore[assignment]
    gla_value_dim: int = None  # type: ignore[assignment]
    gla_conv_size: int = 0
    gla_conv_bias: bool = False
    gla_qk_activation: str = "identity"
    gla_gate_activation: str | None = "silu"
    gla_decay_rank: int = 16
    gla_decay_normalizer: float = 16.0
    gla_decay_min: float | None = None
    retnet_num_heads: int = 8
    retnet_num_kv_heads: int = None  # type: ignore[assignment]
    retnet_key_dim: int = None  # type: ignore[assignment]
    retnet_value_dim: int = None  # type: ignore[assignment]
    retnet_conv_size: int = 0
    retnet_conv_bias: bool = False
    retnet_qk_activation: str = "identity"
    retnet_gate_activation: str | None = "silu"
    lightning_num_heads: int = None  # type: ignore[assignment]
    lightning_head_dim: int = None  # type: ignore[assignment]
    level_scale_bias: bool = False
    num_attention_heads: int = None  # type: ignore[assignment]
    num_key_value_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    rope_theta: float = 500_000.0
    residual_in_fp32: bool = True
    rms_norm_eps: float = 1e-6
    mixer_norm_eps: float = None  # type: ignore[assignment]
    initializer_range: float = 0.02
    decoding_entry_dtype: str = "float32"
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_integers()
        self._derive_widths()
        self.validate()
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', also for a layout of another library that ``loglinear convert`` takes.

        Raises ValueError for the configuration of another architecture.
        """
        config_dict = translated(config_dict)
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"config.json must be of model_type {cls.model_type!r}: got {kind!r}, a model of another architecture"
            )
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers', in our fields."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        return translated(config_dict), kwargs

    @property
    def layer_mixers(self) -> list[str]:
        """Name of each layer's mixer."""
        return [self.mixer] * self.num_hidden_layers if isinstance(self.mixer, str) else list(self.mixer)

    @property
    def layer_types(self) -> list[str]:
        """Kind of cache that each layer needs: ``DynamicCache(config=...)`` and ``StaticCache`` look it up by this name."""
        names = self.layer_mixers[: self.num_hidden_layers]  # assistant_early_exit: fewer
        return ["loglinear_recurrent" if MIXERS[name].recurrent else "loglinear_attention" for name in names]

    @property
    def num_levels(self) -> int:
        """Levels with a λ of their own."""
        return num_levels(self.max_position_embeddings)

    def validate(self) -> None:
        """Check every field; transformers calls this before it saves. Replaces its own list of allowed layer types."""
        self._check_integers()
        self._check_mixers()
        self._check_special_tokens()
        for heads, groups in _MULTIPLES.items():
            have, divisor = getattr(self, heads), getattr(self, groups)
            if have % divisor:
                raise ValueError(f"{heads} must be a multiple of {groups}={divisor}: got {have}")
        if self.level_scale_start not in OFFSETS:
            raise ValueError(f"level_scale_start must be one of {list(OFFSETS)}: got {self.level_scale_start!r}")
        if self.level_scale_std is not None and self.level_scale_std < 0:
            raise ValueError(f"level_scale_std must be None or at least 0: got {self.level_scale_std}")
        if self.decoding_entry_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"decoding_entry_dtype must be 'float32' or 'bfloat16': got {self.decoding_entry_dtype!r}")
        for field, kinds in {"head_dim": ("attention",), "retnet_key_dim": ("retnet", "log_linear_retnet")}.items():
            if any(name in kinds for name in self.layer_mixers) and getattr(self, field) % 2:
                raise ValueError(f"{field} must be even (rotary positions turn pairs): got {getattr(self, field)}")

    def _check_integers(self) -> None:
        for name, kind in LogLinearConfig.__annotations__.items():
            value = getattr(self, name)
            if kind != "int" or value is None:  # None: left out, and not derived yet
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer: got {value!r}")
            least = 0 if name in _MAY_BE_ZERO else 1
            if value < least:
                raise ValueError(f"{name} must be at least {least}: got {value}")

    def _check_special_tokens(self) -> None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name} must be None or in [0, vocab_size={self.vocab_size}): got {token}")

    def _check_mixers(self) -> None:
        names = [self.mixer] if isinstance(self.mixer, str) else self.mixer
        if not isinstance(names, list) or any(name not in MIXERS for name in names):
            raise ValueError(f"mixer must be one of {list(MIXERS)} or a list of them: got {self.mixer!r}")
        if isinstance(self.mixer, list) and len(names) != self.num_hidden_layers:
            raise ValueError(
                f"mixer must name {self.num_hidden_layers} layers (num_hidden_layers): got {len(names)} names"
            )

    def _derive_widths(self) -> None:
        """Fill in the widths that were left out, so that a saved config is complete."""
        hidden = self.hidden_size

        def default(name: str, value: float) -> None:
            if getattr(self, name) is None:
                setattr(self, name, value)

        default("mixer_norm_eps", self.rms_norm_eps)
        default("intermediate_size", -(-8 * hidden // (3 * 64)) * 64)
        default("mamba_num_heads", max(1, 2 * hidden // self.mamba_head_dim))
        default("delta_num_key_heads", self.delta_num_heads)
        default("delta_key_dim", max(1, 3 * hidden // (4 * self.delta_num_heads)))
        default("delta_value_dim", 2 * self.delta_key_dim)
        default("kda_num_heads", max(1, hidden // 128))
        default("kda_num_key_heads", self.kda_num_heads)
        default("kda_key_dim", max(1, hidden // self.kda_num_heads))
        default("kda_value_dim", self.kda_key_dim)
        default("kda_decay_rank", self.kda_value_dim)
        default("kda_gate_rank", self.kda_value_dim)
        default("gla_num_kv_heads", self.gla_num_heads)
        default("gla_key_dim", max(1, hidden // (2 * self.gla_num_heads)))
        default("gla_value_dim", max(1, hidden // self.gla_num_heads))
        default("retnet_num_kv_heads", self.retnet_num_heads)
        default("retnet_key_dim", max(2, hidden // (2 * self.retnet_num_heads) * 2))
        default("retnet_value_dim", 2 * self.retnet_key_dim)
        default("lightning_num_heads", max(1, hidden // 128))
        default("lightning_head_dim", max(1, hidden // self.lightning_num_heads))
        default("num_attention_heads", max(1, hidden // 64))
        default("num_key_value_heads", self.num_attention_heads)
        default("head_dim", hidden // self.num_attention_heads)


def opened_as_ours(kind: str) -> type[PreTrainedConfig]:
    """A class of configurations for the Auto classes, by which a ``model_type`` of another library is opened as ours."""

    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return LogLinearConfig.from_dict(config_dict, **kwargs)

    return type("ForeignConfig", (PreTrainedConfig,), {"model_type": kind, "from_dict": classmethod(from_dict)})
