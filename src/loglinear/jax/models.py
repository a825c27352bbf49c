"""MODELS in Flax NNX: the decoder of the PyTorch side, with the checkpoints of its ``save_pretrained``, both ways.

``LogLinearForCausalLM.from_pretrained(folder)`` reads ``config.json`` and the safetensors files; ``save_pretrained``
writes both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from safetensors.flax import load_file, save_file

from loglinear.jax.configuration import LogLinearConfig, build_mixer
from loglinear.jax.generation import continued
from loglinear.jax.layers import Documents, Linear, MixerState, Past, RMSNorm


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

    def __init__(self, config: LogLinearConfig, layer: int, rngs: nnx.Rngs) -> None:
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = build_mixer(config, layer, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if config.intermediate_size else None
        self.mlp = MLP(config, rngs) if config.intermediate_size else None

    def __call__(self, hidden: Array, past: Past) -> tuple[Array, MixerState | None]:
        mixed, state = self.mixer(self.mixer_norm(hidden), past)
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
        self.layers = nnx.List([Block(config, i, rngs) for i in range(config.num_hidden_layers)])
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
        attention_mask: Array | None = None,
    ) -> tuple[Array, list[MixerState] | None]:
        """Logits ``[B, T, vocab_size]`` of ids ``[B, T]``, and the state of every layer if asked for.

        Args:
            states: of an earlier call, or ``empty_states``; the ids go on from there. One token a call is a step.
            segment_ids, max_segments: packed documents, as in the ops; without states.
            attention_mask: ``[B, T]`` of these ids, 1 for tokens and 0 for padding, which may stand anywhere and changes
                nothing that tokens compute. Its logits are 0. States have not seen it.
        """
        documents = None if segment_ids is None else Documents(segment_ids, max_segments)
        if documents is not None and (states is not None or output_states or attention_mask is not None):
            raise ValueError("segment_ids must stand alone: packed documents have no states and no padding")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            want, have = list(input_ids.shape), list(attention_mask.shape)
            raise ValueError(f"attention_mask must have shape [B, T] = {want}, that of input_ids: got {have}")
        hidden = self.model.embed_tokens.weight[...][input_ids].astype(self.dtype)
        order = lengths = None
        if attention_mask is not None:  # tokens first, in their order
            padding = attention_mask == 0
            order, lengths = jnp.argsort(padding, axis=1, stable=True), (~padding).sum(1)
            hidden = jnp.take_along_axis(hidden, order[..., None], 1)
        new: list[MixerState] = []
        for i, layer in enumerate(self.model.layers):
            before = None if states is None else states[i]
            hidden, state = layer(hidden, Past(before, output_states, lengths if output_states else None, documents))
            if state is not None:
                new.append(state)
        hidden = self.model.norm(hidden)
        if order is not None:
            hidden = jnp.take_along_axis(hidden, jnp.argsort(order, axis=1)[..., None], 1)
            hidden = jnp.where(padding[..., None], 0, hidden)
        if self.lm_head is not None:
            return self.lm_head(hidden), new if output_states else None
        weight = self.model.embed_tokens.weight[...].astype(self.dtype)
        return jnp.einsum("...i,oi->...o", hidden, weight), new if output_states else None

    def generate(
        self,
        input_ids: Array,
        max_new_tokens: int,
        *,
        attention_mask: Array | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        key: Array | None = None,
    ) -> Array:
        """The ids ``[B, T]`` and what follows, ``[B, T + n]``: n is ``max_new_tokens``, or less where every row has ended.

        Args:
            attention_mask: ``[B, T]``, 0 for padding, on the left as a rule.
            do_sample: whether to draw from the softmax of the logits over ``temperature``, of the ``top_k`` largest, and of
                the largest ones that together have ``top_p``; otherwise the largest is taken. key: of ``jax.random``.
            eos_token_id: ends a row, whose rest is ``pad_token_id``. Both are those of the config where they are None, and
                padding is the first of the ends where the config has none.

        Raises:
            ValueError: an argument does not fit. The message names it.
        """
        options: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "do_sample": do_sample,
            "key": key,
        }
        ends = self.config.others.get("eos_token_id") if eos_token_id is None else eos_token_id
        ends = tuple(ends) if isinstance(ends, (list, tuple)) else () if ends is None else (ends,)
        pad = self.config.others.get("pad_token_id") if pad_token_id is None else pad_token_id
        return continued(self, input_ids, attention_mask, max_new_tokens, ends, pad, **options)

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
