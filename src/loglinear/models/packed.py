"""PACKED: a causal model on the tokens of many requests at once, ``[N]``, as an engine for serving calls it.

The model is loaded as ever. ``take_over`` then puts layers of the engine into the places of the mixers, and these layers know
the requests: a recurrent mixer runs on pages (``layers/pages.py``), and softmax attention reads the engine's keys and values.
The model is ours or a lifted one of transformers. No file here knows an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loglinear.layers import RecurrentMixer, SoftmaxAttention
from loglinear.layers.attention import rotary
from loglinear.layers.pages import Mixer, PageLayout
from loglinear.models.configuration import LogLinearConfig
from loglinear.models.levels import FIELD
from loglinear.models.lift import lift
from loglinear.models.lifted.kinds import is_attention
from loglinear.models.modeling import LogLinearModel

FOREIGN_ATTENTION = ("Qwen3NextAttention",)  # of transformers: those that have run on the attention of an engine
ENGINE = "loglinear_engine"  # transformers' name of the attention of an engine


class Engine(Protocol):
    """The maker of an engine's layers, which hold no weights. ``path`` is the name of the mixer in the model."""

    def mixer(self, path: str, mixer: Mixer) -> nn.Module:
        """A layer that runs ``mixer`` on the pages of the requests: ``[N, hidden_size]`` to the same."""

    def attention(self, path: str, heads: int, kv_heads: int, width: int, scale: float) -> nn.Module:
        """Softmax attention: queries ``[N, heads * width]``, keys and values ``[N, kv_heads * width]`` to mixed queries."""


class RecurrentPlace(nn.Module):
    """The place of a recurrent mixer: its weights, and the layer that runs it."""

    def __init__(self, mixer: RecurrentMixer, layer: nn.Module) -> None:
        super().__init__()
        self.mixer, self.layer = mixer, layer

    def forward(self, hidden_states: Tensor, *others: Any, **named: Any) -> Tensor:
        """hidden_states: ``[N, hidden_size]``, or ``[1, N, hidden_size]`` and whatever transformers gives to mixers. The pages
        know positions and pasts, and there is no padding: nothing else is read."""
        return self.layer(hidden_states.flatten(0, -2)).view_as(hidden_states)


class AttentionPlace(nn.Module):
    """The projections and rotary positions of ``SoftmaxAttention``, around the layer of an engine."""

    def __init__(self, mixer: SoftmaxAttention, layer: nn.Module) -> None:
        super().__init__()
        self.mixer, self.layer = mixer, layer

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """hidden ``[N, hidden_size]``, positions int64 ``[N]``."""
        mixer = self.mixer
        projected = [project(hidden).unsqueeze(0) for project in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
        q, k, v = (x.unflatten(-1, (-1, mixer.head_dim)) for x in projected)
        q, k = rotary(positions.unsqueeze(0), mixer.rope_theta, q, k)
        return mixer.out_proj(self.layer(*(x.squeeze(0).flatten(1) for x in (q, k, v))))


class Tokens:
    """The tokens of a call in place of ``TokenLayout``: a block of ours runs its mixer through it."""

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions

    def run(self, mixer: nn.Module, hidden: Tensor) -> tuple[Tensor, None]:
        return mixer(hidden, self.positions), None


class PackedDecoder(nn.Module):
    """The decoder of a model that an engine has taken over, without the output layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model: Any = model.base_model

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``[N, hidden_size]`` of input_ids int64 ``[N]``, or of inputs_embeds in their place.

        positions: int64 ``[N]``, of each token in its request. intermediate_tensors: None, of no other part of a pipeline.
        """
        if isinstance(self.model, LogLinearModel):
            hidden = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            tokens: Any = Tokens(positions)
            for block in self.model.layers:
                hidden = block.forward(hidden, tokens)
            return self.model.norm(hidden)
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        read = {name: x.unsqueeze(0) for name, x in given.items() if x is not None}
        out = self.model(**read, position_ids=positions.unsqueeze(0), use_cache=False)
        return out.last_hidden_state.squeeze(0)


def load(checkpoint: str, config: PreTrainedConfig, dtype: torch.dtype, **files: Any) -> PreTrainedModel:
    """The model of a checkpoint, for inference.

    config: as the engine has it, perhaps with options of the user's; it counts for a model of ours. A lifted model has that of
    its folder. files: revision, cache_dir and other arguments of ``from_pretrained`` that say where files are.
    """
    own = {"config": deepcopy(config)} if isinstance(config, LogLinearConfig) else {}
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, **own, **files).eval()


def take_over(model: PreTrainedModel, engine: Engine) -> None:
    """Put the layers of ``engine`` into the places of all mixers of ``model``, which then runs by ``PackedDecoder`` alone."""
    for path, module in list(model.named_modules()):
        place: nn.Module | None = None
        if isinstance(module, RecurrentMixer):
            place = RecurrentPlace(module, engine.mixer(path, mixer_of(module)))
        elif isinstance(module, SoftmaxAttention):
            width = module.head_dim
            heads, kv_heads = (proj.out_features // width for proj in (module.q_proj, module.k_proj))
            place = AttentionPlace(module, engine.attention(path, heads, kv_heads, width, width**-0.5))
        elif type(module).__name__ in FOREIGN_ATTENTION:
            config: Any = module.config
            heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
            module.attn = engine.attention(path, heads, kv_heads, module.head_dim, module.scaling)  # type: ignore
        if place is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, place)
    if not isinstance(model.config, LogLinearConfig):
        ALL_ATTENTION_FUNCTIONS.register(ENGINE, engine_attention)
        model.config.get_text_config()._attn_implementation = ENGINE


def mixer_of(module: RecurrentMixer) -> Mixer:
    """The mixer as ours are called. A lifted one has the arguments of its original otherwise."""
    return RecurrentMixer.forward.__get__(module)


def engine_attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """An attention function of transformers: ``[1, heads, N, width]`` to ``[1, N, heads, width]``. The engine masks."""
    attn: Any = module.attn
    mixed = attn(*(x.squeeze(0).transpose(0, 1).flatten(1) for x in (q, k, v)))
    return mixed.view(1, q.shape[2], *q.shape[1::2]), None


def page_layouts(
    config: PreTrainedConfig, dtype: torch.dtype, max_context: int, entry_dtype: torch.dtype
) -> dict[str, PageLayout]:
    """The layout of a page for each recurrent mixer of a model, by its name in it. Nothing is loaded.

    Args:
        config: of the model. dtype: of weights and activations. max_context: tokens that a request may have.
        entry_dtype: of log-linear entries.

    Raises:
        ValueError: a model of transformers without levels, or with softmax attention that has no form here.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype)
    if not isinstance(config, LogLinearConfig):
        described = getattr(config, FIELD, None)
        if not described:
            raise ValueError(f"config.json must have {FIELD}, as a lifted model saves it: got {described}")
        lift(model, described["num_levels"])
        for kind in foreign_attention(model):
            raise ValueError(f"softmax attention must be one of {list(FOREIGN_ATTENTION)} on an engine: got {kind}")
    width = config.get_text_config().hidden_size
    return {
        name: PageLayout.of(mixer_of(module), width, dtype, max_context, entry_dtype)
        for name, module in model.named_modules()
        if isinstance(module, RecurrentMixer)
    }


def page_bytes(layouts: dict[str, PageLayout]) -> int:
    """Bytes of a page, one size for all layers; 0 for a model of softmax attention alone."""
    return max((layout.nbytes for layout in layouts.values()), default=0)


def foreign_attention(model: nn.Module) -> Iterator[str]:
    """Classes of softmax attention that has no form here."""
    for module in model.modules():
        kind = type(module).__name__
        if is_attention(module) and kind not in FOREIGN_ATTENTION and not isinstance(module, RecurrentMixer):
            yield kind
