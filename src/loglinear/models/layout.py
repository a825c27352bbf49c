"""TokenLayout: which columns of a batch are real tokens, and where sequences start.

Special about this file: padding never reaches a mixer. Log-linear attention is not shift-invariant, so a padded row is not
its unpadded self: the model drops the padding, runs the real tokens packed, and puts them back. Left padding, right padding
and holes are then all the same as no padding, and packed documents come for free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """How ``[B, T]`` columns become what the mixers see: ``[B, T]`` itself, or n sequences packed in a batch of one.

    Attributes:
        batch, length: B and T.
        index: int64 ``[N]``, the real tokens among the B·T columns; None when all are.
        cu_seqlens: int64 ``[n + 1]`` on the device and ``cu_seqlens_cpu`` on the CPU; None when rows run as they are.
        documents: whether sequences are not rows (several in a row), so that a state would not belong to a row.
    """

    batch: int
    length: int
    index: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None
    documents: bool = False

    def pack(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` to what the mixers see."""
        if self.cu_seqlens is None:
            return x
        flat = x.flatten(0, 1)
        return (flat if self.index is None else flat[self.index]).unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of ``pack``; zeros where there was padding."""
        if self.cu_seqlens is None:
            return x
        flat = x[0]
        if self.index is not None:
            index = self.index.to(flat.device)  # the last layer may be on another device than the first
            flat = flat.new_zeros(self.batch * self.length, flat.shape[-1]).index_put((index,), flat)
        return flat.unflatten(0, (self.batch, self.length))


def plan_layout(
    batch: int,
    length: int,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    past_length: int = 0,
) -> TokenLayout:
    """Read the layout from what callers pass.

    Args:
        batch, length: B and T of the new columns.
        attention_mask: ``[B, past_length + T]`` or ``[B, T]``, nonzero for real tokens.
        position_ids: ``[B, T]`` or ``[1, T]``; used only to find documents. A token continues the one before it when its
            position is one higher, or higher by the columns between them (a hole in the mask). Otherwise a document starts.
        cu_seq_lens: integer ``[n + 1]``, offsets of documents packed in a batch of one.
        past_length: columns that the cache has seen.

    Raises:
        ValueError: shapes or offsets that do not fit, or both a mask and ``cu_seq_lens``.
    """
    if cu_seq_lens is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q packs documents in a batch of one: got a batch of {batch}")
        if attention_mask is not None:
            raise ValueError(
                "attention_mask must be None together with cu_seq_lens_q: packed documents have no padding"
            )
        offsets = cu_seq_lens.cpu()
        ends = offsets.tolist()
        if offsets.dim() != 1 or not ends or ends[0] != 0 or ends[-1] != length or sorted(ends) != ends:
            raise ValueError(f"cu_seq_lens_q must be offsets from 0 to T={length} that do not decrease: got {ends}")
        return TokenLayout(1, length, None, cu_seq_lens, offsets, documents=True)

    real = None
    if attention_mask is not None:
        real = _real_columns(attention_mask, batch, length, past_length)
        real = None if bool(real.all()) else real
    if position_ids is not None and (position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch)):
        raise ValueError(f"position_ids must have shape [{batch}, {length}]: got {list(position_ids.shape)}")
    if position_ids is not None and position_ids.shape[1] != length:
        raise ValueError(f"position_ids must have shape [{batch}, {length}]: got {list(position_ids.shape)}")
    if real is None and (position_ids is None or length <= 1):
        return TokenLayout(batch, length)

    index = None if real is None else real.flatten().nonzero().squeeze(1)
    starts = None
    if position_ids is not None:
        columns = torch.arange(batch * length, device=position_ids.device) if index is None else index
        starts = _document_starts(columns, position_ids.expand(batch, length).flatten()[columns], length)
    if starts is not None:
        cu_seqlens = F.pad(starts, (0, 1), value=batch * length if index is None else len(index))
    elif real is not None:
        cu_seqlens = F.pad(real.sum(1).cumsum(0), (1, 0))  # one sequence per row, empty where a row is all padding
    else:
        return TokenLayout(batch, length)
    return TokenLayout(batch, length, index, cu_seqlens, cu_seqlens.cpu(), documents=starts is not None)


def _real_columns(mask: Tensor, batch: int, length: int, past_length: int) -> Tensor:
    """bool ``[B, T]``: the mask of the new columns."""
    wanted = [batch, past_length + length]
    if mask.dim() != 2 or list(mask.shape) not in (wanted, [batch, length]):
        raise ValueError(f"attention_mask must have shape {wanted} (past and new columns): got {list(mask.shape)}")
    return mask[:, mask.shape[1] - length :].bool()


def _document_starts(columns: Tensor, positions: Tensor, length: int) -> Tensor | None:
    """Indices of the tokens that start a row or a document, or None when only rows start anywhere."""
    same_row = (columns // length).diff() == 0
    step = positions.diff()
    restart = same_row & (step != 1) & (step != columns.diff())
    if not bool(restart.any()):
        return None
    return F.pad(~same_row | restart, (1, 0), value=True).nonzero().squeeze(1)
