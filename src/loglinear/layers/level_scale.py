"""LevelScale: the λ of log-linear attention, one weight per token, head and level.

It is all that log-linear attention adds to a linear model. A linear checkpoint therefore loads into a log-linear model with
only ``level_scale.*`` missing.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loglinear.layers.initialization import StatedInit, wide
from loglinear.layers.linear import project
from loglinear.ops import pointwise

Start = Literal["paper", "one"]
# Where λ starts at dl = 0: ln 2 on every level, or 1, the linear model itself.
OFFSETS: dict[Start, float] = {"paper": 0.0, "one": math.log(math.e - 1)}
PROJECTION_STD = 0.006  # of dl_proj outside a model, whose initializer_range it is otherwise; the paper's training


class LevelScale(StatedInit):
    """``λ = softplus(L ∘ dl + c)``: L a parameter per head and level, dl a linear projection of the layer's input.

    Args:
        hidden_size: width of the input. num_heads: H, value heads. num_levels: levels with a λ of their own; tokens
            further apart share the last one's.
        bias: whether the projection has one, which starts at 0.
        start: "paper", c = 0: λ starts near ln 2 on every level. "one", c = ln(e - 1): λ starts near 1, and is 1 where dl
            is 0, which is the linear model.

    Source: Guo et al. 2025, section 3.4 and the authors' training setup (L initialised to 1).
    """

    no_weight_decay = frozenset({"L"})

    def __init__(
        self, hidden_size: int, num_heads: int, num_levels: int, start: Start = "paper", bias: bool = False
    ) -> None:
        super().__init__()
        if start not in OFFSETS:
            raise ValueError(f"start must be one of {list(OFFSETS)}: got {start!r}")
        self.offset = OFFSETS[start]
        self.L = nn.Parameter(torch.empty(num_heads, num_levels))
        self.dl_proj = nn.Linear(hidden_size, num_heads * num_levels, bias=bias)
        nn.init.normal_(self.dl_proj.weight, std=PROJECTION_STD)
        if self.dl_proj.bias is not None:
            nn.init.zeros_(self.dl_proj.bias)
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        return {"L": torch.ones_like(self.L)}

    def forward(self, hidden: Tensor, dl: Tensor | None = None) -> Tensor:
        """hidden ``[B, T, hidden_size]`` to λ ``[B, T, H, levels]`` > 0, in the dtype of the projection.

        dl: what ``dl_proj`` makes of hidden, if it is there already.
        """
        dl = project(hidden, self.dl_proj) if dl is None else dl
        if dl.dim() == 3 and pointwise.has_kernels(dl, self.L):
            return pointwise.level_scales(dl, self.L, self.offset)
        dl = dl.unflatten(-1, self.L.shape)
        return F.softplus(wide(self.L) * wide(dl) + self.offset).to(dl.dtype)
