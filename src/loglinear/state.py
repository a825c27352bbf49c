"""STATE: the past of a sequence for decoding, as plain dataclasses of tensors.

A state carries a *position per row*. Log-linear attention is not shift-invariant. The rows of one batch may therefore
stand at different positions, and every operation keeps position and buckets together.

Legend: B rows, M slots, H value heads, G q/k groups, K, V widths, C chunk size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from loglinear.transition import Transition, is_per_channel, transition_of

# Tokens per leaf of the tree in every state, and in the kernels these or a part of them (kernels/tuning.py): K·V of a leaf
# state equals its raw keys at K = V = 64.
CHUNK_SIZE = 64
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # dtypes of inputs
SUMS = FLOATS[:3]  # dtypes of what sums over many tokens: it leaves the range of float16


def one_of(dtypes: Sequence[torch.dtype]) -> str:
    """``float32, bfloat16 or float64``."""
    *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(first)} or {last}" if first else last


def check_dtype(name: str, dtype: torch.dtype, allowed: Sequence[torch.dtype], where: str = "") -> None:
    """Raise a TypeError unless ``dtype`` is one of those allowed (``where``: in which case they are)."""
    if dtype not in allowed:
        raise TypeError(f"{name} must be {one_of(allowed)}{where}: got {dtype}")


def check_chunk_size(name: str, size: int) -> None:
    """Raise a ValueError unless ``size`` is a power of two."""
    if not isinstance(size, int) or size < 1 or size & (size - 1):
        raise ValueError(f"{name} must be a power of two: got {size!r}")


def check_index(name: str, index: Tensor) -> None:
    """Raise a TypeError unless ``index`` can be numbers of rows."""
    if index.dtype != torch.int64 or index.dim() != 1:
        raise TypeError(f"{name} must be an int64 tensor of one axis: got {index.dtype} of shape {list(index.shape)}")


def has_values(x: Tensor) -> bool:
    """Whether x holds values at all: not on the meta device, not fake. Where a result needs them, their absence is an error."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def values_are_known(x: Tensor) -> bool:
    """Whether the values of x may be read now: they exist, and no graph is being traced. Where not, another way is taken."""
    return not torch.compiler.is_compiling() and has_values(x)


class TensorState:
    """Row operations shared by both states: every field is a tensor whose first axis is the batch, None, or an int."""

    position: Tensor
    _wide = frozenset({"position", "decay", "open_g"})  # logs and positions, which ``to`` never stores in few bits
    _stored_as: Sequence[torch.dtype] = SUMS  # what ``to`` takes

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {name: fn(tensor) for name, tensor in self._named()}
        return dataclasses.replace(self, **changed)  # type: ignore[type-var]

    def _tensors(self) -> list[Tensor]:
        return [tensor for _, tensor in self._named()]

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.position.shape[0]

    @property
    def device(self) -> torch.device:
        return self.position.device

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors of the state."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def _named(self) -> list[tuple[str, Tensor]]:
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return [(name, value) for name, value in values if isinstance(value, Tensor)]

    def clone(self) -> Self:
        """A state that shares no storage with this one."""
        return self._map(torch.clone)

    def detach(self) -> Self:
        """The same storage, cut from the autograd graph."""
        return self._map(Tensor.detach)

    def reorder(self, index: Tensor) -> Self:
        """Rows ``index`` (int64 ``[B']``) of this state, in that order; rows may repeat or be left out (beam search)."""
        check_index("index", index)
        return self._map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move to ``device`` and/or store keys, values and states as ``dtype``: float64, float32 or bfloat16.

        Logs are then float32, float64 where ``dtype`` is; positions stay int64.
        """
        if dtype is None:
            return self._map(lambda tensor: tensor.to(device=device))
        check_dtype("dtype", dtype, self._stored_as)
        wide = torch.promote_types(dtype, torch.float32)
        cast: dict[str, Any] = {
            name: tensor.to(device, wide if name in self._wide else dtype)
            for name, tensor in self._named()
            if tensor.is_floating_point()
        }
        return dataclasses.replace(self, position=self.position.to(device), **cast)  # type: ignore[type-var]


class SlotState(TensorState):
    """A state with slots: ``entries [B, H, M, K, V]``, and ``decay``, whose last axis is M, or None."""

    entries: Tensor
    decay: Tensor | None

    def with_slots(self, slots: int) -> Self:
        """This state with at least so many slots; those that are added are dead."""
        more = max(slots - self.entries.shape[2], 0)
        decay = None if self.decay is None else F.pad(self.decay, (0, more))
        return dataclasses.replace(self, entries=F.pad(self.entries, (0, 0, 0, 0, 0, more)), decay=decay)  # type: ignore[type-var]


State = TypeVar("State", bound=TensorState)


def joined(states: Sequence[State]) -> State:
    """The rows of several states as one state, with the slots of the largest; one state as it is."""
    if len(states) == 1:
        return states[0]
    most = max((state.entries.shape[2] for state in states if isinstance(state, SlotState)), default=0)
    grown = [state.with_slots(most) if isinstance(state, SlotState) else state for state in states]
    values: dict[str, Any] = {
        name: torch.cat([getattr(state, name) for state in grown]) for name, _ in grown[0]._named()
    }
    return dataclasses.replace(grown[0], **values)  # type: ignore[type-var]


@dataclass
class LogLinearState(SlotState):
    """State of log-linear attention after ``position`` tokens: O(log T) buckets and the raw tokens of the open chunk.

    Slot m of ``entries`` holds the bucket of ``2**m`` closed chunks on the query path of chunk ``position // C`` and is
    live exactly when bit m of that integer is set. Every live bucket is seen from the end of the last closed chunk:
    its true value is ``exp(decay) * entries``, so that time passing rewrites the log and not the matrix.

    ``DecodingState`` has the same layout, in buffers that steps write into.

    Attributes:
        position: int64 ``[B]``, tokens seen by each row.
        entries: ``[B, H, M, K, V]``; dead slots hold zeros.
        decay: float32 (float64 in float64) ``[B, H, M]``, natural log.
        open_k: ``[B, G, C, K]``, open_v: ``[B, H, C, V]``, open_g: ``[B, H, C]`` or ``[B, H, C, K]`` (log decay), open_beta:
            ``[B, H, C]`` or None (no delta rule); token i of the open chunk is live when ``i < position % C``, others hold
            zeros.
        chunk_size: C, a power of two.
    """

    position: Tensor
    entries: Tensor
    decay: Tensor
    open_k: Tensor
    open_v: Tensor
    open_g: Tensor
    open_beta: Tensor | None = None
    chunk_size: int = CHUNK_SIZE

    @property
    def transition(self) -> Transition:
        """The transition of the op that the state is of."""
        return transition_of(self.open_beta is not None, is_per_channel(self.open_g))


@dataclass
class LinearState(TensorState):
    """State of the plain linear model after ``position`` tokens (int64 ``[B]``): one matrix ``state [B, H, K, V]``."""

    position: Tensor
    state: Tensor
