"""STEP: one token, or a few, against a ``DecodingState``, in place, for all calls that the step kernels do not take.

A step reads live entries only, one level at a time over the rows that have it. It writes an entry only where a chunk closes.
The operations for a row have the same shape whatever its neighbours are. The host reads the positions. Runs in float64 for
float64 inputs, else in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear.decoding_state import DecodingState


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    level_scales: Tensor,
    state: DecodingState,
    beta: Tensor | None = None,
    scale: float = 1.0,
    state_indices: Tensor | None = None,
) -> Tensor:
    """o ``[B, T, H, V]`` of v's dtype for the T tokens after ``state.position``; the state takes them in, but for its position.

    Args:
        q, k: ``[B, T, G, K]``. v: ``[B, T, H, V]``. g, beta: ``[B, T, H]``, beta for the delta rule. level_scales: λ ``[B, T,
            H, L]``. state_indices: int64 ``[B]``, the row of the state for each row of q; None: they are the same.
    """
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    o = torch.empty_like(v)
    positions = (state.position if state_indices is None else state.position[state_indices]).tolist()
    for t in range(v.shape[1] if positions else 0):
        gate = None if g is None else g[:, t].to(wide)
        rate = None if beta is None else beta[:, t].to(wide)
        token = _Token(
            [position + t for position in positions], k[:, t], v[:, t], gate, rate, state, wide, state_indices
        )
        o[:, t] = token.read(q[:, t].to(wide) * scale, level_scales[:, t].to(wide))
        token.close()
    return o


class _Token:
    """One token of every row, written to the open chunks; they are then at hand in ``wide``, zero where there is no token.

    keys ``[B, G, C, K]``, values ``[B, H, C, V]``; ``through`` and ``after`` ``[B, H, C, 1]``, or ``[B, H, C, K]`` of a gate
    per channel: decays from the start of the chunk through each place and from after each place to the token. ``whole``
    ``[B, H, 1 or K]``: of the chunk so far. ``solve [B, H, C, C]`` (delta rule).
    """

    def __init__(
        self,
        positions: list[int],
        k: Tensor,
        v: Tensor,
        gate: Tensor | None,
        beta: Tensor | None,
        state: DecodingState,
        wide: torch.dtype,
        state_indices: Tensor | None,
    ):
        self.state, self.wide, self.device = state, wide, v.device
        size = state.chunk_size
        self.chunks = [position // size for position in positions]
        self.places = [position % size for position in positions]
        self.halves = [chunk % 2 for chunk in self.chunks]
        self.rows = torch.arange(len(positions), device=v.device)
        self.held = self.rows if state_indices is None else state_indices  # rows of the state
        self.whole_state = state_indices is None
        self.place = self._indices(self.places)
        self.live = torch.arange(size, device=v.device) <= self.place[:, None]
        self.keys, self.values = self._append(state.open_k, k), self._append(state.open_v, v, halves=False)
        gates = self._append(state.open_g, 0.0 if gate is None else gate)
        self.per_channel = gates.dim() == 4
        gates = gates if self.per_channel else gates.unsqueeze(-1)
        self.through = gates.cumsum(2).exp()
        self.after = F.pad(gates[:, :, 1:], (0, 0, 0, 1)).flip(2).cumsum(2).flip(2).exp()
        self.log_whole = gates.sum(2)
        self.whole = self.log_whole.exp()
        self.solve = None if state.open_solve is None or beta is None else self._solve(state.open_solve, beta)

    def _indices(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)

    def _append(self, buffer: Tensor, new: Tensor | float, halves: bool = True) -> Tensor:
        """Write the token to its place of ``buffer [B, X, C or 2C, ...]`` and read the open chunk ``[B, X, C, ...]``."""
        size = self.state.chunk_size
        start = [half * size if halves else 0 for half in self.halves]
        at = self.place + self._indices(start)
        buffer[self.held, :, at] = new.to(buffer.dtype) if isinstance(new, Tensor) else new
        opened = buffer.new_zeros(len(start), buffer.shape[1], size, *buffer.shape[3:], dtype=self.wide)
        where = list(zip(start, self.places))
        if self.whole_state and len(set(where)) == 1:  # only what is live is read
            left, place = where[0]
            opened[:, :, : place + 1] = buffer[:, :, left : left + place + 1]
            return opened
        for row, held, left, place in zip(opened, self.held.tolist(), start, self.places):
            row[:, : place + 1] = buffer[held, :, left : left + place + 1]
        return opened

    def _heads(self, products: Tensor) -> Tensor:
        """Per group ``[B, G, H/G or 1, X]`` -> per value head ``[B, H, X]``."""
        heads = self.values.shape[1]
        return products.expand(-1, -1, heads // products.shape[1], -1).reshape(-1, heads, products.shape[-1])

    def _overlaps(self, rows: Tensor) -> Tensor:
        """Products ``[B, H, C]`` of rows ``[B, G, K]`` with the keys, each as it has decayed since its place."""
        if self.per_channel:
            return torch.einsum("bhk,bhck,bhck->bhc", self._heads(rows.unsqueeze(2)), self.after, self._head_keys())
        return self._heads(rows.unsqueeze(2) @ self.keys.mT) * self.after.squeeze(-1)

    def _head_keys(self) -> Tensor:
        """The keys of each value head, ``[B, H, C, K]``."""
        return self.keys.repeat_interleave(self.values.shape[1] // self.keys.shape[1], 1)

    def _solve(self, buffer: Tensor, beta: Tensor) -> Tensor:
        """The triangular inverse with this token's row, ``β (e_i - Σ_{j<i} z_j T_j)``."""
        solve = self._append(buffer, 0.0)
        key = self.keys[self.rows, :, self.place]
        overlap = self._overlaps(key)
        own = F.one_hot(self.place, self.state.chunk_size).unsqueeze(1).to(self.wide)
        row = beta.unsqueeze(-1) * (own - (overlap.unsqueeze(2) @ solve).squeeze(2))
        solve[self.rows, :, self.place] = row
        half = self._indices([half * self.state.chunk_size for half in self.halves])
        buffer[self.held, :, self.place + half] = row.to(buffer.dtype)
        return solve

    def read(self, q: Tensor, scales: Tensor) -> Tensor:
        """o ``[B, H, V]`` for q ``[B, G, K]`` and λ ``[B, H, L]``."""
        heads, size = self.values.shape[1:3]
        levels = scales.shape[-1]
        distance = torch.arange(size, device=self.device) ^ self.place[:, None]
        level = torch.frexp(distance.float()).exponent.long().clamp(max=levels - 1)  # bit length, exact below 2^24
        mask = scales.gather(-1, level.unsqueeze(1).expand(-1, heads, -1)).masked_fill(~self.live.unsqueeze(1), 0)
        scores, query = self._overlaps(q), self._heads(q.unsqueeze(2))
        if self.state.decay is None:
            query = self.whole * query
        if self.solve is not None:
            scores = (scores.unsqueeze(2) @ self.solve).squeeze(2)
            query = query - self._summed(scores)
        out = ((mask * scores).unsqueeze(2) @ self.values).squeeze(2)
        for m in range(max(self.chunks).bit_length()):
            rows, entry = self._slot(m, [b for b, chunk in enumerate(self.chunks) if chunk >> m & 1])
            if not len(rows):
                continue
            weight = scales[rows, :, min(size.bit_length() + m, levels - 1)]
            if self.state.decay is not None:
                weight = weight * (self.log_whole[rows, :, 0] + self._decay(rows, m)).exp()
            out.index_add_(0, rows, weight.unsqueeze(-1) * (query[rows].unsqueeze(2) @ entry).squeeze(2))
        return out

    def _summed(self, scores: Tensor) -> Tensor:
        """``Σ_s scores_s through_s k_s`` ``[B, H, K]`` for scores ``[B, H, C]``."""
        if self.per_channel:
            return torch.einsum("bhc,bhck,bhck->bhk", scores, self.through, self._head_keys())
        weighted = (scores * self.through.squeeze(-1)).unflatten(1, (self.keys.shape[1], -1))
        return (weighted @ self.keys).flatten(1, 2)

    def _slot(self, m: int, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Rows as indices, and what they hold in slot m ``[rows, H, K, V]``."""
        entries, index = self.state.entries[:, :, m], self._indices(rows)
        every = self.whole_state and len(rows) == len(entries)
        return index, (entries if every else entries.index_select(0, self.held[index])).to(self.wide)

    def _decay(self, rows: Tensor, m: int) -> Tensor:
        """Log decay ``[rows, H]`` of slot m up to the end of the last closed chunk."""
        assert self.state.decay is not None
        return self.state.decay[self.held[rows], self._indices(self.halves)[rows], :, m]

    def close(self) -> None:
        """Turn chunks that are full into entries, merge those with the entries of their size, and age all others."""
        state, size = self.state, self.state.chunk_size
        closing = [b for b, place in enumerate(self.places) if place == size - 1]
        if not closing:
            return
        ones = {
            b: ((self.chunks[b] + 1) & ~self.chunks[b]).bit_length() - 1 for b in closing
        }  # trailing ones: slots to merge
        index = self._indices(closing)
        merged = state.entries.new_zeros(
            len(closing), *state.entries.shape[1:2], *state.entries.shape[3:], dtype=self.wide
        )
        if state.decay is not None:
            state.decay[self.held[index], 1 - self._indices(self.halves)[index]] = 0.0
        for m in range(max(self.chunks[b] for b in closing).bit_length()):
            rows, entry = self._slot(m, [b for b in closing if m < ones[b]])
            if len(rows):
                merged[[i for i, b in enumerate(closing) if m < ones[b]]] += self._aged(rows, entry, m)
            rows, entry = self._slot(m, [b for b in closing if m > ones[b] and self.chunks[b] >> m & 1])
            if not len(rows):
                continue
            if state.decay is None:
                state.entries[:, :, m].index_copy_(
                    0, self.held[rows], self._carried(rows, entry, None).to(state.entries.dtype)
                )
            else:
                other = 1 - self._indices(self.halves)[rows]
                state.decay[self.held[rows], other, :, m] = self.log_whole[rows, :, 0] + self._decay(rows, m)
        written = self.values[index] if self.solve is None else self.solve[index] @ self.values[index]
        if state.decay is None:
            made = self._carried(index, merged, written)
        else:
            made = merged + self._ends(index, written)
        slots = self._indices([ones[b] for b in closing])
        state.entries[self.held[index], :, slots] = made.to(state.entries.dtype)

    def _aged(self, rows: Tensor, entry: Tensor, m: int) -> Tensor:
        """An entry that merges, seen from the end of the chunk; the delta rule carries the sum of all of them later."""
        if self.state.decay is None:
            return entry
        return (self.log_whole[rows, :, 0] + self._decay(rows, m)).exp()[..., None, None] * entry

    def _ends(self, rows: Tensor, values: Tensor) -> Tensor:
        """``Σ_s after_s k_s values_sᵀ`` ``[rows, H, K, V]``: writes, as the end of the chunk sees them."""
        if self.per_channel:
            return (self._head_keys()[rows] * self.after[rows]).mT @ values
        by_group = (self.after[rows] * values).unflatten(1, (self.keys.shape[1], -1))
        return (self.keys[rows].mT.unsqueeze(2) @ by_group).flatten(1, 2)

    def _known(self, rows: Tensor, entry: Tensor) -> Tensor:
        """``through_s k_sᵀ entry`` ``[rows, H, C, V]``: what each place finds of an entry from before the chunk."""
        if self.per_channel:
            return (self._head_keys()[rows] * self.through[rows]) @ entry
        keys = self.keys[rows].unsqueeze(2)
        return self.through[rows] * (keys @ entry.unflatten(1, (keys.shape[1], -1))).flatten(1, 2)

    def _carried(self, rows: Tensor, entry: Tensor, written: Tensor | None) -> Tensor:
        """An entry from before the chunk as its end sees it, with what the chunk has ``written`` (None: nothing) for rows."""
        if self.solve is not None:
            erased = self.solve[rows] @ self._known(rows, entry)
            written = -erased if written is None else written - erased
        carried = self.whole[rows].unsqueeze(-1) * entry
        return carried if written is None else carried + self._ends(rows, written)
