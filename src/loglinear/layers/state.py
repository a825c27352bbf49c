"""What a mixer remembers of the tokens it has seen, one row per sequence, each at a position of its own.

Both kinds answer to the same calls: ``position``, ``batch_size``, ``nbytes``, ``reorder``, ``clone``, ``detach``, ``to``.
Mixers never write into a state that they are given; they return a new one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loglinear.state import LinearState, LogLinearState, TensorState


@dataclass
class RecurrentMixerState:
    """State of a Mamba-2 or Gated DeltaNet mixer, linear or log-linear.

    Attributes:
        conv: ``[B, W - 1, channels]``, the last inputs of the short convolution.
        memory: the state of the sequence operation, O(1) (linear) or O(log T) (log-linear) in size.
    """

    conv: Tensor
    memory: LogLinearState | LinearState

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
        """Move to ``device`` and/or store as ``dtype``; logs stay float32 and positions int64."""
        return RecurrentMixerState(self.conv.to(device=device, dtype=dtype), self.memory.to(device, dtype))


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

    def crop(self, tokens: int) -> KVState:
        """The state ``tokens`` tokens earlier (assisted generation takes back what it guessed wrongly)."""
        kept = self.keys.shape[1] - tokens  # still at least every position
        return KVState(self.position - tokens, self.keys[:, :kept], self.values[:, :kept])


MixerState = RecurrentMixerState | KVState
