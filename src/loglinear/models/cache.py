"""Cache layers: how ``generate`` holds on to the mixers' states.

Special about this file: a layer keeps one state object and swaps it for the next; transformers' ``DynamicCache(config=...)``
and ``StaticCache`` build these layers from ``config.layer_types``. Two counts live side by side: a state's ``position`` is
the real tokens of each row, a layer's ``length`` the columns that ``generate`` has fed, padding included.
"""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin

from loglinear.layers import KVState, MixerState


class MixerCacheLayer(CacheLayerMixin):
    """Holds the state of one mixer. The model reads ``state`` and hands over the next one with ``store``."""

    is_compileable = False  # states change shape as they grow
    supports_early_init = False  # the first forward pass makes the state
    state: MixerState | None

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.state, self.length = None, 0

    def store(self, state: MixerState, columns: int) -> None:
        """Take the state after ``columns`` more columns of input (padding included)."""
        self.state = state
        self.length += columns

    @property
    def batch_size(self) -> int:
        if self.state is None:
            raise AttributeError("an empty cache has no batch size")  # transformers asks through hasattr
        return self.state.batch_size

    @property
    def nbytes(self) -> int:
        """Bytes held by the state; 0 before the first forward pass."""
        return 0 if self.state is None else self.state.nbytes

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1  # no limit

    def reset(self) -> None:
        self.state, self.length = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.reorder(beam_idx.long())  # beam search counts in int32

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = self.state.position.new_tensor(range(self.batch_size))
            self.reorder_cache(rows.repeat_interleave(repeats))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError(f"{type(self).__name__} holds whole mixer states, not key_states and value_states: call store")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        raise TypeError(f"{type(self).__name__} holds whole mixer states, not key_states and value_states: call store")


class RecurrentCacheLayer(MixerCacheLayer):
    """For Mamba-2 and Gated DeltaNet mixers, linear and log-linear. Their states cannot go back in time."""

    _layer_type = "loglinear_recurrent"
    is_croppable = False

    def activate_past_recording(self) -> None:
        """``generate`` announces with this call that it will take tokens back (assisted generation)."""
        raise ValueError(
            "assisted generation needs a cache that can drop tokens: recurrent and log-linear states merge tokens for "
            "good, so use generate without an assistant, or a model whose mixers are all 'attention'"
        )

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError(
                f"tokens_to_remove must be 0 for recurrent and log-linear states, which merge tokens for good: got "
                f"{tokens_to_remove}; copy.deepcopy the cache before tokens that may have to be taken back"
            )


class KVCacheLayer(MixerCacheLayer):
    """For softmax attention."""

    _layer_type = "loglinear_attention"
    is_croppable = True

    def activate_past_recording(self) -> None:
        """Nothing to do: every key and value is kept anyway."""

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens (at most 0, as in transformers' own layers)."""
        if not -self.length <= tokens_to_remove <= 0:
            raise ValueError(f"tokens_to_remove must be in [-{self.length}, 0]: got {tokens_to_remove}")
        if isinstance(self.state, KVState):
            self.state = self.state.crop(-tokens_to_remove)
            self.length += tokens_to_remove


# A dynamic layer registers itself by its _layer_type; the same classes serve StaticCache.
STATIC_LAYER_TYPE_MAPPING.update({cls._layer_type: cls for cls in (RecurrentCacheLayer, KVCacheLayer)})


def check_cache(cache: Cache, num_layers: int) -> None:
    """Raise a TypeError unless ``cache`` was built for this model's layers."""
    layers = getattr(cache, "layers", None)
    if layers is None or len(layers) != num_layers or not all(isinstance(layer, MixerCacheLayer) for layer in layers):
        raise TypeError(
            f"past_key_values must be made for this model, with DynamicCache(config=model.config): got {cache!r}"
        )


def cache_nbytes(cache: Cache) -> int:
    """Bytes held by the states of all layers: what a conversation costs to keep open."""
    return sum(layer.nbytes for layer in cache.layers if isinstance(layer, MixerCacheLayer))
