"""Context parallelism of a module: every mixer in it learns which ranks share its sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from loglinear.layers.attention import SoftmaxAttention

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


def set_context_group(module: nn.Module, group: ProcessGroup | None) -> None:
    """From now on ``module`` (a mixer, or a model of them) takes and gives this rank's span of a sequence over ``group``.

    Spans are those of ``loglinear.distributed.context_span``. None goes back to whole sequences.
    Raises ValueError if the module holds softmax attention, which has no form over ranks here.
    """
    if group is not None:
        found = [
            name or type(part).__name__ for name, part in module.named_modules() if isinstance(part, SoftmaxAttention)
        ]
        if found:
            raise ValueError(f"mixer must not be softmax attention with a context group: got it in {', '.join(found)}")
    for part in module.modules():
        if hasattr(part, "context_group"):
            part.context_group = group  # type: ignore[assignment]
