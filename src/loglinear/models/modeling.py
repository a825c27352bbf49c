"""LogLinearModel: one pre-norm decoder for every mixer.

Nothing here knows which mixer a layer holds, and nothing below knows about padding. Tokens are packed once on the way in
(``layout.py``), states travel in a cache of mixer states (``cache.py``), and everything else is the plain decoder
``x += mixer(norm(x)); x += mlp(norm(x))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import can_return_tuple

from loglinear.layers import RMSNorm, SumRMSNorm
from loglinear.layers.initialization import StatedInit
from loglinear.layers.level_scale import LevelScale
from loglinear.layers.table import MIXERS
from loglinear.models import token
from loglinear.models.cache import MixerCacheLayer, check_cache, check_past
from loglinear.models.configuration import LogLinearConfig
from loglinear.models.foreign.loading import from_foreign
from loglinear.models.layout import TokenLayout, plan_layout
from loglinear.models.outputs import FIELD, NAMES, ModelOutput, one_cache
from loglinear.ops import pointwise
from loglinear.ops.checks import values_are_known
from loglinear.ops.fused import silu_times


class LogLinearMLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) · up(x))`` (Shazeer 2020)."""

    def __init__(self, config: LogLinearConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        first, second = pointwise.twice(hidden)
        return self.down_proj(silu_times(self.gate_proj(first), self.up_proj(second)))


class LogLinearBlock(GradientCheckpointingLayer):
    """One layer: mixer and MLP, each behind its norm and beside the residual stream."""

    def __init__(self, config: LogLinearConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.config = layer_idx, config
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = MIXERS[config.layer_mixers[layer_idx]].build(config, layer_idx)
        self.mlp_norm = SumRMSNorm(config.hidden_size, config.rms_norm_eps) if config.intermediate_size else None
        self.mlp = LogLinearMLP(config) if config.intermediate_size else None

    def forward(self, hidden: Tensor, layout: TokenLayout, past_key_values: Cache | None = None) -> Tensor:
        """hidden as ``layout.pack`` leaves it; this layer's state in the cache takes the tokens in."""
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        assert cache is None or isinstance(cache, MixerCacheLayer)  # check_cache saw to it
        if cache is not None and token.why_not(self, hidden, layout, cache) is None:
            return token.forward(self, hidden, layout, cache)
        normed = self.mixer_norm(hidden)
        if cache is None:
            mixed, _ = layout.run(self.mixer, normed)
        else:
            mixed = cache.feed(self.mixer, normed, layout, getattr(torch, self.config.decoding_entry_dtype))
        if self.mlp is None or self.mlp_norm is None:
            return hidden + mixed
        hidden, normed = self.mlp_norm(hidden, mixed)
        return hidden + self.mlp(normed)


class LogLinearPreTrainedModel(PreTrainedModel):
    """Initialisation and what transformers needs to know of both models."""

    config: LogLinearConfig
    config_class = LogLinearConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LogLinearBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = list(NAMES)
    _supports_sdpa = True

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers', also for checkpoints of other libraries that ``loglinear convert`` takes.

        A parameter with a stated start may be missing: λ of a log-linear model that starts from its linear twin, or D.
        Raises ValueError for a checkpoint without one of the weights that only training can give, and, for one of
        another library, with a tensor that has no place here.
        """
        load = super().from_pretrained
        loaded: Any = from_foreign(load, *args, **kwargs) or load(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        stated = {
            f"{prefix}.{name}"
            for prefix, module in model.named_modules()
            if isinstance(module, StatedInit)
            for name in module.initial_values()
        }
        missing = sorted(n for n in info["missing_keys"] if n not in stated and ".level_scale." not in n)
        if missing:
            raise ValueError(
                f"pretrained_model_name_or_path must hold every weight of a {cls.__name__}: {len(missing)} are missing, "
                f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}"
            )
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights for linear layers and embeddings; mixers and convolutions state their own."""
        if isinstance(module, StatedInit):
            for name, value in module.initial_values().items():
                init.copy_(module.get_parameter(name), value)  # leaves alone what a checkpoint has brought
            std = self.config.level_scale_std
            if (
                isinstance(module, LevelScale) and std is not None
            ):  # its projection has been drawn as all linear layers are
                init.normal_(module.dl_proj.weight, std=std)
        else:
            super()._init_weights(module)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that optimisers must not decay: A_log, dt_bias, D and L of every mixer."""
        return {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if isinstance(module, StatedInit)
            for name in module.no_weight_decay
        }


class LogLinearModel(LogLinearPreTrainedModel):
    """The decoder without its output layer."""

    def __init__(self, config: LogLinearConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LogLinearBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        seq_idx: Tensor | None = None,
        cache: Cache | None = None,
        layout: TokenLayout | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Hidden states of every token.

        Args:
            input_ids: int64 ``[B, T]``, or ``inputs_embeds [B, T, hidden_size]`` in their place.
            attention_mask: ``[B, T]`` (with a cache ``[B, past + T]``), 1 for tokens and 0 for padding. Padding may stand
                anywhere and never changes what real tokens compute; its own outputs are those of a zero hidden state.
            position_ids: ``[B, T]``, only to find packed documents: where they do not go on by one, a document starts.
                Positions themselves are counted per row and document, from the cache on.
            seq_idx: integer ``[B, T]``, the number of each token's document, as Mamba-2 and Bamba take it.
            cu_seq_lens_q, or cu_seqlens: integer ``[n + 1]``, offsets of documents packed in a batch of one
                (``DataCollatorWithFlattening``, flash-linear-attention).
            cache, or past_key_values: ``DynamicCache(config=model.config)`` or ``StaticCache``; it is updated in place.
            use_cache: whether to return a cache. None is ``config.use_cache`` in evaluation mode, and no in training, under
                ``torch.compile`` and ``torch.export``, and on meta and fake tensors.
            output_hidden_states: whether to return the embeddings and every layer's output too.
            layout: the result of ``plan`` for the mask and the documents, in their place.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it, what came and what is needed.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        cache = one_cache(cache, past_key_values)
        described = {"attention_mask": attention_mask, "position_ids": position_ids, "seq_idx": seq_idx}
        described["cu_seqlens"] = take_offsets(kwargs)
        if kwargs.pop("output_attentions", None):
            raise ValueError("output_attentions must be false: no mixer of this model forms an attention matrix")
        if kwargs:
            raise TypeError(f"forward does not know these arguments: {', '.join(kwargs)}")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if layout is None:
            layout = self.plan(hidden.shape[:2], cache, **described)
        cache = self._choose_cache(cache, use_cache, layout, hidden)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        if not self.config.residual_in_fp32 and torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        collected = [hidden]
        hidden = layout.pack(hidden)
        for layer in islice(self.layers, self.config.num_hidden_layers):  # assistant_early_exit lowers the number
            hidden = layer(hidden, layout, past_key_values=cache)
            if output_hidden_states:
                collected.append(layout.unpack(hidden))
        last = layout.unpack(self.norm(hidden))
        states = (*collected[:-1], last) if output_hidden_states else None
        return ModelOutput(last_hidden_state=last, hidden_states=states, **{FIELD: cache})  # type: ignore[arg-type]

    def plan(self, shape: Sequence[int], cache: Cache | None, **described: Any) -> TokenLayout:
        """The layout of ids of this shape ``[B, T]`` (``plan_layout``), after a check that ``cache`` is one for them."""
        batch, length = shape
        if cache is None:
            return plan_layout(batch, length, **described)
        check_cache(cache, self.config.layer_types, batch)
        # The contents of a state depend on positions: no single graph fits, so the compiler need not see this either.
        plan = torch.compiler.disable(plan_from) if torch.compiler.is_compiling() else plan_from
        return plan(cache, batch, length, **described)

    def _choose_cache(
        self, cache: Cache | None, use_cache: bool | None, layout: TokenLayout, hidden: Tensor
    ) -> Cache | None:
        """The cache to update: the caller's, a new one, or none."""
        checkpointing = self.training and any(layer.gradient_checkpointing for layer in self.layers)
        if cache is not None:
            if layout.documents:
                raise ValueError(
                    "past_key_values must be None for packed documents: a cache holds one sequence per row"
                )
            if checkpointing:
                raise ValueError("past_key_values must be None under gradient checkpointing: layers run twice")
            return cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and values_are_known(hidden)
        elif use_cache and not (values_are_known(hidden) or torch.compiler.is_compiling()):
            raise ValueError("use_cache must be false or None for tensors without values (meta, fake): got True")
        wanted = use_cache and not layout.documents and not checkpointing
        return DynamicCache(config=self.config) if wanted else None


def plan_from(cache: Cache, batch: int, length: int, **described: Any) -> TokenLayout:
    """The layout of new columns ``[B, T]`` behind the columns of ``cache``. The mask must agree with the cache on these."""
    layout = plan_layout(batch, length, **described, past_length=cache.get_seq_length())
    if described.get("attention_mask") is not None:
        check_past(cache, described["attention_mask"], length)
    return layout


def take_offsets(kwargs: dict[str, Any]) -> Tensor | None:
    """The offsets of packed documents, by whichever name they came, out of ``kwargs``; with what collators send beside them.

    There is one list of offsets here, for queries and keys alike; the longest document needs no telling.
    """
    found = {name: kwargs.pop(name, None) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")}
    given = {name: x for name, x in found.items() if x is not None}
    for name in ("max_length_q", "max_length_k"):
        kwargs.pop(name, None)
    if not given:
        return None
    (first, offsets), *others = given.items()
    for name, other in others:
        same = other is offsets or other.shape == offsets.shape
        if not same or (values_are_known(offsets) and not torch.equal(other, offsets)):
            raise ValueError(f"{name} must be the same offsets as {first}: got {other.tolist()} and {offsets.tolist()}")
    return offsets
