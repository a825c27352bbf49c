"""ONCE: the backward pass of an ``autograd.Function`` over kernels, which cannot be differentiated a second time.

``torch.autograd.function.once_differentiable`` refuses a second derivative only if the incoming gradients require grad. Behind
a plain ``sum`` they do not, and the second derivative would be missing without an error.
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
