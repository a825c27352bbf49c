"""From a ModelConfig and a tokenizer to a new model, and its compilation."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.models.levels import level_scales, num_levels
from loglinear.tasks.lm.tokenizer import num_ids
from loglinear.training.config import ModelConfig


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, context: int) -> LogLinearForCausalLM:
    """A freshly initialised model for texts of ``tokenizer``, with a λ for every level of ``context`` tokens.

    Raises ValueError naming the field of ``config`` that does not fit.
    """
    fields: dict[str, Any] = {name: value for name, value in asdict(config).items() if value is not None}
    # The embedding of a padding token gets no gradient, so a tokenizer that pads with its end-of-text token must not say so.
    padding = None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id
    fields["mixer"] = config.mixer[0] if len(config.mixer) == 1 else list(config.mixer)
    return LogLinearForCausalLM(
        LogLinearConfig(
            **fields,
            vocab_size=num_ids(tokenizer),
            max_position_embeddings=context,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=padding,
        )
    )


def longest_context(model: PreTrainedModel) -> int | None:
    """The longest context with a λ for every level; the config's where there are no levels, None where it names none."""
    scales = level_scales(model)
    if scales and not isinstance(model, LogLinearForCausalLM):
        return 1 << (num_levels(scales) - 1)
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def compile_blocks(model: PreTrainedModel, fullgraph: bool = True, **options) -> None:
    """Compile every block of ``model`` where it is used; ``options`` are those of ``torch.compile``.

    Without ``fullgraph`` a block may be several graphs: under context parallelism it is. The blocks of one mixer are one
    program that is compiled once, however deep the model: the first step waits some seconds, not minutes. Names of parameters
    stay as they are. The loss of training is products and a kernel: nothing to compile.
    """
    decoder: Any = model.base_model
    for block in decoder.layers:
        block.compile(fullgraph=fullgraph, **options)
