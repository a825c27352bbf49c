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
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        # With create_graph.
        return refusing(ctx, *(x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in gradients))

    return once


class Operator:
    """One computation and its gradient.

    Args:
        name, arguments: of the operators, as in a schema, tensors first. results: how many results have gradients.
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
        # The bare functions, for an operator that has this one inside.
        self.run, self.differentiate, self.fake = forward, backward, fake
        kinds = [x.strip().startswith("Tensor") for x in arguments.split(",")]
        self.count = sum(kinds)  # of tensors
        assert all(kinds[: self.count])
        gradients = ", ".join(f"Tensor gradient_{i}" for i in range(results))
        schema = f"{gradients}, {arguments}" + ", Tensor[] kept" * keeps
        self.operator = _define(name, arguments, forward, fake)
        self.backward = _define(f"{name}_backward", schema, backward, lambda *inputs: like(*inputs[results:]))
        gradients_of = self._gradients_by(self.backward, len(kinds) - self.count)
        self.operator.register_autograd(gradients_of, setup_context=self._save)
        self.function = self._function(name, forward, backward)

    def __call__(self, *inputs: Any) -> Any:
        """All results; the result itself where there is one."""
        if torch.compiler.is_compiling():
            found = self.operator(*inputs)[: self.results]
        else:
            found = self.function.apply(*inputs[: self.count], inputs[self.count :])
        return found if self.results > 1 else found[0]

    def _save(self, ctx: Any, inputs: tuple, output: Sequence[Tensor]) -> None:
        kept = output[self.results :]
        if kept:
            ctx.mark_non_differentiable(*kept)
            ctx.set_materialize_grads(False)  # zeros for what is kept would be as large as it
        ctx.save_for_backward(*inputs[: self.count], *kept)
        ctx.constants = inputs[self.count :]

    def _gradients_by(self, backward: Callable, constants: int) -> Callable:
        """``gradients(ctx, *given)``: of the tensors, and None for each of the constants behind them."""
        nothing = (None,) * constants

        def gradients(ctx: Any, *given: Any) -> tuple[Tensor | None, ...]:
            saved, count = ctx.saved_tensors, self.count  # read once: checkpointing unpacks a tensor once
            results = given[0] if isinstance(given[0], list) else given  # an operator's are in one list
            kept = [list(saved[count:])] if self.keeps else []
            found = backward(*results[: self.results], *saved[:count], *ctx.constants, *kept)
            rest = (y for y in found if y is not None)
            return *[next(rest) if _floating(x) else None for x in saved[:count]], *nothing

        return gradients

    def _function(self, name: str, run: Callable, backward: Callable) -> type[torch.autograd.Function]:
        """The autograd function of the tensors and of one tuple with all constants: each argument costs time."""

        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            *tensors, constants = inputs
            made = [y for y in run(*tensors, *constants) if y is not None]
            ctx.save_for_backward(*tensors, *made[self.results :])
            ctx.constants = constants
            return tuple(made[: self.results])

        differentiate = differentiable_once(self._gradients_by(backward, 1))
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
