"""Cache layers: the states of the mixers, as ``generate`` keeps them.

Outside of autograd a layer keeps one state for decoding, and its mixer updates this state in place. transformers'
``DynamicCache(config=...)`` and ``StaticCache`` build these layers from ``config.layer_types``. A dynamic layer makes room as
it goes. A static layer has room for ``max_cache_len`` tokens, and its buffers never move. There are two counts: ``position`` of
a state counts the real tokens of each row, and ``length`` of a layer counts the columns that ``generate`` has fed, with
padding. The host knows ``length``, and it is never less than a position, so the layer makes room without asking the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin

from loglinear.layers import KVState, MixerState
from loglinear.layers.state import same_buffers, writable
from loglinear.models.journal import REACH, Call, Columns, Journal, Mark
from loglinear.models.layout import TokenLayout
from loglinear.state import CHUNK_SIZE


class MixerCacheLayer(CacheLayerMixin):
    """Holds the state of one mixer, which takes in the columns that the model feeds.

    Args:
        max_cache_len: tokens to have room for (``StaticCache``); None makes room as needed (``DynamicCache``).
    """

    supports_early_init = False  # the first forward pass makes the state
    record_past = False  # whether the layer keeps what it needs to take columns back

    def __init__(self, max_cache_len: int | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self._held: MixerState | None = None
        self._padded: list[tuple[int, Tensor]] = []  # of calls with padding: first column, and which columns are real
        self.length = 0

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether ``generate`` should ask the model for ``get_compiled_call``. A recording call uses no CUDA graph."""
        return self.max_cache_len is not None and not self.record_past

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
            self._held = held.grow(self._room(wanted))

    def feed(self, mixer: nn.Module, hidden: Tensor, layout: TokenLayout, entry_dtype: torch.dtype) -> Tensor:
        """The outputs of ``mixer`` for new columns, which its state takes in.

        Args:
            hidden: inputs of the mixer, as ``layout.pack`` leaves them. entry_dtype: of log-linear entries in decoding.
        """
        self.reserve(layout.length)
        mixed, state = layout.run(mixer, hidden, self.state, output_state=True)
        assert state is not None
        if layout.real is not None:
            self._padded.append((self.length, layout.real))
        self.store(state, layout.length, entry_dtype)
        return mixed

    def real_columns(self) -> Tensor | None:
        """bool ``[B, length]``, the columns that were tokens; None if all were."""
        if not self._padded:
            return None
        real = torch.ones(self.batch_size, self.length, dtype=torch.bool, device=self._padded[0][1].device)
        for start, part in self._padded:
            real[:, start : start + part.shape[1]] = part.to(real.device)
        return real

    def _padded_until(self, length: int) -> list[tuple[int, Tensor]]:
        """Where the first ``length`` columns had padding."""
        return [(start, real[:, : length - start]) for start, real in self._padded if start < length]

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
        """Hold ``state``, in the present buffers if this layer is static and they fit."""
        fits = self.max_cache_len is not None and same_buffers(self._held, state)
        self._held = self._held.restore_(state) if fits else state  # type: ignore[union-attr,arg-type]

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
        self.length, self._padded = 0, []
        if self.max_cache_len is None:
            self._held = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self._keep(self.state.reorder(beam_idx.long()))  # beam search counts in int32
        self._padded = [(start, real.index_select(0, beam_idx.long().to(real.device))) for start, real in self._padded]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.batch_size, device=self.state.position.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def snapshot(self) -> LayerSnapshot:
        """A copy of what the layer holds now, for ``restore``."""
        return LayerSnapshot(None if self.state is None else self.state.clone(), self.length, tuple(self._padded))

    def restore(self, snapshot: LayerSnapshot) -> None:
        """Return to ``snapshot``, which stays as it is; where buffers fit they stay where they are."""
        if snapshot.state is None:
            self.reset()
            return
        self.length, self._padded = snapshot.length, list(snapshot.padded)
        fits = same_buffers(self._held, snapshot.state)
        self._held = self._held.restore_(snapshot.state) if fits else snapshot.state.clone()  # type: ignore[union-attr,arg-type]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError(f"{type(self).__name__} holds whole mixer states, not key_states and value_states: call store")

    lazy_initialization = update  # type: ignore[assignment]


@dataclass(frozen=True)
class LayerSnapshot:
    """The content of one cache layer: its state (None at the start), the columns it had seen, and their padding."""

    state: MixerState | None
    length: int
    padded: tuple[tuple[int, Tensor], ...] = ()


class RecurrentCacheLayer(MixerCacheLayer):
    """For Mamba-2 and Gated DeltaNet mixers, linear and log-linear. Their states go back in time while ``record_past``."""

    _layer_type = "loglinear_recurrent"

    def __init__(self, max_cache_len: int | None = None, **kwargs: Any) -> None:
        super().__init__(max_cache_len, **kwargs)
        self._journal: Journal | None = None

    @property
    def record_past(self) -> bool:
        """Whether columns can be taken back. ``generate`` sets it to False when it is done; what was kept is then dropped."""
        return self._journal is not None

    @record_past.setter
    def record_past(self, wanted: bool) -> None:
        self._journal = (self._journal or Journal()) if wanted else None

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.record_past

    def activate_past_recording(self) -> None:
        """Keep from now on what ``crop`` needs."""
        self.record_past = True

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self._journal is None else self._journal.nbytes)

    def feed(self, mixer: nn.Module, hidden: Tensor, layout: TokenLayout, entry_dtype: torch.dtype) -> Tensor:
        if self._journal is None:
            return super().feed(mixer, hidden, layout, entry_dtype)
        self.reserve(layout.length)
        early = layout.length - REACH
        if early <= 0:
            return self._record(mixer, hidden, layout, entry_dtype)
        self._journal.marks.clear()
        columns, outputs = Columns.of(hidden, layout), []
        last = Columns.join([columns.part(early)])  # a view would keep the whole call in memory
        for part, take_in in ((columns.part(0, early), super().feed), (last, self._record)):
            plan = part.layout()
            outputs.append(plan.unpack(take_in(mixer, plan.pack(part.hidden), plan, entry_dtype)))
        return layout.pack(torch.cat(outputs, dim=1))

    def _record(self, mixer: nn.Module, hidden: Tensor, layout: TokenLayout, entry_dtype: torch.dtype) -> Tensor:
        """``feed`` columns that may be taken back."""
        journal = self._journal
        assert journal is not None
        if journal.wants_mark(self.length):
            journal.marks.append(Mark(self.length, None if self.state is None else self.state.clone()))
        mixed = super().feed(mixer, hidden, layout, entry_dtype)
        journal.append(Columns.of(hidden, layout), self.length)
        journal.call = Call.now(mixer, hidden, entry_dtype)
        return mixed

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` columns, as many as were recorded and kept (see ``journal.py``)."""
        journal, tokens_to_remove = self._journal, int(tokens_to_remove)
        if tokens_to_remove == 0:
            return
        if journal is None:
            raise ValueError(
                f"tokens_to_remove must be 0 for recurrent and log-linear states that record nothing: got "
                f"{tokens_to_remove}; call cache.activate_past_recording() before the tokens that may be taken back"
            )
        reach = journal.reach(self.length)
        if not -reach <= tokens_to_remove < 0:
            raise ValueError(
                f"tokens_to_remove must be in [{-reach}, 0], the columns that were recorded and kept: got {tokens_to_remove}"
            )
        call = journal.call
        assert call is not None
        with call.modes():
            marks = journal.until(self.length + tokens_to_remove)
            mark = marks[-1]
            super().restore(LayerSnapshot(mark.state, mark.length, tuple(self._padded_until(mark.length))))
            for columns in mark.pieces:
                self._feed_again(columns, call)
        journal.marks = marks

    def _feed_again(self, columns: Columns, call: Call) -> None:
        """Take ``columns`` in once more, in calls short enough for steps."""
        mixer = call.mixer()
        if mixer is None:
            raise RuntimeError("crop needs the model that has read the columns: it no longer exists")
        for start in range(0, columns.length, CHUNK_SIZE):
            part = columns.part(start, start + CHUNK_SIZE)
            layout = part.layout()
            super().feed(mixer, layout.pack(part.hidden), layout, call.entry_dtype)

    def reset(self) -> None:
        super().reset()
        self._forget()

    def restore(self, snapshot: LayerSnapshot) -> None:
        super().restore(snapshot)
        self._forget()

    def _forget(self) -> None:
        """Nothing before this moment can be returned to."""
        if self._journal is not None:
            self._journal.marks = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self._journal is not None:
            self._journal.reorder(beam_idx.long())


class KVCacheLayer(MixerCacheLayer):
    """For softmax attention, which keeps every key and value anyway: columns can always be taken back."""

    _layer_type = "loglinear_attention"
    is_croppable = True

    def _room(self, tokens: int) -> int:
        return tokens + max(256, tokens // 4) if self.max_cache_len is None else self.max_cache_len  # each costs memory

    def activate_past_recording(self) -> None:
        """Nothing to do."""

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` columns (at most 0, as in transformers' own layers), padding included."""
        tokens_to_remove = int(tokens_to_remove)  # a tensor from the oldest transformers
        if not -self.length <= tokens_to_remove <= 0:
            raise ValueError(f"tokens_to_remove must be in [{-self.length}, 0]: got {tokens_to_remove}")
        state, kept = self.state, self.length + tokens_to_remove
        if not isinstance(state, KVState) or not tokens_to_remove:
            return
        tokens: Tensor | int = -tokens_to_remove
        for start, real in self._padded:
            removed = ~real[:, max(kept - start, 0) :].to(state.position.device)
            tokens = tokens - removed.sum(1)
        self._held = (state if writable(state) else state.clone()).crop(tokens)
        self.length = kept
        self._padded = self._padded_until(kept)

    def drop_tails(self, real: Tensor) -> None:
        """From now on only ``real [B, length]`` of the columns were tokens; those left out are the last of their rows."""
        state, seen = self.state, self.real_columns()
        assert isinstance(state, KVState)
        dropped = ~real if seen is None else seen.to(real.device) & ~real
        self._held = (state if writable(state) else state.clone()).crop(dropped.sum(1).to(state.position.device))
        self._padded = [(0, real)]


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
    lengths = [layer.length for layer in mixer_layers(cache)]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"past_key_values must have seen as many columns in every layer: got {lengths}; a call or a crop has failed on "
            "its way through the layers, so reset the cache or return to a snapshot_cache"
        )


def check_past(cache: Cache, mask: Tensor, length: int) -> None:
    """Check that ``mask [B, past + length]`` agrees on past columns with the mask that the cache got when it read them.

    Softmax attention can still drop the last tokens of a row: nothing that it keeps has seen them. Waits for the device.

    Raises:
        ValueError: the mask says otherwise, naming the rows.
    """
    layers = mixer_layers(cache)
    past = cache.get_seq_length()
    if not past or mask.shape[1] != past + length:
        return
    told, seen = mask[:, :past] == 1, layers[0].real_columns()
    seen = torch.ones_like(told) if seen is None else seen.to(told.device)
    if bool((told == seen).all()):
        return
    after_a_gap = (seen & ~told).cumsum(1) > 0
    tails = (told & (after_a_gap | ~seen)).any(1).logical_not()
    if bool(tails.all()) and all(isinstance(layer, KVCacheLayer) for layer in layers):
        for layer in layers:
            layer.drop_tails(told)  # type: ignore[attr-defined]
        return
    rows = (told != seen).any(1).nonzero().flatten().tolist()
    raise ValueError(
        f"attention_mask must say of the {past} columns in the cache what it said when they were read: rows {rows} differ. "
        "Tokens that a state has taken in stay there; to leave a row as it is, give 0 for its new columns when they are read"
    )


def mixer_layers(cache: Cache) -> list[MixerCacheLayer]:
    """The layers of a cache made for a model of this package. Raises TypeError for another cache."""
    if not all(isinstance(layer, MixerCacheLayer) for layer in cache.layers):
        raise TypeError(f"cache must be made for a model of this package (copy.deepcopy copies others): got {cache!r}")
    return list(cache.layers)  # type: ignore[arg-type]


def cache_nbytes(cache: Cache) -> int:
    """Bytes held by the states of all layers: the memory of an open conversation."""
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
