"""OUTPUTS: the results of the models. The cache is called ``cache`` and ``past_key_values``, whatever transformers calls it.

transformers 5.24 renamed the argument and the output field from ``past_key_values`` to ``cache``. ``generate`` reads the
field that its version knows; these classes have that field and answer to the other name too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

NAMES = ("cache", "past_key_values")
FIELD = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
(OTHER,) = (name for name in NAMES if name != FIELD)


@dataclass
class ModelOutput(BaseModelOutputWithPast):
    """``last_hidden_state [B, T, hidden_size]``, ``hidden_states``, and the cache by both names."""


@dataclass
class CausalOutput(CausalLMOutputWithPast):
    """``loss``, ``logits [B, T, vocab_size]``, ``hidden_states``, and the cache by both names."""


@dataclass(repr=False)
class LossOutput(CausalOutput):
    """A loss without logits. An access to ``logits`` is an error that says how to get them."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self), ()


def _no_logits(output: LossOutput) -> None:
    raise AttributeError(
        "logits were not computed: with labels a model in training mode returns the loss alone; call it with "
        "skip_logits=False"
    )


def _keep_no_logits(output: LossOutput, logits: Tensor | None) -> None:
    assert logits is None, "a LossOutput has no logits"


def _by_the_other_name(output: Any) -> Cache | None:
    """The cache after this call; None if there is none."""
    return getattr(output, FIELD)


# Set here, since a dataclass would take a property in its body for a field's default.
LossOutput.logits = property(_no_logits, _keep_no_logits)  # type: ignore[assignment]
# No field either: FSDP looks at every field of an output.
LossOutput.__dataclass_fields__ = {
    name: field for name, field in LossOutput.__dataclass_fields__.items() if name != "logits"
}
for _kind in (ModelOutput, CausalOutput):
    setattr(_kind, OTHER, property(_by_the_other_name))


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that came by either name. Raises ValueError for two caches."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument: got two different caches")
    return past_key_values if cache is None else cache
