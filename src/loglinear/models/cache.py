"""Cache layers: how ``generate`` holds on to the mixers' states.

Special about this file: outside of autograd a layer keeps one state for decoding, which its mixer updates in place;
transformers' ``DynamicCache(config=...)`` and ``StaticCache`` build these layers from ``config.layer_types``. A dynamic one
makes room as it goes; a static one has room for ``max_cache_len`` tokens and its buffers stay where they are. Two counts live
side by side: a state's ``position`` is the real tokens of each row, a layer's ``length`` the columns that ``generate`` has
fed, padding included. ``length`` is known on the host and never less than a position: room is made without asking the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin

from loglinear.layers import KVState, MixerState
from loglinear.layers.state import same_buffers, writable


class MixerCacheLayer(CacheLayerMixin):
    """Holds the state of one mixer. The model calls ``reserve``, reads ``state``, and hands over the next with ``store``.

    Args:
        max_cache_len: tokens to have room for (``StaticCache``); None makes room as needed (``DynamicCache``).
    """

    supports_early_init = False  # the first forward pass makes the state

    def __init__(self, max_cache_len: int | None = None, **kwargs) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self.is_compileable = max_cache_len is not None  # generate then asks the model for get_compiled_call
        self._held: MixerState | None = None
        self.length = 0

    @property
    def state(self) -> MixerState | None:
        """The state after ``length`` columns; None before the first."""
        return self._held if self.length else None

    def reserve(self, columns: int) -> None:
        """See to it that the state can take ``columns`` more columns. Never waits for the device."""
        wanted, held = self.length + columns, self._held
        if self.max_cache_len is not None and wanted > self.max_cache_len:
            raise ValueError(f"max_cache_len must be at least {wanted}, the columns so far: got {self.max_cache_len}")
        if held is not None and not writable(held):
            self._held = held = held.clone()
        if self.max_cache_len is not None or held is None or not held.in_place or held.max_context is None:
            return
        if wanted > held.max_context:
            self._held = held.grow(self._room(wanted))  # type: ignore[union-attr]

    def _room(self, tokens: int) -> int:
        """Tokens to have room for, when there are ``tokens`` of them."""
        return max(4096, 2 * tokens) if self.max_cache_len is None else self.max_cache_len  # a slot more per doubling

    def store(self, state: MixerState, columns: int, entry_dtype: torch.dtype = torch.float32) -> None:
        """Take the state after ``columns`` more columns of input (padding included).

        Outside of autograd it is kept as a state for decoding, its log-linear entries in ``entry_dtype``.
        """
        self.length += columns
        if state is not self._held:
            decoding = not torch.is_grad_enabled()
            self._keep(state.for_decoding(self._room(self.length), entry_dtype) if decoding else state)

    def _keep(self, state: MixerState) -> None:
        """Hold ``state``: in the buffers there are if this layer is static and they fit."""
        if self.max_cache_len is not None and self._held is not None and same_buffers(self._held, state):
            self._held.restore_(state)  # type: ignore[union-attr,arg-type]
        else:
            self._held = state

    @property
    def batch_size(self) -> int:
        if self.state is None:
            raise AttributeError("an empty cache has no batch size")  # transformers asks through hasattr
        return self.state.batch_size

    @property
    def nbytes(self) -> int:
        """Bytes held by the state, room for tokens to come included; 0 before the first forward pass."""
        return 0 if self._held is None else self._held.nbytes

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def reset(self) -> None:
        """Forget everything; a static layer keeps its buffers for the next text of as many rows."""
        self.length = 0
        if self.max_cache_len is None:
            self._held = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self._keep(self.state.reorder(beam_idx.long()))  # beam search counts in int32

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.batch_size, device=self.state.position.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def snapshot(self) -> LayerSnapshot:
        """A copy of what the layer holds now, for ``restore``."""
        return LayerSnapshot(None if self.state is None else self.state.clone(), self.length)

    def restore(self, snapshot: LayerSnapshot) -> None:
        """Return to ``snapshot``, which stays as it is; where buffers fit they stay where they are."""
        if snapshot.state is None:
            self.reset()
            return
        self.length = snapshot.length
        if self._held is not None and same_buffers(self._held, snapshot.state):
            self._held.restore_(snapshot.state)  # type: ignore[union-attr,arg-type]
        else:
            self._held = snapshot.state.clone()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError(f"{type(self).__name__} holds whole mixer states, not key_states and value_states: call store")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        raise TypeError(f"{type(self).__name__} holds whole mixer states, not key_states and value_states: call store")


@dataclass(frozen=True)
class LayerSnapshot:
    """What one cache layer held: its state (None at the start) and the columns it had seen."""

    state: MixerState | None
    length: int


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
                f"{tokens_to_remove}; take a snapshot_cache before tokens that may have to be taken back"
            )


class KVCacheLayer(MixerCacheLayer):
    """For softmax attention."""

    _layer_type = "loglinear_attention"
    is_croppable = True

    def _room(self, tokens: int) -> int:
        return tokens + max(256, tokens // 4) if self.max_cache_len is None else self.max_cache_len  # each costs memory

    def activate_past_recording(self) -> None:
        """Nothing to do: every key and value is kept anyway."""

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens (at most 0, as in transformers' own layers)."""
        if not -self.length <= tokens_to_remove <= 0:
            raise ValueError(f"tokens_to_remove must be in [-{self.length}, 0]: got {tokens_to_remove}")
        if isinstance(self.state, KVState):
            self._held = self.state.crop(-tokens_to_remove)
            self.length += tokens_to_remove


# A dynamic layer registers itself by its _layer_type; the same classes serve StaticCache.
STATIC_LAYER_TYPE_MAPPING.update({cls._layer_type: cls for cls in (RecurrentCacheLayer, KVCacheLayer)})


def check_cache(cache: Cache, layer_types: list[str], rows: int) -> None:
    """Raise unless ``cache`` was built for a model of these ``config.layer_types`` and is empty or holds ``rows`` rows."""
    kinds = [getattr(layer, "_layer_type", None) for layer in getattr(cache, "layers", ())]
    if kinds != layer_types:
        raise TypeError(
            f"past_key_values must be made for this model, with DynamicCache(config=model.config): got {cache!r}"
        )
    held = {layer.batch_size for layer in mixer_layers(cache) if layer.state is not None}
    if held - {rows}:
        raise ValueError(f"past_key_values must hold as many rows as there are ids, {rows}: got {max(held)}")


def mixer_layers(cache: Cache) -> list[MixerCacheLayer]:
    """The layers of a cache made for a model of this package."""
    return [layer for layer in cache.layers if isinstance(layer, MixerCacheLayer)]


def cache_nbytes(cache: Cache) -> int:
    """Bytes held by the states of all layers: what a conversation costs to keep open."""
    return sum(layer.nbytes for layer in mixer_layers(cache))


def snapshot_cache(cache: Cache) -> list[LayerSnapshot]:
    """A copy of all states, one for each layer: the point to return to if tokens to come are taken back (speculation)."""
    return [layer.snapshot() for layer in mixer_layers(cache)]


def restore_cache(cache: Cache, snapshot: list[LayerSnapshot]) -> None:
    """Return to a ``snapshot_cache`` of this cache. It stays valid; a static cache's buffers stay where they are."""
    layers = mixer_layers(cache)
    if len(snapshot) != len(layers):
        raise ValueError(f"snapshot must be of a cache of {len(layers)} layers: got {len(snapshot)}")
    for layer, saved in zip(layers, snapshot):
        layer.restore(saved)
