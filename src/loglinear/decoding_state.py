"""DECODING STATE: the past of a sequence for decoding, in buffers of fixed size that every step updates in place.

The programs of one launch share some buffers, and these exist twice: one half for even chunks, one half for odd chunks. A step
reads one half. When the chunk closes, the step writes the other half, so no program overwrites a value that another program
may still read. A call of at most C tokens closes at most one chunk. The state keeps raw gates, and a step sums them over the
range that it needs: nothing cancels after a reset, and -inf needs no clamp.

Legend: B rows, M slots, H value heads, G q/k groups, K, V widths, C chunk size.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loglinear.state import (
    CHUNK_SIZE,
    FLOATS,
    LogLinearState,
    SlotState,
    check_chunk_size,
    check_dtype,
    check_index,
    has_values,
    joined,
    one_of,
)
from loglinear.transition import Transition, is_per_channel, transition_of

ENTRY_DTYPES = (torch.float32, torch.bfloat16)  # float64 where all is


@dataclass
class DecodingState(SlotState):
    """State of log-linear attention after ``position`` tokens, for ``log_linear_attention_step`` and its delta rule.

    The layout is that of ``LogLinearState``; an axis of length 2C holds two of its C. The class is a second one because steps
    write in place, which no gradient survives, and keep what the delta rule makes of β.

    With n = position // C the number of the open chunk, its tokens stand at places ``(n % 2) * C + i`` of the axes of
    length 2C, live when ``i < position % C``. Slot m holds the bucket of ``2**m`` closed chunks and is live exactly when bit m
    of n is set. A step never reads an entry that is not live.

    Attributes:
        position: int64 or int32 ``[B]``, tokens seen by each row. Layers that advance together may share one tensor.
        entries: ``[B, H, M, K, V]``, float32 or bfloat16 (float64 for float64 inputs).
        decay: float32 ``[B, 2, H, M]``, natural log of the decay from the end of an entry to the end of the last closed
            chunk, at index n % 2 of axis 1; None where entries are carried along themselves: with the delta rule, and with a
            gate per channel.
        open_k: ``[B, G, 2C, K]``, open_v: ``[B, H, C, V]`` (no program shares its columns), dtype of the inputs.
        open_g: float32 ``[B, H, 2C]``, or ``[B, H, 2C, K]`` of a gate per channel, log decays.
        open_solve: float32 ``[B, H, 2C, C]``, delta rule only: rows of ``T = (I + diag(β) Z)⁻¹ diag(β)``
            (docs/algorithm.md, section 7). β is its diagonal.
        chunk_size: C, a power of two.
    """

    position: Tensor
    entries: Tensor
    decay: Tensor | None
    open_k: Tensor
    open_v: Tensor
    open_g: Tensor
    open_solve: Tensor | None = None
    chunk_size: int = CHUNK_SIZE

    _wide = frozenset({"position", "decay", "open_g", "open_solve"})

    @staticmethod
    def empty(
        batch: int,
        heads: int,
        groups: int,
        key_width: int,
        value_width: int,
        max_context: int,
        dtype: torch.dtype,
        entry_dtype: torch.dtype = torch.float32,
        delta_rule: bool = False,
        device: torch.device | str | None = None,
        chunk_size: int = CHUNK_SIZE,
        per_channel: bool = False,
    ) -> DecodingState:
        """The state before the first token.

        Args:
            max_context: tokens that a row must be able to hold, at least 1.
            dtype: dtype of q, k and v: float64, float32, bfloat16 or float16. With float64 everything is float64.
            entry_dtype: of ``entries``: float32, or bfloat16 for half the memory and an error as of rounding the inputs.
                Others have too few bits for sums of many tokens, or too small a range.
            delta_rule: whether it is for ``log_linear_delta_rule_step``.
            per_channel: whether g has a value for each key channel.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        if heads < 1 or groups < 1 or heads % groups:
            raise ValueError(f"heads must be a multiple of groups: got heads={heads}, groups={groups}")
        check_chunk_size("chunk_size", chunk_size)
        check_dtype("dtype", dtype, FLOATS)
        double = dtype == torch.float64
        check_dtype("entry_dtype", entry_dtype, (*ENTRY_DTYPES, torch.float64) if double else ENTRY_DTYPES)
        slots = slots_for(max_context, chunk_size)
        tensors: dict[str, Any] = {"decay": None, "open_solve": None}
        transition = transition_of(delta_rule, per_channel)
        kinds = tensor_kinds(batch, heads, groups, key_width, value_width, slots, chunk_size, dtype, transition)
        for name, (shape, dtypes) in kinds.items():
            kind = entry_dtype if name == "entries" and not double else dtypes[0]
            tensors[name] = torch.zeros(shape, dtype=kind, device=device)
        return DecodingState(**tensors, chunk_size=chunk_size)

    @staticmethod
    def from_state(
        state: LogLinearState,
        max_context: int,
        entry_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype | None = None,
    ) -> DecodingState:
        """The state that goes on from the final state of an ordinary call (prefill). Waits for the device once.

        Args:
            dtype: dtype of the q, k and v to come; None is that of ``state.open_k``, which for 16-bit inputs is float32.
        """
        if not isinstance(state, LogLinearState):
            raise TypeError(f"state must be a LogLinearState: got {type(state).__name__}")
        _check_room(state, max_context)
        batch, heads, _, key_width, value_width = state.entries.shape
        transition = state.transition
        made = DecodingState.empty(
            batch, heads, state.open_k.shape[1], key_width, value_width, max_context, dtype or state.open_k.dtype,
            entry_dtype, "beta" in transition.gates, state.device, state.chunk_size, transition.per_channel,
        )  # fmt: skip
        return made._write(state)

    def take_(self, state: LogLinearState, rows: Tensor | None = None) -> DecodingState:
        """Become the past of ``state``, of the same sizes, in place; waits for the device once. Everything is written once.

        rows: int64 ``[n]``, the row to write for each row of ``state``, where that has n; the others stay. None: all in order.
        """
        _check_room(state, self.max_context)
        return self._write(state, rows)

    @torch.no_grad()
    def _write(self, state: LogLinearState, rows: Tensor | None = None) -> DecodingState:
        def put(own: Tensor, new: Tensor) -> None:
            new = new.expand(-1, *own.shape[1:])
            if rows is None:
                own.copy_(new)
            else:
                own.index_copy_(0, rows, new.to(own.dtype))

        used = min(state.entries.shape[2], self.entries.shape[2])  # further ones are dead
        entries, log = state.entries[:, :, :used], state.decay[:, :, :used]
        if self.decay is not None:
            put(self.entries[:, :, :used], entries)
            put(self.decay[..., :used], log.unsqueeze(1))
        else:
            decayed = log.exp()[..., None, None].to(entries.dtype)
            if rows is None:
                torch.mul(entries, decayed, out=self.entries[:, :, :used])
            else:
                put(self.entries[:, :, :used], entries * decayed)
        put(self.position, state.position)
        put(self.open_v, state.open_v)
        solve = None if state.open_beta is None else _solve(state.open_k, state.open_g, state.open_beta)
        for buffer, opened in ((self.open_k, state.open_k), (self.open_g, state.open_g), (self.open_solve, solve)):
            if buffer is not None and opened is not None:  # both halves: what is not live is never read
                put(buffer.unflatten(2, (2, -1)), opened.unsqueeze(2))
        return self

    def as_state(self) -> LogLinearState:
        """The same past as the initial state of one call. Entries and values are views of the buffers, and dead parts of all
        tensors hold any numbers, which no call reads.
        """
        odd = self.position // self.chunk_size % 2 == 1

        def half(x: Tensor, axis: int = 2) -> Tensor:
            x = x if axis == 1 else x.unflatten(2, (2, -1))
            return torch.where(odd.view(-1, *(1,) * (x.dim() - 2)), x.select(axis, 1), x.select(axis, 0))

        logs = self.open_g.dtype
        beta = None
        if self.open_solve is not None:
            beta = half(self.open_solve.unflatten(2, (2, -1)).diagonal(dim1=-2, dim2=-1).flatten(2))
        return LogLinearState(
            self.position.long(),
            self.entries,
            self.entries.new_zeros(self.entries.shape[:3], dtype=logs) if self.decay is None else half(self.decay, 1),
            half(self.open_k),
            self.open_v,
            half(self.open_g),
            beta,
            self.chunk_size,
        )

    def to_state(self) -> LogLinearState:
        """The same past as the initial state of an ordinary call; everything copied."""
        state, wide = self.as_state(), self.open_g.dtype
        slots, places = (torch.arange(n, device=self.device) for n in (self.entries.shape[2], self.chunk_size))
        alive = (self.position // self.chunk_size)[:, None] >> slots & 1 == 1  # [B, M]
        live = places < (self.position % self.chunk_size)[:, None]  # [B, C]

        def kept(name: str, x: Tensor) -> Tensor:
            if name == "position":
                return x.clone()
            where = alive if name in ("entries", "decay") else live
            return torch.where(where.view(len(x), 1, -1, *(1,) * (x.dim() - 3)), x, 0).to(wide)

        copied: dict[str, Any] = {name: kept(name, x) for name, x in state._named()}
        return dataclasses.replace(state, **copied)

    @property
    def transition(self) -> Transition:
        """The transition of the op that the state is for."""
        return transition_of(self.open_solve is not None, is_per_channel(self.open_g))

    @property
    def max_context(self) -> int:
        """The largest position that the slots can hold."""
        return (self.chunk_size << self.entries.shape[2]) - 1

    def grow(self, max_context: int) -> DecodingState:
        """A state with slots for ``max_context`` tokens, at least as many as now, in new buffers (so not inside a graph)."""
        return self.clone().with_slots(slots_for(max_context, self.chunk_size))

    def copy_rows_(self, index: Tensor, other: DecodingState, other_index: Tensor) -> DecodingState:
        """Row ``index[i]`` of this state becomes row ``other_index[i]`` of another, in place (int64 ``[n]`` both)."""
        check_index("index", index)
        check_index("other_index", other_index)
        if index.shape != other_index.shape:
            raise ValueError(f"other_index must have as many rows as index ({len(index)}): got {len(other_index)}")
        for own, new in self._pairs(other, "other", rows=False):
            own.index_copy_(0, index.to(own.device), new.index_select(0, other_index.to(new.device)).to(own))
        return self

    def restore_(self, snapshot: DecodingState) -> DecodingState:
        """Return to a ``clone`` of this state, in place: the addresses that a CUDA graph knows stay as they are."""
        for own, old in self._pairs(snapshot, "snapshot", rows=True):
            own.copy_(old)
        return self

    def _pairs(self, other: DecodingState, name: str, rows: bool) -> list[tuple[Tensor, Tensor]]:
        """The tensors of two states side by side, after a check that all but their rows agree (or these too)."""
        if not isinstance(other, DecodingState):
            raise TypeError(f"{name} must be a DecodingState: got {type(other).__name__}")
        first = 0 if rows else 1
        mine, theirs = ([(n, tuple(x.shape[first:])) for n, x in state._named()] for state in (self, other))
        if mine != theirs or self.chunk_size != other.chunk_size:
            raise ValueError(
                f"{name} must have the sizes of this state (grow gives it more slots), {dict(mine)}: got {dict(theirs)}"
            )
        return list(zip(self._tensors(), other._tensors()))

    @staticmethod
    def stack(states: Sequence[DecodingState]) -> DecodingState:
        """The rows of several states as one, with the slots of the largest; everything copied."""
        if not states:
            raise ValueError("states must hold at least one state: got none")
        most = max(state.entries.shape[2] for state in states)
        states = [state.with_slots(most) for state in states]
        for i, state in enumerate(states):
            states[0]._pairs(state, f"states[{i}]", rows=False)
        return joined(states) if len(states) > 1 else states[0].clone()

    def split(self) -> list[DecodingState]:
        """One state for each row; everything copied."""
        return [self.reorder(torch.tensor([row])) for row in range(self.batch_size)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all tensors and the chunk size to a file. ``load`` reads it without running what it may contain."""
        torch.save({"chunk_size": self.chunk_size, **dict(self._named())}, path)

    @staticmethod
    def load(path: str | os.PathLike[str], device: torch.device | str | None = None) -> DecodingState:
        """The state in a file that ``save`` wrote, on ``device`` (None: where it was).

        Raises:
            ValueError, TypeError: the file is damaged, or holds something else; the message names it.
        """
        name = os.fspath(path)
        with open(path, "rb") as file:
            try:
                content = torch.load(file, map_location=device, weights_only=True)
            except Exception as error:  # foreign bytes: pickle, zip and torch have errors of their own
                raise ValueError(
                    f"path must be a file that DecodingState.save wrote: got {name}, not readable"
                ) from error
        if not _is_saved_state(content):
            raise ValueError(f"path must be a file that DecodingState.save wrote: got {name}, of other content")
        check_chunk_size(f"{name}: chunk_size", content["chunk_size"])
        state = DecodingState(**{"decay": None, "open_solve": None, **content})
        batch, heads, slots, key_width, value_width = state.entries.shape
        kinds = tensor_kinds(
            batch, heads, state.open_k.shape[1], key_width, value_width, slots, state.chunk_size, state.open_k.dtype,
            state.transition,
        )  # fmt: skip
        state.check(name, kinds)
        if batch and not 0 <= int(state.position.min()) <= int(state.position.max()) <= state.max_context:
            raise ValueError(
                f"{name}: position must be in [0, {state.max_context}] (max_context): got {state.position.tolist()}"
            )
        return state

    def check(self, name: str, kinds: Kinds, device: torch.device | None = None, pages: bool = False) -> None:
        """Raise unless every tensor, called ``name.field``, is of its kind, contiguous and on ``device`` (None: on one).

        pages: whether it is enough that each row is contiguous.
        """
        device = self.device if device is None else device
        inputs = f" for inputs of {one_of(kinds['open_k'][1])}"
        for field, tensor in self._named():
            if field not in kinds:
                raise ValueError(f"{name}.{field} must be None for the {self.transition.name}: got a tensor")
            shape, dtypes = kinds[field]
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}.{field} must have shape {list(shape)}: got {list(tensor.shape)}")
            check_dtype(f"{name}.{field}", tensor.dtype, dtypes, inputs)
            if tensor.device != device:
                raise ValueError(f"{name}.{field} must be on {device}: got {tensor.device}")
            if not (tensor[:1].squeeze(0) if pages else tensor).is_contiguous():
                raise ValueError(f"{name}.{field} must be contiguous: got strides {list(tensor.stride())}")


def _check_room(state: LogLinearState, max_context: int) -> None:
    seen = int(state.position.max()) if state.batch_size and has_values(state.position) else 0
    if seen > max_context:
        raise ValueError(f"max_context must be at least the state's position, {seen}: got {max_context}")


Kinds = Mapping[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]


def tensor_kinds(
    batch: int,
    heads: int,
    groups: int,
    key_width: int,
    value_width: int,
    slots: int,
    chunk_size: int,
    dtype: torch.dtype,
    transition: Transition,
) -> Kinds:
    """Shape, and dtypes to choose from, of each tensor of a state for inputs of ``dtype``."""
    wide = (torch.float64 if dtype == torch.float64 else torch.float32,)
    per_channel = (key_width,) if transition.per_channel else ()
    kinds: Kinds = {
        "position": ((batch,), (torch.int64, torch.int32)),
        "entries": ((batch, heads, slots, key_width, value_width), wide if dtype == torch.float64 else ENTRY_DTYPES),
        "decay": ((batch, 2, heads, slots), wide),
        "open_k": ((batch, groups, 2 * chunk_size, key_width), (dtype,)),
        "open_v": ((batch, heads, chunk_size, value_width), (dtype,)),
        "open_g": ((batch, heads, 2 * chunk_size, *per_channel), wide),
        "open_solve": ((batch, heads, 2 * chunk_size, chunk_size), wide),
    }
    lacking = {"decay": not transition.by_log, "open_solve": "beta" not in transition.gates}
    return {name: kind for name, kind in kinds.items() if not lacking.get(name)}


def _is_saved_state(content: Any) -> bool:
    """Whether a file's content is what ``save`` wrote, by its names and the axes of its largest tensors."""
    names = {field.name for field in dataclasses.fields(DecodingState)}
    kinds = [{"decay"}, {"open_solve"}, {"decay", "open_solve"}]
    if not isinstance(content, dict) or set(content) not in [names - kind for kind in kinds]:
        return False
    tensors = all(isinstance(value, Tensor) for name, value in content.items() if name != "chunk_size")
    return tensors and content["entries"].dim() == 5 and content["open_k"].dim() == 4


def slots_for(max_context: int, chunk_size: int) -> int:
    """M: slots for ``max_context // C`` closed chunks, at least one."""
    if not isinstance(max_context, int) or max_context < 1:
        raise ValueError(f"max_context must be an int of at least 1: got {max_context!r}")
    return max((max_context // chunk_size).bit_length(), 1)


def _solve(k: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """``(I + diag(β) Z)⁻¹ diag(β)`` ``[B, H, C, C]`` of the open chunk; its rows are those that the steps would add.

    k ``[B, G, C, K]``, g ``[B, H, C]`` or ``[B, H, C, K]``, beta ``[B, H, C]``. Places without a token have β = 0: their rows
    are zero.
    """
    size, heads = g.shape[2], g.shape[1]
    k = k.repeat_interleave(heads // k.shape[1], 1).to(g.dtype)
    later = torch.ones(size, size, dtype=torch.bool, device=g.device).tril(-1)
    gates = g if is_per_channel(g) else g.unsqueeze(-1)  # [B, H, C, K or 1]
    decay = gates.mT.unsqueeze(-1).masked_fill(~later, 0.0).cumsum(-2).exp()  # [B, H, K or 1, C, C]
    overlap = torch.einsum("bhtk,bhkts,bhsk->bhts", k, decay, k) if is_per_channel(g) else (k @ k.mT) * decay.squeeze(2)
    lower = beta.unsqueeze(-1).to(g.dtype) * overlap.masked_fill(~later, 0.0)
    return torch.linalg.solve_triangular(lower, torch.diag_embed(beta.to(g.dtype)), upper=False, unitriangular=True)
