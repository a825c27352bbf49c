"""TRANSFORMS: the op under ``torch.func``. The axis of a vmap becomes rows of the batch and comes back afterwards.

Both operators of the op have that rule, so that compiled code has it too. ``Transformed`` makes them differentiable under
``torch.func``, which an operator that returns a list is not. Plain PyTorch needs none of this where nothing is vmapped.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from loglinear.ops.operators import Operator


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
    if given and vmapped(*tensors):
        raise ValueError(
            f"{given[0]} must not be given under torch.vmap, whose axis becomes rows of the batch, from their start"
        )


def run(operator: Operator, *inputs: Any) -> Tensor:
    """The only result of ``operator``, which keeps nothing. Differentiable once."""
    return Transformed.apply(operator, *inputs)


class Transformed(torch.autograd.Function):
    """The operator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator, *inputs):
        return operator.operator(*inputs)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.operator, *inputs = inputs
        ctx.constants = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))

    @staticmethod
    def backward(ctx, do):
        inputs = [constant if x is None else x for x, constant in zip(ctx.saved_tensors, ctx.constants)]
        grads = iter(TransformedBackward.apply(ctx.operator, do, *inputs))
        return None, *(next(grads) if isinstance(x, Tensor) and x.is_floating_point() else None for x in inputs)


class TransformedBackward(torch.autograd.Function):
    """The operator of its gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator, *inputs):
        return tuple(operator.backward(*inputs, []))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError("log-linear attention under torch.vmap, or on a GPU, is differentiable once")


def register(operator: Operator) -> None:
    """Give both operators of the attention op the rule of vmap. Behind its last tensors come reach, keep and backend."""

    def forward(info: Any, in_dims: tuple, *inputs: Any) -> tuple[list[Tensor], list[int]]:
        *tensors, _, backend = inputs
        return _as_rows(operator.operator, info, in_dims, *tensors, "", backend)  # no row keeps anything

    operator.operator.register_vmap(forward)
    operator.backward.register_vmap(partial(_as_rows, operator.backward))


def _as_rows(operator: Any, info: Any, in_dims: tuple, *inputs: Any) -> tuple[list[Tensor], list[int]]:
    """Results of the operator on ``[N·B, T, ...]``, and where their axis of N is."""
    count = info.batch_size

    def rows(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        assert x.is_floating_point(), "cu_seqlens must not be given under torch.vmap"
        x = x.unsqueeze(0).expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    results = operator(*(rows(x, dim) for x, dim in zip(inputs, in_dims)))
    return [x.unflatten(0, (count, x.shape[0] // count)) for x in results], [0] * len(results)
