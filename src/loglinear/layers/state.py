"""The states of mixers: the memory of the tokens so far, one row per sequence, each at a position of its own.

Every kind answers to the same calls: ``position``, ``batch_size``, ``nbytes``, ``reorder``, ``clone``, ``detach``, ``to``.
There are two sorts. Ordinary states are never written into: a mixer returns a new one. States *for decoding*
(``for_decoding`` makes them, ``in_place`` is true) have buffers of fixed size; outside of autograd a mixer writes the new
tokens into them and returns the same object, so that a CUDA graph finds everything where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear.decoding_state import DecodingState
from loglinear.state import FLOATS, LinearState, LogLinearState, TensorState, check_dtype


@dataclass
class LinearDecodingState(LinearState):
    """The state of the plain linear model, updated in place. It holds any number of tokens.

    Every token is added to it, so it is float32 or float64: in a dtype with fewer bits it would stop growing.
    """

    _wide = frozenset({"position", "state"})

    def to_state(self) -> LinearState:
        """The same past as the initial state of an ordinary call; everything copied."""
        return LinearState(self.position.clone(), self.state.clone())


@dataclass
class RecurrentMixerState:
    """State of a recurrent mixer, linear or log-linear.

    Attributes:
        conv: ``[B, W - 1, channels]``, the last inputs of the short convolution.
        memory: the state of the sequence operation, O(1) (linear) or O(log T) (log-linear) in size.
    """

    conv: Tensor
    memory: LogLinearState | LinearState | DecodingState

    @property
    def position(self) -> Tensor:
        """int64 ``[B]``: tokens seen by each row."""
        return self.memory.position

    @property
    def batch_size(self) -> int:
        return self.memory.batch_size

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors of the state."""
        return self.conv.numel() * self.conv.element_size() + self.memory.nbytes

    @property
    def in_place(self) -> bool:
        """Whether this is a state for decoding."""
        return isinstance(self.memory, (DecodingState, LinearDecodingState))

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
        memory = self.ordinary().memory
        ready: DecodingState | LinearDecodingState
        if isinstance(memory, LogLinearState):
            ready = DecodingState.from_state(memory, max_context, entry_dtype, dtype)
        else:
            assert isinstance(memory, LinearState)
            wide = torch.promote_types(memory.state.dtype, torch.float32)
            ready = LinearDecodingState(
                memory.position.clone(), memory.state.to(wide, copy=True, memory_format=torch.contiguous_format)
            )
        return RecurrentMixerState(self.conv.to(dtype, copy=True).contiguous(), ready)

    def ordinary(self) -> RecurrentMixerState:
        """The same past as an ordinary state; a state for decoding is copied, any other is returned as it is."""
        if not isinstance(self.memory, (DecodingState, LinearDecodingState)):
            return self
        return RecurrentMixerState(self.conv.clone(), self.memory.to_state())

    def grow(self, max_context: int) -> RecurrentMixerState:
        """A state for decoding with room for ``max_context`` tokens, in new buffers."""
        if not isinstance(self.memory, DecodingState):
            return self
        return RecurrentMixerState(self.conv, self.memory.grow(max_context))

    def restore_(self, other: RecurrentMixerState) -> RecurrentMixerState:
        """Become a copy of ``other``, a state for decoding of the same sizes; the buffers stay where they are."""
        copy_tensors_(self._tensors(), other._tensors())
        return self

    def reorder(self, index: Tensor) -> RecurrentMixerState:
        """Rows ``index`` (int64 ``[B']``), in that order; rows may repeat or be left out (beam search)."""
        return RecurrentMixerState(self.conv.index_select(0, index.to(self.conv.device)), self.memory.reorder(index))

    def clone(self) -> RecurrentMixerState:
        """A state that shares no storage with this one."""
        return RecurrentMixerState(self.conv.clone(), self.memory.clone())

    def detach(self) -> RecurrentMixerState:
        """The same storage, cut from the autograd graph."""
        return RecurrentMixerState(self.conv.detach(), self.memory.detach())

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> RecurrentMixerState:
        """Move to ``device`` and/or store as ``dtype``, float64, float32 or bfloat16; see ``TensorState.to``."""
        return RecurrentMixerState(self.conv.to(device=device, dtype=dtype), self.memory.to(device, dtype))

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
    """

    position: Tensor
    keys: Tensor
    values: Tensor

    in_place: ClassVar[bool] = False
    _stored_as = FLOATS

    @property
    def max_context(self) -> int:
        """S, tokens that a row can hold."""
        return self.keys.shape[1]

    def for_decoding(
        self, max_context: int, entry_dtype: torch.dtype = torch.float32, dtype: torch.dtype | None = None
    ) -> KVDecodingState:
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
        return KVDecodingState(self.position.clone(), keys, values)

    def crop(self, tokens: Tensor | int) -> KVState:
        """The state ``tokens`` tokens (an int, or ``[B]``) earlier, without the tokens that were guessed wrongly."""
        position = self.position - tokens
        used = max(position.tolist(), default=0)
        return KVState(position, self.keys[:, :used], self.values[:, :used])

    def ordinary(self) -> KVState:
        """This state; a state for decoding is copied."""
        return self


@dataclass
class KVDecodingState(KVState):
    """Keys and values in buffers of fixed size, updated in place. Columns of a call must fit behind every position."""

    in_place: ClassVar[bool] = True

    def crop(self, tokens: Tensor | int) -> KVDecodingState:
        """This state ``tokens`` tokens (an int, or ``[B]``) earlier, in place."""
        self.position -= tokens
        return self

    def ordinary(self) -> KVState:
        """The same past as an ordinary state; everything copied. Waits for the device once."""
        used = max(self.position.tolist(), default=0)
        return KVState(self.position.clone(), self.keys[:, :used].clone(), self.values[:, :used].clone())

    def grow(self, max_context: int) -> KVDecodingState:
        """A state with room for ``max_context`` tokens, in new buffers."""
        more = max(max_context - self.keys.shape[1], 0)
        keys, values = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in (self.keys, self.values))
        return KVDecodingState(self.position, keys, values)

    def restore_(self, other: KVState) -> KVDecodingState:
        """Become a copy of ``other``, a state for decoding of the same sizes; the buffers stay where they are."""
        copy_tensors_(self._tensors(), other._tensors())
        return self


MixerState = RecurrentMixerState | KVState


def writable(state: MixerState) -> bool:
    """Whether PyTorch lets this state be written into: outside of inference mode nothing that was made in it."""
    return torch.is_inference_mode_enabled() or not state.position.is_inference()


def same_buffers(one: MixerState, other: MixerState) -> bool:
    """Whether two states for decoding have tensors of the same shapes and dtypes, on the same devices, ``one`` writable."""
    if type(one) is not type(other) or not (one.in_place and other.in_place and writable(one)):
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
