"""TRANSFORMS: the op under ``torch.func``. The axis of a vmap becomes rows of the batch and comes back afterwards.

Both operators have this rule, so compiled code has it too. An operator that returns a list is not differentiable under
``torch.func``; ``Transformed`` makes it so. Plain PyTorch needs none of this where nothing is vmapped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loglinear.ops.checks import transforming
from loglinear.ops.registration import attention, attention_backward


def vmapped(*tensors: Any) -> bool:
    """Whether one of the tensors has a hidden axis of some vmap."""
    functorch = torch._C._functorch
    for x in tensors:
        while isinstance(x, Tensor) and functorch.is_functorch_wrapped_tensor(x):
            if functorch.is_batchedtensor(x):
                return True
            x = functorch.get_unwrapped(x)
    return False


def check(tensors: tuple, **absent: Any) -> None:
    """Raise if one of the tensors is vmapped and an argument is given that has no meaning under vmap."""
    given = [name for name, value in absent.items() if value is not None and value is not False]
    if given and transforming() and vmapped(*tensors):
        raise ValueError(
            f"{given[0]} must not be given under torch.vmap, whose axis becomes rows of the batch, from their start"
        )


def run(*inputs: Any) -> Tensor:
    """o of either op, without states, from the inputs of ``loglinear::attention`` up to cu_seqlens. Differentiable once."""
    return Transformed.apply(*inputs)


class Transformed(torch.autograd.Function):
    """``loglinear::attention``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        return attention(*inputs, "")[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale, cu_seqlens = inputs
        ctx.save_for_backward(*tensors, cu_seqlens)

    @staticmethod
    def backward(ctx, do):
        *tensors, cu_seqlens = ctx.saved_tensors
        grads = iter(TransformedBackward.apply(do, *tensors, ctx.scale, cu_seqlens))
        return *(None if x is None else next(grads) for x in tensors), None, None


class TransformedBackward(torch.autograd.Function):
    """``loglinear::attention_backward``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        return tuple(attention_backward(*inputs, []))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError("log-linear attention under torch.vmap, or on a GPU, is differentiable once")


def _as_rows(info: Any, in_dims: tuple, tensors: tuple, operator: Any, *rest: Any) -> tuple[list[Tensor], list[int]]:
    """Results of the operator on ``[N·B, T, ...]``, and where their axis of N is."""
    count = info.batch_size

    def rows(x: Tensor | None, dim: int | None) -> Tensor | None:
        if x is None:
            return None
        x = x.unsqueeze(0).expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    results = operator(*(rows(x, dim) for x, dim in zip(tensors, in_dims)), *rest)
    return [x.unflatten(0, (count, x.shape[0] // count)) for x in results], [0] * len(results)


@attention.register_vmap
def _(info, in_dims, *inputs):
    *tensors, scale, cu_seqlens, _ = inputs
    assert cu_seqlens is None, "cu_seqlens must not be given under torch.vmap"
    return _as_rows(info, in_dims, tuple(tensors), attention, scale, None, "")


@attention_backward.register_vmap
def _(info, in_dims, *inputs):
    *tensors, scale, _, _ = inputs
    return _as_rows(info, in_dims, tuple(tensors), attention_backward, scale, None, [])
