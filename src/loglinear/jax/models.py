"""MODELS in Flax NNX: the decoder of the PyTorch side, with the checkpoints of its ``save_pretrained``, both ways.

``LogLinearForCausalLM.from_pretrained(folder)`` reads ``config.json`` and the safetensors files; ``save_pretrained``
writes both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from safetensors.flax import load_file, save_file

from loglinear.jax.layers import Documents, Linear, LogLinearGatedDeltaNet, LogLinearMamba2, Mixer, MixerState, RMSNorm

MIXERS = {
    f"{prefix}{name}": (layer, log_linear)
    for name, layer in {"mamba2": LogLinearMamba2, "gated_deltanet": LogLinearGatedDeltaNet}.items()
    for prefix, log_linear in {"log_linear_": True, "": False}.items()
}
# Fields of the PyTorch side's configuration for which there is no other code here than this value's.
FIXED: dict[str, Any] = {
    **{"mamba_use_bias": False, "mamba_conv_bias": True, "mamba_norm": True, "mamba_norm_groups": 1},
    **{
        "mamba_norm_before_gate": False,
        "mamba_dt_limit": None,
        "mamba_skip_per_channel": False,
        "level_scale_bias": False,
    },
    **{"delta_conv_bias": False, "delta_gate_activation": "silu", "delta_decay": True, "delta_use_beta": True},
    **{"delta_neg_eigval": False, "delta_qk_activation": "silu", "delta_qk_norm": "l2"},
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
    rms_norm_eps: float = 1e-6
    mixer_norm_eps: float | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    others: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hidden = self.hidden_size
        key_dim = self.delta_key_dim or max(1, 3 * hidden // (4 * self.delta_num_heads))
        derived: dict[str, Any] = {
            "intermediate_size": -(-8 * hidden // (3 * 64)) * 64,
            "mamba_num_heads": max(1, 2 * hidden // self.mamba_head_dim),
            "delta_num_key_heads": self.delta_num_heads,
            "delta_key_dim": key_dim,
            "delta_value_dim": 2 * key_dim,
            "mixer_norm_eps": self.rms_norm_eps,
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
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

    def build_mixer(self, name: str, rngs: nnx.Rngs) -> Mixer:
        """The mixer of this name at these sizes."""
        layer, log_linear = MIXERS[name]
        shared: dict[str, Any] = {
            "num_levels": max(self.max_position_embeddings - 1, 0).bit_length() + 1,
            "conv_width": self.conv_size,
            "norm_eps": self.mixer_norm_eps,
            "log_linear": log_linear,
            "level_scale_start": self.level_scale_start,
            "rngs": rngs,
            "std": self.initializer_range,
        }
        prefix, names = ("mamba", "num_heads head_dim state_size num_groups")
        if layer is LogLinearGatedDeltaNet:
            prefix, names = ("delta", "num_heads key_dim value_dim num_key_heads")
        return layer(self.hidden_size, **{one: getattr(self, f"{prefix}_{one}") for one in names.split()}, **shared)


class MLP(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) · up(x))``."""

    def __init__(self, config: LogLinearConfig, rngs: nnx.Rngs) -> None:
        assert config.intermediate_size is not None
        sizes, std = (config.hidden_size, config.intermediate_size), config.initializer_range
        self.gate_proj, self.up_proj = (Linear(*sizes, std=std, rngs=rngs) for _ in range(2))
        self.down_proj = Linear(*sizes[::-1], std=std, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """One layer: mixer and MLP, each behind its norm and beside the residual stream."""

    def __init__(self, config: LogLinearConfig, name: str, rngs: nnx.Rngs) -> None:
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = config.build_mixer(name, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if config.intermediate_size else None
        self.mlp = MLP(config, rngs) if config.intermediate_size else None

    def __call__(
        self, hidden: Array, state: MixerState | None, output_state: bool, documents: Documents | None
    ) -> tuple[Array, MixerState | None]:
        mixed, state = self.mixer(self.mixer_norm(hidden), state, output_state, documents)
        hidden = hidden + mixed
        if self.mlp is not None and self.mlp_norm is not None:
            hidden = hidden + self.mlp(self.mlp_norm(hidden))
        return hidden, state


class Embedding(nnx.Module):
    """Rows of ``weight [vocab_size, width]``."""

    def __init__(self, config: LogLinearConfig, rngs: nnx.Rngs) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self.weight = nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32))


class Decoder(nnx.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: LogLinearConfig, rngs: nnx.Rngs) -> None:
        self.embed_tokens = Embedding(config, rngs)
        self.layers = nnx.List([Block(config, name, rngs) for name in config.layer_mixers])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LogLinearForCausalLM(nnx.Module):
    """The decoder with its output layer.

    Args:
        config: its sizes. rngs: of the start. dtype: of activations; parameters are float32.
    """

    def __init__(self, config: LogLinearConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.model = Decoder(config, rngs)
        sizes = (config.hidden_size, config.vocab_size)
        self.lm_head = None if config.tie_word_embeddings else Linear(*sizes, std=config.initializer_range, rngs=rngs)

    def __call__(
        self,
        input_ids: Array,
        states: list[MixerState] | None = None,
        output_states: bool = False,
        segment_ids: Array | None = None,
        max_segments: int | None = None,
    ) -> tuple[Array, list[MixerState] | None]:
        """Logits ``[B, T, vocab_size]`` of ids ``[B, T]``, and the state of every layer if asked for.

        Args:
            states: of an earlier call, or ``empty_states``; the ids go on from there. One token a call is a step.
            segment_ids, max_segments: packed documents, as in the ops; without states.
        """
        documents = None if segment_ids is None else Documents(segment_ids, max_segments)
        if documents is not None and (states is not None or output_states):
            raise ValueError("segment_ids must stand alone: packed documents have no states")
        hidden = self.model.embed_tokens.weight[...][input_ids].astype(self.dtype)
        new: list[MixerState] = []
        for i, layer in enumerate(self.model.layers):
            hidden, state = layer(hidden, None if states is None else states[i], output_states, documents)
            if state is not None:
                new.append(state)
        hidden = self.model.norm(hidden)
        if self.lm_head is not None:
            return self.lm_head(hidden), new if output_states else None
        weight = self.model.embed_tokens.weight[...].astype(self.dtype)
        return jnp.einsum("...i,oi->...o", hidden, weight), new if output_states else None

    def empty_states(self, batch: int, max_length: int) -> list[MixerState]:
        """The state of every layer before the first token, with slots for ``max_length`` tokens."""
        return [layer.mixer.empty_state(batch, max_length, self.dtype) for layer in self.model.layers]

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: Any = jnp.float32) -> LogLinearForCausalLM:
        """The model of a folder that ``save_pretrained`` wrote, here or in PyTorch. Parameters become float32.

        Raises ValueError for a field of its configuration without code here, and for a tensor that is missing, too
        many, or of another shape.
        """
        folder = Path(folder)
        config = LogLinearConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"folder must hold safetensors files: got {folder}")
        tensors = {name: x for file in files for name, x in load_file(str(file)).items()}
        model = cls(config, rngs=nnx.Rngs(0), dtype=dtype)
        if config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        own = dict(named_parameters(model))
        if own.keys() != tensors.keys():
            wrong = sorted(own.keys() ^ tensors.keys())
            raise ValueError(
                f"folder must hold the {len(own)} tensors of the model and no others: {', '.join(wrong[:3])}"
            )
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                have, want = list(tensors[name].shape), list(parameter.shape)
                raise ValueError(f"{name} must have shape {want}: got {have}")
            parameter[...] = jnp.asarray(tensors[name], jnp.float32)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, which PyTorch's ``from_pretrained`` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: parameter[...] for name, parameter in named_parameters(self)}
        save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
        text = json.dumps(self.config.to_dict(), indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def named_parameters(model: nnx.Module) -> Iterator[tuple[str, nnx.Param]]:
    """Every parameter by its dotted name, which is PyTorch's."""
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        yield ".".join(map(str, path)), _at(model, path)


def _at(model: Any, path: tuple[Any, ...]) -> nnx.Param:
    for part in path:
        model = model[part] if isinstance(part, int) else getattr(model, part)
    return model


def weight_decay_mask(parameters: Any) -> Any:
    """A mask for Optax: True where weights decay, not in A_log, dt_bias, D and L, nor in norms and biases.

    parameters: a tree of arrays by the names of the model's; Optax gives it to a mask that is a function.
    """

    def decays(path: tuple[Any, ...], x: Array) -> bool:
        names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        return np.ndim(x) > 1 and "L" not in names

    return jax.tree.map_with_path(decays, parameters)
