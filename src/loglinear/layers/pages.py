"""PAGES: the state of one mixer for many requests, a page of bytes for each, of which the engine is the owner.

A page holds one row of the mixer's state for decoding (``RecurrentMixerState``): the tail of the convolution, the position and
the memory. ``PageLayout.view`` shows all pages as one such state, whose row is the page. A step reads and writes the rows of
its requests where they lie. A longer call (prefill) reads the rows of its requests and writes each of them once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from loglinear.decoding_state import DecodingState
from loglinear.layers.state import RecurrentMixerState
from loglinear.state import LinearState, LogLinearState

Mixer = Callable[..., Any]  # a mixer, or the method of one that is called as mixers are
ALIGNMENT = 256  # bytes: tensors of a page begin where memory does, so no row of an entry has a part of another line


@dataclass(frozen=True)
class Field:
    """One tensor of a page: its name in the state, its shape and dtype, and the byte at which it starts."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PageLayout:
    """Where the tensors of a mixer's state lie in a page.

    Attributes:
        fields: the tensors, in the order of ``RecurrentMixerState``.
        nbytes: size of a page, a multiple of ``ALIGNMENT``. chunk_size: of a ``DecodingState``; None for a linear mixer.
    """

    fields: tuple[Field, ...]
    nbytes: int
    chunk_size: int | None

    @staticmethod
    def of(
        mixer: Mixer, hidden_size: int, dtype: torch.dtype, max_context: int, entry_dtype: torch.dtype
    ) -> PageLayout:
        """The layout for a mixer on the meta device.

        Args:
            dtype: of the activations. max_context: tokens that a request may have. entry_dtype: of log-linear entries.
        """
        with torch.no_grad():
            _, after = mixer(torch.empty(1, 1, hidden_size, dtype=dtype, device="meta"), output_state=True)
        return PageLayout.of_state(after.for_decoding(max_context, entry_dtype, dtype))

    @staticmethod
    def of_state(state: RecurrentMixerState) -> PageLayout:
        """The layout for rows of ``state``, which is one for decoding."""
        fields, start = [], 0
        for name, x in {"conv": state.conv, **dict(state.memory._named())}.items():
            dtype = torch.int32 if name == "position" else x.dtype
            fields.append(Field(name, tuple(x.shape[1:]), dtype, start))
            start += -(-fields[-1].nbytes // ALIGNMENT) * ALIGNMENT
        return PageLayout(tuple(fields), start, getattr(state.memory, "chunk_size", None))

    def view(self, pages: Tensor) -> RecurrentMixerState:
        """The state whose rows are pages int8 ``[P, nbytes or more]``. Nothing is copied."""
        tensors: Mapping[str, Any] = {
            field.name: pages[:, field.start : field.start + field.nbytes]
            .view(field.dtype)
            .unflatten(1, field.shape or (1,))
            .view(len(pages), *field.shape)
            if field.nbytes
            else pages.new_empty(len(pages), *field.shape, dtype=field.dtype)
            for field in self.fields
        }
        memory = {name: x for name, x in tensors.items() if name != "conv"}
        if self.chunk_size is None:
            return RecurrentMixerState(tensors["conv"], LinearState(**memory), in_place=True)
        return RecurrentMixerState(
            tensors["conv"], DecodingState(**{"decay": None, **memory}, chunk_size=self.chunk_size)
        )


@dataclass(frozen=True)
class Batch:
    """The requests of one call of the engine.

    Attributes:
        steps: int64 ``[n]``, pages of the requests with one token each, which come first.
        pages: int64 ``[m]``, pages of the others. fresh: bool ``[m]``, which of them start with this call.
        cu_seqlens: ``[m + 1]``, offsets of the others' tokens, behind the first n; ``cu_seqlens_cpu`` is its copy on the CPU.
    """

    steps: Tensor
    pages: Tensor
    fresh: Tensor
    cu_seqlens: Tensor
    cu_seqlens_cpu: Tensor

    @cached_property
    def all_fresh(self) -> bool:
        """Whether no request with several tokens has a past. Waits for the device, once for all layers."""
        return bool(self.fresh.all())


@torch.no_grad()
def mix(mixer: Mixer, hidden: Tensor, state: RecurrentMixerState, batch: Batch) -> Tensor:
    """Outputs of ``mixer`` for hidden ``[N, hidden_size]``, the tokens of ``batch``; ``state``, a ``view``, takes them in."""
    count, parts = len(batch.steps), []
    if count:
        stepped, _ = mixer(hidden[:count].unsqueeze(1), state=replace(state, rows=batch.steps))
        parts.append(stepped.squeeze(1))
    if len(batch.pages):
        packing = {"cu_seqlens": batch.cu_seqlens, "cu_seqlens_cpu": batch.cu_seqlens_cpu}
        mixed, after = mixer(hidden[count:].unsqueeze(0), state=_past(state, batch), output_state=True, **packing)
        parts.append(mixed.squeeze(0))
        _write(state, batch.pages, after)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _past(state: RecurrentMixerState, batch: Batch) -> RecurrentMixerState | None:
    """An ordinary state, the past of the requests with several tokens; None if all of them are fresh."""
    if batch.all_fresh:
        return None
    rows = state.reorder(batch.pages)
    conv, position = rows.conv.masked_fill(_like(batch.fresh, rows.conv), 0), rows.position.masked_fill(batch.fresh, 0)
    memory = rows.memory
    if isinstance(memory, DecodingState):
        return RecurrentMixerState(conv, replace(memory, position=position).as_state())
    assert isinstance(memory, LinearState)
    return RecurrentMixerState(
        conv, LinearState(position.long(), memory.state.masked_fill(_like(batch.fresh, memory.state), 0))
    )


def _like(rows: Tensor, x: Tensor) -> Tensor:
    """rows ``[B]`` with as many axes as x ``[B, ...]``."""
    return rows.view(-1, *(1,) * (x.dim() - 1))


def _write(state: RecurrentMixerState, rows: Tensor, after: RecurrentMixerState) -> None:
    """Row ``rows[i]`` of ``state`` becomes row i of ``after``, an ordinary state."""
    memory, new = state.memory, after.memory
    if isinstance(memory, DecodingState):
        assert isinstance(new, LogLinearState)
        memory.take_(new, rows)
        pairs = [(state.conv, after.conv)]
    else:
        pairs = list(zip(state._tensors(), after._tensors(), strict=True))
    for own, other in pairs:
        if own[0].numel():
            own.index_copy_(0, rows, other.to(own.dtype))
