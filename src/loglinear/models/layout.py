"""TokenLayout: which columns of a batch are real tokens, and where sequences start.

Padding never reaches a mixer. Log-linear attention is not shift-invariant, so a padded row is not its unpadded self: the
model drops the padding, runs the real tokens packed, and puts them back. Left padding, right padding and holes are then all
the same as no padding, and packed documents come for free.

Where no value may be read (``torch.compile``, ``torch.export``, meta and fake tensors) no token can be dropped: padding moves
to the end of its row, behind everything that could see it, or becomes a document of its own behind all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loglinear.layers import MixerState
from loglinear.ops.checks import values_are_known


@dataclass(frozen=True)
class TokenLayout:
    """The way from ``[B, T]`` columns to the mixers: ``[B, T]`` itself, or n sequences packed in a batch of one.

    Attributes:
        batch, length: B and T.
        index: int64, the columns that the mixers see, in their order, among the B·T; None when they see all in order.
        cu_seqlens: integer ``[n + 1]`` on the device and ``cu_seqlens_cpu`` on the CPU; None when rows run as they are.
        real: bool ``[B, T]``, the columns that are tokens; None when all are.
        documents: whether sequences are not rows (several in a row), so that a state would not belong to a row.
    """

    batch: int
    length: int
    index: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None
    real: Tensor | None = None
    documents: bool = False

    def pack(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` in the form that the mixers see."""
        if self.index is None and self.cu_seqlens is None:
            return x
        flat = x.flatten(0, 1)
        flat = flat if self.index is None else flat[self.index]
        return flat.unflatten(0, (self.batch, self.length)) if self.cu_seqlens is None else flat.unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of ``pack``; zeros where there was padding."""
        if self.index is None and self.cu_seqlens is None:
            return x
        flat = x.flatten(0, 1)
        if self.index is not None:
            index = self.index.to(flat.device)  # the last layer may be on another device than the first
            flat = flat.new_zeros(self.batch * self.length, flat.shape[-1]).index_put((index,), flat)
        x = flat.unflatten(0, (self.batch, self.length))
        if self.real is None or (self.index is not None and self.index.shape[0] < self.batch * self.length):
            return x
        return torch.where(self.real.to(x.device).unsqueeze(-1), x, 0)

    def run(
        self, mixer: nn.Module, hidden: Tensor, state: MixerState | None = None, output_state: bool = False
    ) -> tuple[Tensor, MixerState | None]:
        """``mixer`` on hidden as ``pack`` leaves it: outputs in the same form, and the state after these columns."""
        # Layers may lie on different devices (device_map="auto").
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.to(hidden.device)
        packing = {"cu_seqlens": cu_seqlens, "cu_seqlens_cpu": self.cu_seqlens_cpu}
        call = getattr(mixer, "mix", mixer)  # the forward of a lifted mixer is that of the model around it
        return call(hidden, state=state, output_state=output_state, **packing)

    def unpredicted(self) -> Tensor | None:
        """bool ``[B, T]``: tokens behind padding, or behind another document. The column before knows nothing of them.

        The result is None where all columns are one sequence in each row.
        """
        found = None
        if self.real is not None:
            found = self.real & ~F.pad(self.real[:, :-1], (1, 0))
        if self.documents and self.cu_seqlens is not None:
            count = self.batch * self.length if self.index is None else self.index.shape[0]
            flags = torch.zeros(count + 1, dtype=torch.bool, device=self.cu_seqlens.device)
            starts = flags.index_put((self.cu_seqlens.long(),), flags.new_ones(()))[:count]
            if self.index is not None:
                starts = flags.new_zeros(self.batch * self.length).index_put((self.index,), starts)
            starts = starts.unflatten(0, (self.batch, self.length))
            found = starts if found is None else found | starts
        return found


def plan_layout(
    batch: int,
    length: int,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    past_length: int = 0,
) -> TokenLayout:
    """Read the layout from the arguments of callers.

    Args:
        batch, length: B and T of the new columns.
        attention_mask: ``[B, past_length + T]`` or ``[B, T]``, 1 for tokens and 0 for padding.
        position_ids: ``[B, T]`` or ``[1, T]``; used only to find documents. A token continues the one before it when its
            position is one higher, or higher by the columns between them (a hole in the mask). Otherwise a document starts.
        cu_seqlens: integer ``[n + 1]``, offsets of documents packed in a batch of one.
        seq_idx: integer ``[B, T]`` or ``[1, T]``, the number of each token's document: one starts where the number changes.
        past_length: columns that the cache has seen.

    Raises:
        ValueError: shapes, offsets or masks that do not fit, or more than one description of the documents.
    """
    _check_documents(batch, length, attention_mask, position_ids, cu_seqlens, seq_idx)
    if cu_seqlens is not None:
        return _packed(length, cu_seqlens, position_ids, seq_idx)
    if attention_mask is not None:
        _check_mask_shape(attention_mask, batch, length, past_length)
    given = [x for x in (attention_mask, position_ids, seq_idx) if x is not None]
    if not all(values_are_known(x) for x in given):
        return _plan_unseen(batch, length, attention_mask, position_ids, seq_idx)
    real = None if attention_mask is None else _real_columns(attention_mask, length)
    if real is None and ((position_ids is None and seq_idx is None) or length <= 1):
        return TokenLayout(batch, length)

    index = None if real is None else real.flatten().nonzero().squeeze(1)
    if position_ids is not None or seq_idx is not None:
        columns = torch.arange(batch * length, device=given[-1].device) if index is None else index
        starts = _starts(columns, batch, length, position_ids, seq_idx)
        if bool((starts[1:] & (columns // length).diff().eq(0)).any()):
            cu_seqlens = F.pad(starts.nonzero().squeeze(1), (0, 1), value=len(columns))
            return TokenLayout(batch, length, index, cu_seqlens, cu_seqlens.cpu(), real, documents=True)
    if real is None:
        return TokenLayout(batch, length)
    cu_seqlens = F.pad(real.sum(1).cumsum(0), (1, 0))  # one sequence per row, empty where a row is all padding
    return TokenLayout(batch, length, index, cu_seqlens, cu_seqlens.cpu(), real)


def _plan_unseen(
    batch: int, length: int, attention_mask: Tensor | None, position_ids: Tensor | None, seq_idx: Tensor | None
) -> TokenLayout:
    """The layout by operations whose shapes depend on no value."""
    real = None if attention_mask is None else attention_mask[:, attention_mask.shape[1] - length :].bool()
    if position_ids is None and seq_idx is None:
        assert real is not None
        order = torch.argsort(~real, dim=1, stable=True)  # tokens first, padding behind them
        order = order + length * torch.arange(batch, device=order.device).unsqueeze(1)
        return TokenLayout(batch, length, order.flatten(), real=real)
    described: Tensor = position_ids if position_ids is not None else seq_idx  # type: ignore[assignment]
    count = batch * length
    tokens = torch.arange(count, device=described.device)
    padding = tokens < 0 if real is None else ~real.flatten()
    index = None if real is None else torch.argsort(padding, stable=True)
    columns = tokens if index is None else index
    behind = padding[columns]
    starts = _starts(columns, batch, length, position_ids, seq_idx)
    starts = torch.where(behind, F.pad(behind[1:] & ~behind[:-1], (1, 0)), starts)  # all padding is one document
    document = (starts | (tokens == 0)).long().cumsum(0) - 1
    offsets = torch.full(
        (count + 1,), count, device=described.device
    )  # sequences that do not exist are empty, at the end
    offsets = offsets.scatter_reduce(0, document, tokens, "amin")
    return TokenLayout(batch, length, index, offsets, None, real, documents=True)


def _packed(length: int, cu_seqlens: Tensor, position_ids: Tensor | None, seq_idx: Tensor | None) -> TokenLayout:
    """The layout of documents whose offsets the caller knows. Other descriptions must start no document in between."""
    offsets = None
    if values_are_known(cu_seqlens):
        offsets = cu_seqlens.cpu()
        ends = offsets.tolist()
        if offsets.dim() != 1 or not ends or ends[0] != 0 or ends[-1] != length or sorted(ends) != ends:
            raise ValueError(f"cu_seq_lens_q must be offsets from 0 to T={length} that do not decrease: got {ends}")
        for name, x in {"position_ids": position_ids, "seq_idx": seq_idx}.items():
            if x is None:
                continue
            columns = torch.arange(length, device=x.device)
            starts = _starts(columns, 1, length, *((x, None) if name == "position_ids" else (None, x)))
            inside = starts & ~torch.isin(columns, cu_seqlens.to(x.device))
            if bool(inside.any()):
                column = int(inside.nonzero()[0])
                raise ValueError(f"{name} must not start a document at column {column}, inside one of cu_seq_lens_q")
    return TokenLayout(1, length, None, cu_seqlens, offsets, documents=True)


def _check_documents(
    batch: int,
    length: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    """Raise ValueError for documents told twice, or told in tensors of a wrong shape."""
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q packs documents in a batch of one: got a batch of {batch}")
        if attention_mask is not None:
            raise ValueError(
                "attention_mask must be None together with cu_seq_lens_q: packed documents have no padding"
            )
    for name, x in {"position_ids": position_ids, "seq_idx": seq_idx}.items():
        if x is not None and (x.dim() != 2 or x.shape[0] not in (1, batch) or x.shape[1] != length):
            raise ValueError(f"{name} must have shape [{batch}, {length}]: got {list(x.shape)}")


def _check_mask_shape(mask: Tensor, batch: int, length: int, past_length: int) -> None:
    wanted = [batch, past_length + length]
    if mask.dim() != 2 or list(mask.shape) not in (wanted, [batch, length]):
        raise ValueError(f"attention_mask must have shape {wanted} (past and new columns): got {list(mask.shape)}")


def _real_columns(mask: Tensor, length: int) -> Tensor | None:
    """bool ``[B, T]``: the mask of the new columns; None if all are tokens. Raises ValueError unless all are 0 and 1."""
    new = mask[:, mask.shape[1] - length :]
    real, known = new == 1, (mask == 1) | (mask == 0)
    every, legal, some = torch.stack([real.all(), known.all(), (mask == 1).any()]).tolist()
    if not legal:
        got = mask[~known].flatten()[0].item()
        raise ValueError(
            f"attention_mask must hold 1 for tokens and 0 for padding: got {got}; numbers of documents go to seq_idx or "
            "position_ids, and a mask that is added to scores (0 and -inf) has no meaning here"
        )
    if mask.is_floating_point() and not some and mask.numel():
        raise ValueError(
            "attention_mask must hold 1 for tokens and 0 for padding: got floats that are all 0, which is no token at all; a "
            "mask that is added to scores (0 and -inf) has no meaning here"
        )
    return None if every else real


def _starts(columns: Tensor, batch: int, length: int, position_ids: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """bool: whether each of ``columns`` (ascending within rows) starts its row or a document."""
    starts = (columns // length).diff() != 0
    if position_ids is not None:
        step = position_ids.expand(batch, length).flatten()[columns].diff()
        starts = starts | ((step != 1) & (step != columns.diff()))
    if seq_idx is not None:
        starts = starts | (seq_idx.expand(batch, length).flatten()[columns].diff() != 0)
    return F.pad(starts, (min(1, columns.shape[0]), 0), value=True)
