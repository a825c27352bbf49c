"""OPERATORS: a computation of kernels and its gradient, described once, as eager autograd and PyTorch's compiler see it.

Eager code calls an ``autograd.Function``: an operator would cost the host more than a short sequence costs the GPU. Compiled
code sees ``loglinear::name`` and ``loglinear::name_backward``, with their fakes. Both are differentiable once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def differentiable_once(backward: Callable) -> Callable:
    """``backward(ctx, *gradients)``, whose results raise a RuntimeError as soon as they are differentiated.

    ``torch.autograd.function.once_differentiable`` refuses a second derivative only if the incoming gradients require grad.
    Behind a plain ``sum`` they do not, and the second derivative would be missing without an error.
    """
    refusing = torch.autograd.function.once_differentiable(backward)

    def once(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():  # create_graph
            gradients = tuple(x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in gradients)
        return refusing(ctx, *gradients)

    return once


class Operator:
    """One computation and its gradient.

    Args:
        name, arguments: of the operators, as in a schema. results: how many results have gradients.
        forward: of these arguments; results that are None are left out.
        backward: of the gradients of all results and the arguments, to the gradients of the floating-point tensors among
            them. fake: as forward, for sizes and dtypes.
        keeps: whether the forward pass gives more tensors behind its results, which the backward gets as a list, last.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        results: int,
        forward: Callable,
        backward: Callable,
        fake: Callable,
        keeps: bool = False,
    ) -> None:
        self.results, self.keeps = results, keeps
        kinds = [x.strip().startswith("Tensor") for x in arguments.split(",")]
        self.tensors = [i for i, tensor in enumerate(kinds) if tensor]
        self.constants = [i for i, tensor in enumerate(kinds) if not tensor]
        self.order = sorted(range(len(kinds)), key=[*self.tensors, *self.constants].__getitem__)
        gradients = ", ".join(f"Tensor gradient_{i}" for i in range(results))
        schema = f"{gradients}, {arguments}" + ", Tensor[] kept" * keeps
        self.operator = _define(name, arguments, forward, fake)
        self.backward = _define(f"{name}_backward", schema, backward, lambda *inputs: like(*inputs[results:]))
        self.operator.register_autograd(self._gradients_by(self.backward), setup_context=self._save)
        self.function = self._function(name, forward, backward)

    def __call__(self, *inputs: Any) -> Sequence[Tensor]:
        """All results."""
        if torch.compiler.is_compiling():
            return self.operator(*inputs)[: self.results]
        return self.function.apply(*inputs)

    def _save(self, ctx: Any, inputs: tuple, output: Sequence[Tensor]) -> None:
        kept = output[self.results :]
        if kept:
            ctx.mark_non_differentiable(*kept)
            ctx.set_materialize_grads(False)  # zeros for what is kept would be as large as it
        self._keep(ctx, inputs, kept)

    def _keep(self, ctx: Any, inputs: tuple, kept: Sequence[Tensor]) -> None:
        ctx.save_for_backward(*[inputs[i] for i in self.tensors], *kept)
        ctx.constants = [inputs[i] for i in self.constants]

    def _gradients_by(self, backward: Callable) -> Callable:
        def gradients(ctx: Any, *given: Any) -> tuple[Tensor | None, ...]:
            saved, count = ctx.saved_tensors, len(self.tensors)  # read once: checkpointing unpacks a tensor once
            tensors_first = *saved[:count], *ctx.constants
            results = given[0] if isinstance(given[0], list) else given  # an operator's are in one list
            kept = [list(saved[count:])] if self.keeps else []
            found = backward(*results[: self.results], *[tensors_first[i] for i in self.order], *kept)
            rest = (y for y in found if y is not None)
            made: list[Tensor | None] = [None] * len(self.order)
            for i, x in zip(self.tensors, saved):
                if x is not None and x.is_floating_point():
                    made[i] = next(rest)
            return tuple(made)

        return gradients

    def _function(self, name: str, run: Callable, backward: Callable) -> type[torch.autograd.Function]:
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            made = [y for y in run(*inputs) if y is not None]
            self._keep(ctx, inputs, made[self.results :])
            return tuple(made[: self.results])

        differentiate = differentiable_once(self._gradients_by(backward))
        # Profiles say ``name`` and ``nameBackward``.
        return type(
            name,
            (torch.autograd.Function,),
            {"forward": staticmethod(forward), "backward": staticmethod(differentiate)},
        )


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def like(*inputs: Any) -> list[Tensor]:
    """Contiguous tensors of the sizes and dtypes of the floating-point tensors among the inputs."""
    return [y.new_empty(y.shape) for y in inputs if _floating(y)]


def _define(name: str, arguments: str, function: Callable, fake: Callable) -> torch.library.CustomOpDef:
    """An operator that returns a list. None of its tensors may be a part of another."""

    def apart(*inputs: Any) -> list[Tensor]:
        given = (y for y in function(*inputs) if y is not None)
        return [y if y.untyped_storage().nbytes() == y.nbytes else y.clone() for y in given]

    schema = f"({arguments}) -> Tensor[]"
    operator = torch.library.custom_op(f"loglinear::{name}", apart, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator
