"""LogLinearForCausalLM: the decoder with its output layer. Logits, the loss with and without them, and ``generate``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import can_return_tuple

from loglinear.models.configuration import LogLinearConfig
from loglinear.models.decoding import GraphedCall
from loglinear.models.layout import TokenLayout
from loglinear.models.modeling import LogLinearModel, LogLinearPreTrainedModel, take_offsets
from loglinear.models.outputs import FIELD, OTHER, CausalOutput, LossOutput, one_cache
from loglinear.ops import products
from loglinear.ops.cross_entropy import linear_cross_entropy


def kept_columns(logits_to_keep: int | Tensor) -> slice | Tensor:
    """The columns that get logits: the last so many, all for 0, or those named."""
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep


def without_unpredicted(labels: Tensor, layout: TokenLayout | None, ignore_index: int) -> Tensor:
    """Labels ``[B, T]`` without the tokens that stand behind padding or another document."""
    unpredicted = None if layout is None else layout.unpredicted()
    return labels if unpredicted is None else labels.masked_fill(unpredicted.to(labels.device), ignore_index)


class OutputLayer(nn.Linear):
    """The output layer. Its loss is a call of the module like its logits, so that the hooks of FSDP and others are run."""

    def forward(self, input: Tensor, targets: Tensor | None = None, **options: Any) -> Tensor:
        """Logits of ``input``, hidden states; with ``targets`` their ``linear_cross_entropy`` with these options."""
        if targets is None:
            few = products.why_not(input, self.weight) is None
            return products.projected(input, self.weight)[0] if few else super().forward(input)
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
        seq_idx: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalOutput:
        """Logits, and the loss when ``labels`` are given.

        Args:
            labels: int64 ``[B, T]``, token ids, -100 where no loss is wanted; they are shifted inside. The first token of a
                row or document is no target: nothing before it could predict it.
            logits_to_keep: how many last columns to compute logits for (0: all), or the columns themselves. The loss is of
                all columns.
            skip_logits: whether to return the loss alone; the logits of all tokens are then never in memory on CUDA
                (``linear_cross_entropy``). None: in training mode with labels, unless a ``loss_function`` of your own or
                ``logits_to_keep`` asks for logits.
            use_cache: as in ``LogLinearModel.forward``; None is no with labels.
            The other arguments: as in ``LogLinearModel.forward``. ``num_items_in_batch``, ``ignore_index`` and
                ``shift_labels`` (``[B, T]``, labels that are already shifted), and arguments that a ``loss_function`` of
                your own takes by name, go to the loss.

        Returns:
            logits ``[B, T, vocab_size]``, absent where skipped; the loss is the mean negative log-likelihood in nats per target
            token, or the sum over ``num_items_in_batch`` when the Trainer passes that.

        Raises:
            ValueError, TypeError: an argument does not fit, or is not known; the message names it.
        """
        if skip_logits and labels is None:
            raise ValueError("skip_logits must be false or None without labels: there would be nothing to return")
        loss_options = self._take_loss_options(kwargs, labels)
        cache = one_cache(cache, past_key_values)
        if labels is not None and use_cache is None:
            use_cache = False
        ids = input_ids if inputs_embeds is None else inputs_embeds
        layout = None
        if ids is not None:
            cu_seqlens = take_offsets(kwargs)
            layout = self.model.plan(
                ids.shape[:2],
                cache,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cu_seqlens=cu_seqlens,
                seq_idx=seq_idx,
            )
        outputs = self.model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            layout=layout,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        results = {"hidden_states": outputs.hidden_states, FIELD: getattr(outputs, FIELD)}
        if labels is None:
            return CausalOutput(logits=self.lm_head(hidden[:, kept_columns(logits_to_keep)]), **results)
        if "shift_labels" not in loss_options:
            labels = without_unpredicted(labels, layout, loss_options.get("ignore_index", -100))
        loss, logits = self._loss_and_logits(hidden, labels, logits_to_keep, skip_logits, loss_options)
        kind = LossOutput if logits is None and not torch.compiler.is_compiling() else CausalOutput
        return kind(loss=loss, logits=logits, **results)

    def _take_loss_options(self, kwargs: dict[str, Any], labels: Tensor | None) -> dict[str, Any]:
        """Take the options of the loss out of ``kwargs``."""
        names = {"num_items_in_batch", "ignore_index", "shift_labels"}
        if self.loss_function is not ForCausalLMLoss:
            names |= inspect.signature(self.loss_function).parameters.keys() - {
                "logits",
                "labels",
                "vocab_size",
                "kwargs",
            }
        options = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        options = {name: value for name, value in options.items() if value is not None}
        if labels is None and options.keys() - {
            "num_items_in_batch"
        }:  # which a Trainer sends that computes its own loss
            raise ValueError(f"labels must be given for {', '.join(sorted(options))} to have a meaning: got None")
        return options

    def _loss_and_logits(
        self,
        hidden: Tensor,
        labels: Tensor,
        logits_to_keep: int | Tensor,
        skip_logits: bool | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """The loss of all columns, and the logits of those to keep unless they are skipped."""
        every = isinstance(logits_to_keep, int) and logits_to_keep == 0
        direct = isinstance(self.lm_head, OutputLayer) and self.loss_function is ForCausalLMLoss
        skip = (self.training and direct and every) if skip_logits is None else skip_logits
        columns = kept_columns(logits_to_keep)
        if direct and (skip or not every):
            loss = self._loss_of(hidden, labels, **options)
            return loss, None if skip else self.lm_head(hidden[:, columns])
        logits = self.lm_head(hidden)
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        return loss, None if skip else logits[:, columns]

    def _loss_of(
        self,
        hidden: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
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

    @wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As transformers', with the cache by either name."""
        if OTHER in kwargs:
            kwargs[FIELD] = one_cache(kwargs.pop(OTHER), kwargs.get(FIELD))
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers', without what ``generate`` carries along for itself (stop strings need a tokenizer)."""
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)
        return super().prepare_inputs_for_generation(*args, **kwargs)

    @wraps(GenerationMixin._assisted_decoding)
    def _assisted_decoding(self, input_ids: Any, *args: Any, generation_config: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As transformers', which would read a text from its start again that the cache has read in part."""
        cache, mask = kwargs.get(FIELD), kwargs.get("attention_mask")
        read, given = 0 if cache is None else cache.get_seq_length(), input_ids.shape[1]
        whole = getattr(generation_config, "_mask_length", given) if mask is None else mask.shape[1]
        if read and whole != read + given:
            raise ValueError(
                f"input_ids must be what the cache has not read, with the attention_mask of the whole text, in assisted "
                f"generation: got {given} columns and a mask of {whole}, and the cache has read {read}"
            )
        if mask is None and not read:  # an assistant would take pad tokens that it has drafted for padding
            kwargs["attention_mask"] = input_ids.new_ones(input_ids.shape[0], whole)
        return super()._assisted_decoding(input_ids, *args, generation_config=generation_config, **kwargs)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Also called when the vocabulary is resized; a plain linear layer becomes an ``OutputLayer`` of the same weight."""
        plain = new_embeddings
        if type(plain) is nn.Linear and plain.bias is None and not hasattr(plain, "_hf_hook"):
            new_embeddings = OutputLayer(plain.in_features, plain.out_features, bias=False, device="meta")
            new_embeddings.weight = plain.weight
        self.lm_head = new_embeddings

    @property
    def init_continuous_batching(self) -> Any:  # type: ignore[override]
        """Always raises AttributeError, because continuous batching pages keys and values.

        A server that checks with ``hasattr`` then answers one request after the other.
        """
        raise AttributeError("init_continuous_batching: log-linear and linear states have no pages of keys and values")

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """The mask as it is: ``generate`` asks for one mask per layer type where a cache is static, and no mixer takes one."""
        return attention_mask

    def get_compiled_call(self, compile_config: Any) -> Callable[..., CausalOutput]:
        """The call of ``generate`` for single tokens over a static cache on CUDA: a CUDA graph, not a compiled model."""
        return GraphedCall(self)
