"""LogLinearModel and LogLinearForCausalLM: one pre-norm decoder for every mixer.

Special about this file: nothing in it knows which mixer a layer holds, and nothing below it knows about padding. Tokens are
packed once on the way in (``layout.py``), states travel in a cache of mixer states (``cache.py``), and everything else is
the plain decoder ``x += mixer(norm(x)); x += mlp(norm(x))``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from loglinear.layers import LogLinearGatedDeltaNet, LogLinearMamba2, RMSNorm, SoftmaxAttention, SumRMSNorm
from loglinear.layers.initialization import StatedInit
from loglinear.models.cache import MixerCacheLayer, check_cache
from loglinear.models.configuration import LogLinearConfig
from loglinear.models.decoding import GraphedCall
from loglinear.models.layout import TokenLayout, plan_layout
from loglinear.ops import pointwise
from loglinear.ops.cross_entropy import linear_cross_entropy
from loglinear.ops.fused import silu_times


def build_mixer(config: LogLinearConfig, name: str) -> nn.Module:
    """The mixer called ``name`` in ``config.mixer``, at the config's sizes."""
    if name == "attention":
        return SoftmaxAttention(
            config.hidden_size,
            num_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            num_kv_heads=config.num_key_value_heads,
            rope_theta=config.rope_theta,
        )
    shared: dict[str, Any] = {
        "num_levels": config.num_levels,
        "conv_width": config.conv_size,
        "norm_eps": config.rms_norm_eps,
        "log_linear": name.startswith("log_linear_"),
    }
    if name.endswith("mamba2"):
        return LogLinearMamba2(
            config.hidden_size,
            num_heads=config.mamba_num_heads,
            head_dim=config.mamba_head_dim,
            state_size=config.mamba_state_size,
            num_groups=config.mamba_num_groups,
            **shared,
        )
    return LogLinearGatedDeltaNet(
        config.hidden_size,
        num_heads=config.delta_num_heads,
        num_key_heads=config.delta_num_key_heads,
        key_dim=config.delta_key_dim,
        value_dim=config.delta_value_dim,
        **shared,
    )


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
        self.mixer = build_mixer(config, config.layer_mixers[layer_idx])
        self.mlp_norm = SumRMSNorm(config.hidden_size, config.rms_norm_eps) if config.intermediate_size else None
        self.mlp = LogLinearMLP(config) if config.intermediate_size else None

    def forward(self, hidden: Tensor, layout: TokenLayout, past_key_values: Cache | None = None) -> Tensor:
        """hidden as ``layout.pack`` leaves it; this layer's state in the cache takes the tokens in."""
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        assert cache is None or isinstance(cache, MixerCacheLayer)  # check_cache saw to it
        if cache is not None:
            cache.reserve(layout.length)
        # Layers may lie on different devices (device_map="auto").
        cu_seqlens = None if layout.cu_seqlens is None else layout.cu_seqlens.to(hidden.device)
        mixed, state = self.mixer(
            self.mixer_norm(hidden),
            state=None if cache is None else cache.state,
            output_state=cache is not None,
            cu_seqlens=cu_seqlens,
            cu_seqlens_cpu=layout.cu_seqlens_cpu,
        )
        if cache is not None:
            assert state is not None
            cache.store(state, layout.length, getattr(torch, self.config.decoding_entry_dtype))
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
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _is_stateful = True

    def __init__(self, config: LogLinearConfig, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        self._is_stateful = "loglinear_recurrent" in config.layer_types  # attention alone can take tokens back

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights for linear layers and embeddings; mixers and convolutions state their own."""
        if isinstance(module, StatedInit):
            for name, value in module.initial_values().items():
                init.copy_(module.get_parameter(name), value)  # leaves alone what a checkpoint has brought
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
        cu_seq_lens_q: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states of every token.

        Args:
            input_ids: int64 ``[B, T]``, or ``inputs_embeds [B, T, hidden_size]`` in their place.
            attention_mask: ``[B, T]`` (with a cache ``[B, past + T]``), 0 for padding. Padding may stand anywhere and never
                changes what real tokens compute; its own outputs are those of a zero hidden state.
            position_ids: ``[B, T]``, only to find packed documents: where they do not go on by one, a document starts.
                Positions themselves are counted per row and document, from the cache on.
            cu_seq_lens_q: integer ``[n + 1]``, packed documents in a batch of one (``DataCollatorWithFlattening``).
            past_key_values: ``DynamicCache(config=model.config)`` or ``StaticCache``; it is updated in place.
            use_cache: whether to return a cache; None is ``config.use_cache`` in evaluation mode and no in training.
            output_hidden_states: whether to return the embeddings and every layer's output too.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it, what came and what is needed.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions must be false: no mixer of this model forms an attention matrix")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = hidden.shape[:2]
        past_length = 0
        if past_key_values is not None:
            check_cache(past_key_values, self.config.layer_types)
            past_length = past_key_values.get_seq_length()
        layout = plan_layout(batch, length, attention_mask, position_ids, cu_seq_lens_q, past_length)
        past_key_values = self._choose_cache(past_key_values, use_cache, layout)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        if not self.config.residual_in_fp32 and torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        collected = [hidden]
        hidden = layout.pack(hidden)
        for layer in self.layers:
            hidden = layer(hidden, layout, past_key_values=past_key_values)
            if output_hidden_states:
                collected.append(layout.unpack(hidden))
        last = layout.unpack(self.norm(hidden))
        return BaseModelOutputWithPast(
            last_hidden_state=last,
            past_key_values=past_key_values,
            hidden_states=(*collected[:-1], last) if output_hidden_states else None,
        )

    def _choose_cache(self, cache: Cache | None, use_cache: bool | None, layout: TokenLayout) -> Cache | None:
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
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        wanted = use_cache and not layout.documents and not checkpointing
        return DynamicCache(config=self.config) if wanted else None


class OutputLayer(nn.Linear):
    """The output layer. Its loss is a call of the module like its logits, so that the hooks of FSDP and others are run."""

    def forward(self, input: Tensor, targets: Tensor | None = None, **options) -> Tensor:
        """Logits of ``input``, hidden states; with ``targets`` their ``linear_cross_entropy`` with these options."""
        if targets is None:
            return super().forward(input)
        return linear_cross_entropy(input, self.weight, targets, **options)


class LogLinearForCausalLM(LogLinearPreTrainedModel, GenerationMixin):
    """The decoder with its output layer: language-model loss, and ``generate``."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LogLinearConfig) -> None:
        super().__init__(config)
        self.model = LogLinearModel(config)
        self.lm_head = OutputLayer(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss when ``labels`` are given.

        Args:
            labels: int64 ``[B, T]``, token ids, -100 where no loss is wanted; they are shifted inside.
            logits_to_keep: how many last columns to compute logits for (0: all), or the columns themselves.
            skip_logits: whether to return the loss alone; the logits of all tokens are then never in memory on CUDA
                (``linear_cross_entropy``). None: in training mode with labels, unless a ``loss_function`` of your own or
                ``logits_to_keep`` asks for logits.
            The others: as in ``LogLinearModel.forward``.

        Returns:
            logits ``[B, T, vocab_size]``, None where skipped; the loss is the mean negative log-likelihood in nats per target
            token, or the sum over ``num_items_in_batch`` when the Trainer passes that. ``shift_labels`` (``[B, T]``, already
            shifted) and ``ignore_index`` are understood too.
        """
        if skip_logits and labels is None:
            raise ValueError("skip_logits must be false or None without labels: there would be nothing to return")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden, logits, loss = outputs.last_hidden_state, None, None
        if labels is not None and self._loss_needs_no_logits(skip_logits, logits_to_keep):
            loss = self._loss_of(hidden, labels, **kwargs)
        else:
            columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, columns])
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=None if skip_logits else logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _loss_needs_no_logits(self, skip_logits: bool | None, logits_to_keep: int | Tensor) -> bool:
        """Whether logits are not wanted, and the loss is the usual one over an output layer that nothing has replaced."""
        skip = self.training if skip_logits is None else skip_logits
        every = isinstance(logits_to_keep, int) and logits_to_keep == 0
        return skip and every and isinstance(self.lm_head, OutputLayer) and self.loss_function is ForCausalLMLoss

    def _loss_of(
        self,
        hidden: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **unused,
    ) -> Tensor:
        """``ForCausalLMLoss`` from hidden states ``[B, T, hidden_size]``."""
        targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
        targets = targets.reshape(hidden.shape[:-1]).to(hidden.device)
        if num_items_in_batch is None:
            return self.lm_head(hidden, targets, ignore_index=ignore_index)
        loss = self.lm_head(hidden, targets, ignore_index=ignore_index, reduction="sum")
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Also called when the vocabulary is resized; a plain linear layer becomes an ``OutputLayer`` of the same weight."""
        plain = new_embeddings
        if type(plain) is nn.Linear and plain.bias is None and not hasattr(plain, "_hf_hook"):
            new_embeddings = OutputLayer(plain.in_features, plain.out_features, bias=False, device="meta")
            new_embeddings.weight = plain.weight
        self.lm_head = new_embeddings

    @property
    def init_continuous_batching(self) -> Any:  # type: ignore[override]
        """Not there: continuous batching pages keys and values. A server that asks (``hasattr``) then answers in turn."""
        raise AttributeError("init_continuous_batching: log-linear and linear states have no pages of keys and values")

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
        """The mask as it is: ``generate`` asks for one mask per layer type where a cache is static, and no mixer takes one."""
        return attention_mask

    def get_compiled_call(self, compile_config) -> Callable[..., CausalLMOutputWithPast]:
        """What ``generate`` calls for single tokens over a static cache on CUDA: a CUDA graph instead of a compiled model."""
        return GraphedCall(self)
