"""The states of lifted mixers, inside the cache objects of transformers.

A cache of transformers has one layer for each layer of the model. The layer of a linear mixer holds two tensors, and it may
hold keys and values of softmax attention beside them. A lifted mixer takes over the linear half on its first call: a
``RecurrentCacheLayer`` stands in place of the two tensors. The attention half, masks and lengths stay those of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as once
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from loglinear.models.cache import RecurrentCacheLayer
from loglinear.models.layout import TokenLayout
from loglinear.models.lifted.plans import Plans
from loglinear.models.modeling import take_offsets


class LiftedCacheLayer(LinearAttentionCacheLayerMixin):
    """Mixed into a cache layer of transformers: its linear half is ``states``, the state of one lifted mixer."""

    states: RecurrentCacheLayer

    @property
    def has_previous_state(self) -> dict[int, bool]:  # type: ignore[override]
        """Whether the mixer has read columns, by the number of the state. A lifted mixer has one state."""
        return {0: self.states.length > 0}

    @property
    def record_past(self) -> bool:  # type: ignore[override]
        """Whether columns can be taken back."""
        return self.states.record_past

    @record_past.setter
    def record_past(self, wanted: bool) -> None:
        self.states.record_past = wanted

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        attention = self._attention()
        return self.states.is_croppable and (attention is None or attention.is_croppable)

    def activate_past_recording(self) -> None:
        """Keep from now on what ``crop`` needs."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` columns, which must have been recorded."""
        attention = self._attention()
        crop = None if attention is None else attention.crop  # a static layer has none, and says so before any change
        self.states.crop(tokens_to_remove)
        if crop is not None:
            crop(self, int(tokens_to_remove))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[safe-super]
        self.states.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[safe-super,arg-type]
        self.states.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep rows ``indices``."""
        attention = self._attention()
        if attention is not None:
            attention.batch_select_indices(self, indices)
        self.states.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        attention = self._attention()
        if attention is not None:
            attention.batch_repeat_interleave(self, repeats)
        self.states.batch_repeat_interleave(repeats)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        raise TypeError(f"{type(self).__name__} holds the state of a lifted mixer: another model cannot go on from it")

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        raise TypeError(f"{type(self).__name__} holds the state of a lifted mixer: another model cannot go on from it")

    def _attention(self) -> Any:
        """The class of the attention half; None where there is none."""
        for kind in type(self).__mro__:
            if issubclass(kind, CacheLayerMixin) and not issubclass(kind, LinearAttentionCacheLayerMixin):
                return kind
        return None


@once
def _lifted_kind(kind: type[LinearAttentionCacheLayerMixin]) -> type[LiftedCacheLayer]:
    """``kind`` with the linear half of a ``LiftedCacheLayer``."""
    return type(f"Lifted{kind.__name__}", (LiftedCacheLayer, kind), {})


class ListedStates(RecurrentCacheLayer):
    """The states of a lifted mixer in the list of a ``MiniMaxCache``, which treats its members as tensors of rows."""

    def repeat_interleave(self, repeats: int, dim: int = 0) -> ListedStates:
        """Repeat every row ``repeats`` times."""
        self.batch_repeat_interleave(repeats)
        return self

    def __getitem__(self, index: tuple[Tensor, Any]) -> ListedStates:
        """Keep the rows ``index[0]``."""
        self.batch_select_indices(index[0])
        return self


class ListingCache:
    """Mixed into a ``MiniMaxCache``, which forgets its list where beams are reordered and where it is reset."""

    linear_cache: list[Any]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        for states in self._listed():
            states.reorder_cache(beam_idx)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[misc]
        for states in self._listed():
            states.reset()

    def _listed(self) -> list[ListedStates]:
        return [states for states in self.linear_cache if isinstance(states, ListedStates)]


@once
def _listing_kind(kind: type[Cache]) -> type[Cache]:
    return type(f"Lifted{kind.__name__}", (ListingCache, kind), {})


def _listed_states(cache: Any, layer_idx: int) -> ListedStates:
    """``states_of`` for a ``MiniMaxCache``."""
    if not isinstance(cache, ListingCache):
        cache.__class__ = _listing_kind(type(cache))  # type: ignore[arg-type]
    while len(cache.linear_cache) <= layer_idx:
        cache.linear_cache.append([])
    states = cache.linear_cache[layer_idx]
    if isinstance(states, ListedStates):
        return states
    if not isinstance(states, list) or states:
        raise ValueError(_OF_ANOTHER.format(layer_idx))
    cache.linear_cache[layer_idx] = ListedStates()
    return cache.linear_cache[layer_idx]


_OF_ANOTHER = "cache must be empty or filled by a lifted model: layer {} holds the tensors of another one"


def states_of(cache: Cache, layer_idx: int) -> RecurrentCacheLayer:
    """The states of the lifted mixer of layer ``layer_idx``, in ``cache.layers``. The first call takes the layer over.

    Raises:
        TypeError: the cache has no linear half there.
        ValueError: the linear half was filled by a model that is not lifted.
    """
    if hasattr(cache, "linear_cache"):
        return _listed_states(cache, layer_idx)
    layer = cache.layers[layer_idx] if layer_idx < len(getattr(cache, "layers", ())) else None
    if isinstance(layer, LiftedCacheLayer):
        return layer.states
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        raise TypeError(
            f"cache must have a linear layer at {layer_idx}, as DynamicCache(config=model.config) has: got {cache!r}"
        )
    if any(layer.has_previous_state.values()):
        raise ValueError(_OF_ANOTHER.format(layer_idx))
    states = RecurrentCacheLayer()
    states.record_past = layer.__dict__.pop("record_past")
    layer.__dict__.pop("has_previous_state")
    layer.__class__ = _lifted_kind(type(layer))  # code that holds the layer sees the change
    layer.states = states  # type: ignore[attr-defined]
    return states


class StatefulMixer(Protocol):
    """The part of a lifted mixer that ``run`` calls. The mixer is an ``nn.Module`` with the forward of its model."""

    layer_idx: int

    def mix(
        self,
        hidden: Tensor,
        state: Any = None,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Mix along T. Arguments and results are those of every mixer: see ``loglinear.layers``."""
        ...


def run(
    mixer: nn.Module,
    hidden: Tensor,
    cache: Cache | None = None,
    attention_mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    entry_dtype: torch.dtype = torch.float32,
    plans: Plans | None = None,
    **kwargs: Any,
) -> Tensor:
    """The outputs of a lifted mixer; its state in ``cache`` takes the columns in.

    Args:
        mixer: a ``StatefulMixer``. hidden: ``[B, T, hidden_size]``, with padding.
        cache: of the model, ``DynamicCache(config=...)`` or ``StaticCache``; None keeps nothing.
        attention_mask: ``[B, T]`` or ``[B, past + T]``, 1 for tokens and 0 for padding; None is no padding.
        seq_idx: integer ``[B, T]``, the number of each token's document.
        entry_dtype: of log-linear entries in decoding, float32 or bfloat16.
        plans: where the layers of a model find the layout that the first of them has read.
        kwargs: what the layers of a model hand on. Offsets of packed documents (``cu_seq_lens_q``) are taken from it; the
            rest is for attention layers.
    """
    offsets = take_offsets(kwargs)
    plan = partial(
        Plans() if plans is None else plans, attention_mask=attention_mask, cu_seqlens=offsets, seq_idx=seq_idx
    )
    if cache is None:
        layout = plan(hidden.shape[0], hidden.shape[1])
        mixed, _ = layout.run(mixer, layout.pack(hidden))
        return layout.unpack(mixed)
    feed = _feed
    if torch.compiler.is_compiling():
        # The content of a state depends on positions: no single graph, so the compiler need not see this.
        feed = torch.compiler.disable(_feed)
    return feed(mixer, hidden, cache, plan, entry_dtype)


def _feed(
    mixer: nn.Module, hidden: Tensor, cache: Cache, plan: Callable[..., TokenLayout], entry_dtype: torch.dtype
) -> Tensor:
    """``run`` with a cache. ``plan`` reads the layout of B rows and T columns."""
    layout = plan(hidden.shape[0], hidden.shape[1])
    if layout.documents:
        raise ValueError("cache must be None for packed documents: a cache holds one sequence per row")
    layer_idx = mixer.layer_idx
    assert isinstance(layer_idx, int)
    mixed = states_of(cache, layer_idx).feed(mixer, layout.pack(hidden), layout, entry_dtype)
    return layout.unpack(mixed)
