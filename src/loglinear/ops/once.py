"""ONCE: the backward pass of an ``autograd.Function`` over kernels, which nothing can differentiate again.

Special about this file: ``torch.autograd.function.once_differentiable`` refuses a second derivative only where the gradients
that come in depend on something. Behind a plain ``sum`` they do not, and its derivative would be missing without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable_once(backward: Callable) -> Callable:
    """``backward(ctx, *gradients)``, whose results raise a RuntimeError as soon as they are differentiated."""
    refusing = torch.autograd.function.once_differentiable(backward)

    def once(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():  # create_graph
            gradients = tuple(x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in gradients)
        return refusing(ctx, *gradients)

    return once
