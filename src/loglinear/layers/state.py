"""The states of mixers: the memory of the tokens so far, one row per sequence, each at a position of its own.

Every kind answers to the same calls: ``position``, ``batch_size``, ``nbytes``, ``reorder``, ``clone``, ``detach``, ``to``.
There are two sorts. Ordinary states are never written into: a mixer returns a new one. States *for decoding*
(``for_decoding`` makes them, ``in_place`` is true) have buffers of fixed size; outside of autograd a mixer writes the new
tokens into them and returns the same object, so that a CUDA graph finds everything where it was.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear.decoding_state import DecodingState
from loglinear.state import FLOATS, SUMS, LinearState, LogLinearState, TensorState, check_dtype


@dataclass
class RecurrentMixerState:
    """State of a recurrent mixer, linear or log-linear.

    Attributes:
        conv: ``[B, W - 1, channels]``, the last inputs of the short convolution.
        memory: the state of the sequence operation, O(1) (linear) or O(log T) (log-linear) in size.
        in_place: whether this is a state for decoding, which a ``DecodingState`` always makes it. Every token is added to a
            linear one: it is then float32 or float64, for in a dtype with fewer bits it would stop growing.
        rows: int64 ``[B]``, all different, for a state for decoding that steps alone will read: the row of ``conv`` and
            ``memory`` for each row of the batch. Other rows stay as they are. None: they are the same.
    """

    conv: Tensor
    memory: LogLinearState | LinearState | DecodingState
    in_place: bool = False
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        self.in_place = self.in_place or isinstance(self.memory, DecodingState)

    @property
    def position(self) -> Tensor:
        """int64 ``[B]``: tokens seen by each row."""
        return self.memory.position if self.rows is None else self.memory.position[self.rows]

    @property
    def batch_size(self) -> int:
        return self.memory.batch_size if self.rows is None else len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors of the state."""
        return self.conv.numel() * self.conv.element_size() + self.memory.nbytes

    @property
    def max_context(self) -> int | None:
        """Tokens that a row can hold; None where there is no limit."""
        return self.memory.max_context if isinstance(self.memory, DecodingState) else None

    def for_decoding(
        self, max_context: int, entry_dtype: torch.dtype = torch.float32, dtype: torch.dtype | None = None
    ) -> RecurrentMixerState:
        """The same past in buffers of its own, to be updated in place. Waits for the device once.

        Args:
            max_context: tokens that a row must be able to hold. entry_dtype: of log-linear entries, float32 or bfloat16.
            dtype: of the activations to come; None is that of ``conv``.
        """
        dtype = dtype or self.conv.dtype
        check_dtype("dtype", dtype, FLOATS)
        memory, conv = self.ordinary().memory, self.conv.to(dtype, copy=True).contiguous()
        if isinstance(memory, LogLinearState):
            return RecurrentMixerState(conv, DecodingState.from_state(memory, max_context, entry_dtype, dtype))
        assert isinstance(memory, LinearState)
        wide = torch.promote_types(memory.state.dtype, torch.float32)
        held = memory.state.to(wide, copy=True, memory_format=torch.contiguous_format)
        return RecurrentMixerState(conv, LinearState(memory.position.clone(), held), in_place=True)

    def ordinary(self) -> RecurrentMixerState:
        """The same past as an ordinary state; a state for decoding is copied, any other is returned as it is."""
        if not self.in_place:
            return self
        memory = self.memory
        return RecurrentMixerState(
            self.conv.clone(), memory.to_state() if isinstance(memory, DecodingState) else memory.clone()
        )

    def grow(self, max_context: int) -> RecurrentMixerState:
        """A state for decoding with room for ``max_context`` tokens, in new buffers."""
        if not isinstance(self.memory, DecodingState):
            return self
        return replace(self, memory=self.memory.grow(max_context))

    def restore_(self, other: RecurrentMixerState) -> RecurrentMixerState:
        """Become a copy of ``other``, a state for decoding of the same sizes; the buffers stay where they are."""
        copy_tensors_(self._tensors(), other._tensors())
        return self

    def reorder(self, index: Tensor) -> RecurrentMixerState:
        """Rows ``index`` (int64 ``[B']``), in that order; rows may repeat or be left out (beam search)."""
        return replace(
            self, conv=self.conv.index_select(0, index.to(self.conv.device)), memory=self.memory.reorder(index)
        )

    def clone(self) -> RecurrentMixerState:
        """A state that shares no storage with this one."""
        return replace(self, conv=self.conv.clone(), memory=self.memory.clone())

    def detach(self) -> RecurrentMixerState:
        """The same storage, cut from the autograd graph."""
        return replace(self, conv=self.conv.detach(), memory=self.memory.detach())

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> RecurrentMixerState:
        """Move to ``device`` and/or store as ``dtype``, float64, float32 or bfloat16; see ``TensorState.to``."""
        conv, memory = self.conv.to(device=device, dtype=dtype), self.memory
        if dtype is not None and self.in_place and isinstance(memory, LinearState):
            check_dtype("dtype", dtype, SUMS)
            dtype = torch.promote_types(dtype, torch.float32)
        return replace(self, conv=conv, memory=memory.to(device, dtype))

    def _tensors(self) -> list[Tensor]:
        return [self.conv, *self.memory._tensors()]


@dataclass
class KVState(TensorState):
    """State of a softmax attention mixer: every key and value so far.

    Row b's tokens stand at the front, in order: entry i is live when ``i < position[b]``, whatever stands behind it has no
    meaning. Rows of one batch may therefore hold different numbers of tokens and no mask of padding is kept.

    Attributes:
        position: int64 ``[B]``, tokens seen by each row.
        keys, values: ``[B, S, heads, width]``; S >= every position.
        in_place: whether this is a state for decoding. Columns of a call must then fit behind every position.
    """

    position: Tensor
    keys: Tensor
    values: Tensor
    in_place: bool = False

    _stored_as = FLOATS

    @property
    def max_context(self) -> int:
        """S, tokens that a row can hold."""
        return self.keys.shape[1]

    def for_decoding(
        self, max_context: int, entry_dtype: torch.dtype = torch.float32, dtype: torch.dtype | None = None
    ) -> KVState:
        """The same past in buffers of ``max_context`` tokens, to be updated in place (``entry_dtype`` is not for these)."""
        check_dtype("dtype", dtype or self.keys.dtype, FLOATS)
        used = min(self.keys.shape[1], max_context)  # what lies further back has no meaning
        seen = max(self.position.tolist(), default=0) if used < self.keys.shape[1] else 0
        if seen > max_context:
            raise ValueError(f"max_context must be at least the state's position, {seen}: got {max_context}")
        keys, values = (
            x.new_zeros(x.shape[0], max_context, *x.shape[2:], dtype=dtype or x.dtype) for x in (self.keys, self.values)
        )
        keys[:, :used] = self.keys[:, :used]
        values[:, :used] = self.values[:, :used]
        return KVState(self.position.clone(), keys, values, in_place=True)

    def crop(self, tokens: Tensor | int) -> KVState:
        """The state ``tokens`` tokens (an int, or ``[B]``) earlier; a state for decoding goes back in place."""
        if self.in_place:
            self.position -= tokens
            return self
        position = self.position - tokens
        used = max(position.tolist(), default=0)
        return KVState(position, self.keys[:, :used], self.values[:, :used])

    def ordinary(self) -> KVState:
        """This state; a state for decoding is copied, and the device waited for once."""
        if not self.in_place:
            return self
        used = max(self.position.tolist(), default=0)
        return KVState(self.position.clone(), self.keys[:, :used].clone(), self.values[:, :used].clone())

    def grow(self, max_context: int) -> KVState:
        """A state with room for ``max_context`` tokens, in new buffers."""
        more = max(max_context - self.keys.shape[1], 0)
        keys, values = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in (self.keys, self.values))
        return replace(self, keys=keys, values=values)

    def restore_(self, other: KVState) -> KVState:
        """Become a copy of ``other``, a state for decoding of the same sizes; the buffers stay where they are."""
        copy_tensors_(self._tensors(), other._tensors())
        return self


MixerState = RecurrentMixerState | KVState


def writable(state: MixerState) -> bool:
    """Whether PyTorch lets this state be written into: outside of inference mode nothing that was made in it."""
    return torch.is_inference_mode_enabled() or not state.position.is_inference()


def same_buffers(one: MixerState | None, other: MixerState) -> bool:
    """Whether both are states for decoding, of the same shapes and dtypes, on the same devices, and ``one`` writable."""
    if one is None or type(one) is not type(other) or not (one.in_place and other.in_place and writable(one)):
        return False
    kinds = [[(x.shape, x.dtype, x.device) for x in state._tensors()] for state in (one, other)]
    return kinds[0] == kinds[1]


def copy_tensors_(own: list[Tensor], new: list[Tensor]) -> None:
    """``own[i]`` becomes ``new[i]``, in place; all must agree in shape."""
    shapes = [[list(x.shape) for x in tensors] for tensors in (own, new)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"other must have tensors of shapes {shapes[0]}: got {shapes[1]}")
    for mine, theirs in zip(own, new):
        mine.copy_(theirs)
