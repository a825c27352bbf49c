"""With λ = 1 the log-linear op is the linear model: compared with the ops of flash-linear-attention, where it is installed.

The test covers the forward pass only. The backward pass of the peer refuses to run on Hopper with the Tritons that
miscompile it.
"""

from __future__ import annotations

import pytest
import torch
from cases import DECAY, DELTA, LOW_PRECISION_FACTOR, make, relative
from cases import wide as in_float64
from torch import Tensor

from loglinear import log_linear_attention, log_linear_delta_rule
from oracle import plain_torch

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # the peer's own
PEER_BAR = 2e-2  # were the peer's conventions others than ours, its error would be near 1


def linear(rule, device: torch.device | str, **sizes) -> tuple[dict, dict]:
    """Inputs with as many q/k heads as value heads and λ = 1; and those of the peer: in float64, without λ."""
    x = make(device, rule, B=2, H=3, G=3, dtype=torch.bfloat16, **sizes)
    x["level_scales"] = torch.ones_like(x["level_scales"])
    if "beta" in x:
        x["beta"] = x["beta"].bfloat16().float() / 2  # the peer may take β in the dtype of v only
    return x, in_float64(x) | {"level_scales": None}


def check(ours: Tensor, theirs: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Ours has at most twice the error of plain torch, and so is at most that and the peer's error from the peer."""
    bar, error = LOW_PRECISION_FACTOR * relative(plain, exact), relative(theirs, exact)
    assert error <= PEER_BAR, f"the peer has relative error {error:.2e}: another convention?"
    assert relative(ours, exact) <= bar
    assert relative(ours, theirs) <= bar + error


@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 128), (128, 64)])
@pytest.mark.parametrize("gate", ["usual", "zero"])
@pytest.mark.parametrize("rule", [DECAY, DELTA], ids=["simple GLA", "linear gated delta rule"])
def test_our_linear_model_is_the_peer_s(device, rule, gate, K, V):
    delta = rule is DELTA
    fla = pytest.importorskip("fla.ops.gated_delta_rule" if delta else "fla.ops.simple_gla", exc_type=ImportError)
    x, wide = linear(rule, device, T=1000, K=K, V=V, gate=gate)
    q, k, v, g = (x[name] for name in "qkvg")
    if delta:
        theirs = fla.chunk_gated_delta_rule(q, k, v, g=g, beta=x["beta"].to(v.dtype), scale=0.5)[0]
    else:
        theirs = fla.chunk_simple_gla(q, k, v, g=g, scale=0.5)[0]
    op = log_linear_delta_rule if delta else log_linear_attention
    check(op(**x, scale=0.5)[0], theirs, plain_torch(**x, scale=0.5), op(**wide, scale=0.5)[0])
