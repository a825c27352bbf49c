"""EXCHANGE: an all-gather with a backward pass, and the tokens that the convolution needs from other ranks.

The backward pass of an all-gather is a collective too. Every rank must therefore take part in it, even a rank that does not use
the received tensors. For this reason the gather stands *on the way of* a tensor that the result depends on in any case.
This also gives the collectives of the backward pass the same order on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


class _Exchange(torch.autograd.Function):
    """(through, sent) to (through, what all ranks sent); see ``exchange``."""

    @staticmethod
    def forward(ctx: Any, through: Tensor, sent: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        ctx.group = group
        received = sent.new_empty(group.size(), *sent.shape)
        dist.all_gather(list(received.unbind()), sent.contiguous(), group=group)
        return through.view_as(through), received

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dthrough: Tensor, dreceived: Tensor) -> tuple[Tensor, Tensor, None]:
        # The transpose of an all-gather. The sum runs in the order of the ranks, so its bits are always the same.
        returned = torch.empty_like(dreceived, memory_format=torch.contiguous_format)
        dist.all_to_all_single(returned, dreceived.contiguous(), group=ctx.group)
        return dthrough, returned.sum(0), None


def exchange(through: Tensor, sent: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """``through`` as it is, and ``[R, *sent.shape]``: the tensor ``sent`` of every rank, of one shape and dtype on all ranks.

    The gradients that the other ranks have for ``sent`` come back to it. The loss must depend on ``through``.
    """
    return _Exchange.apply(through, sent, group)


def outside_graphs(function: Function) -> Function:
    """``function``, left out of compiled graphs: a graph cannot hold a process group."""
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def previous_inputs(x: Tensor, count: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """x ``[B, T, channels]`` as it is, and the last ``count`` tokens of the rank before (zeros on rank 0).

    Go on with the x that is returned: the backward pass runs through it. Raises ValueError if T < ``count``.
    """
    return outside_graphs(_previous_inputs)(x, count, group)


def _previous_inputs(x: Tensor, count: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    length = x.shape[1]
    if length < count:
        raise ValueError(f"x must hold at least {count} tokens on every rank: got T={length}")
    wide = torch.promote_types(x.dtype, torch.float32)  # all backends can send it
    x, tails = exchange(x, x[:, length - count :].to(wide), group)
    before = tails[group.rank() - 1] if group.rank() else torch.zeros_like(tails[0])
    return x, before.to(x.dtype)
