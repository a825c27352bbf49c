"""JOURNAL: the record that a cache layer keeps, so that the last columns can be taken back.

Log-linear and linear states merge tokens for good. A journal therefore holds copies of the state at earlier columns (marks) and
the inputs of the mixer since. To take columns back, the layer returns to the last mark before the cut and feeds again what
stands between them. There are at most three marks and inputs of ten chunks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from loglinear.layers import MixerState
from loglinear.models.layout import TokenLayout, plan_layout
from loglinear.state import CHUNK_SIZE

REACH = 4 * CHUNK_SIZE  # columns that can always be taken back: more than drafts have
SPACING = 2 * CHUNK_SIZE  # between marks: each is a state's memory, and a shorter way costs less to feed again


@dataclass(frozen=True)
class Columns:
    """Inputs of a mixer: ``hidden [B, T, width]``, and which columns are real (bool ``[B, T]``; None: all)."""

    hidden: Tensor
    real: Tensor | None = None

    @staticmethod
    def of(hidden: Tensor, layout: TokenLayout) -> Columns:
        """The columns that ``layout`` has packed."""
        return Columns(layout.unpack(hidden), None if layout.real is None else layout.real.to(hidden.device))

    @property
    def length(self) -> int:
        """T."""
        return self.hidden.shape[1]

    def part(self, start: int, stop: int | None = None) -> Columns:
        """Columns ``start`` to ``stop``."""
        return Columns(self.hidden[:, start:stop], None if self.real is None else self.real[:, start:stop])

    def reorder(self, index: Tensor) -> Columns:
        """Rows ``index``, in that order."""
        index = index.to(self.hidden.device)
        hidden = self.hidden.index_select(0, index)
        return Columns(hidden, None if self.real is None else self.real.index_select(0, index))

    def layout(self) -> TokenLayout:
        """The layout in which a mixer sees them. Waits for the device if there is padding."""
        batch, length = self.hidden.shape[:2]
        return plan_layout(batch, length, self.real)

    @property
    def nbytes(self) -> int:
        """Bytes kept alive, of which a view may use a part."""
        return sum(x.untyped_storage().nbytes() for x in (self.hidden, self.real) if x is not None)

    @staticmethod
    def join(pieces: list[Columns]) -> Columns:
        """Pieces side by side, in memory of their own."""
        hidden = torch.cat([piece.hidden for piece in pieces], dim=1)
        if all(piece.real is None for piece in pieces):
            return Columns(hidden)
        real = [torch.ones_like(x.hidden[..., 0], dtype=torch.bool) if x.real is None else x.real for x in pieces]
        return Columns(hidden, torch.cat(real, dim=1))


@dataclass(frozen=True)
class Call:
    """How columns were fed: a repetition needs the same mixer, dtype and modes."""

    mixer: weakref.ref[nn.Module]  # a cache keeps no model alive, and copies none
    entry_dtype: torch.dtype
    device_type: str
    grad: bool
    autocast: torch.dtype | None

    @staticmethod
    def now(mixer: nn.Module, hidden: Tensor, entry_dtype: torch.dtype) -> Call:
        """A call of ``mixer`` on ``hidden`` at this moment."""
        kind = hidden.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return Call(weakref.ref(mixer), entry_dtype, kind, torch.is_grad_enabled(), autocast)

    @contextmanager
    def modes(self) -> Iterator[None]:
        """Autocast as it was; gradients if there were any and still are."""
        autocast = torch.autocast(self.device_type, self.autocast, enabled=self.autocast is not None)
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()), autocast:
            yield


@dataclass
class Mark:
    """A copy of the state after ``length`` columns (None: before the first), and the columns up to the next mark."""

    length: int
    state: MixerState | None
    pieces: list[Columns] = field(default_factory=list)


class Journal:
    """The marks of one layer, oldest first, and how its columns were last fed."""

    def __init__(self) -> None:
        self.marks: list[Mark] = []
        self.call: Call | None = None

    def reach(self, length: int) -> int:
        """How many of ``length`` columns can be taken back."""
        return length - self.marks[0].length if self.marks else 0

    def wants_mark(self, length: int) -> bool:
        """Whether the state after ``length`` columns should be kept, now that more are to come."""
        return not self.marks or length - self.marks[-1].length >= SPACING

    def append(self, columns: Columns, length: int) -> None:
        """Keep columns that were fed; ``length`` columns have been fed by now. Records that are too old are dropped."""
        self.marks[-1].pieces.append(columns)
        while len(self.marks) > 1 and self.marks[1].length <= length - REACH:
            self.marks.pop(0)

    def until(self, length: int) -> list[Mark]:
        """The marks of the first ``length`` columns; all between the last of them and there is one piece, or none."""
        *marks, last = (mark for mark in self.marks if mark.length <= length)
        count = length - last.length
        pieces = [Columns.join(last.pieces).part(0, count)] if count else []
        return [*marks, Mark(last.length, last.state, pieces)]

    def reorder(self, index: Tensor) -> None:
        """Rows ``index`` of everything."""
        for mark in self.marks:
            mark.state = None if mark.state is None else mark.state.reorder(index)
            mark.pieces = [piece.reorder(index) for piece in mark.pieces]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        states = sum(mark.state.nbytes for mark in self.marks if mark.state is not None)
        return states + sum(piece.nbytes for mark in self.marks for piece in mark.pieces)
