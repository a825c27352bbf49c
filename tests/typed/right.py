"""What a user writes: a checker that is strict finds nothing to say about it (tests/test_typed.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import loglinear
from loglinear import (
    DecodingState,
    LiftReport,
    LinearState,
    LogLinearConfig,
    LogLinearForCausalLM,
    LogLinearState,
    lift,
    log_linear_attention,
    log_linear_attention_step,
    log_linear_delta_rule,
)
from loglinear.fenwick import level, num_levels
from loglinear.layers import LogLinearGatedDeltaNet, LogLinearMamba2, MixerState
from loglinear.models import MIXERS, DecodingGraph


def two_calls(q: Tensor, k: Tensor, v: Tensor, g: Tensor, level_scales: Tensor) -> Tensor:
    first: Tensor
    state: LogLinearState | LinearState | None
    first, state = log_linear_attention(q, k, v, g, level_scales, output_final_state=True)
    rest, state = log_linear_attention(q, k, v, g, level_scales, initial_state=state, output_final_state=True)
    assert isinstance(state, LogLinearState)
    copied: LogLinearState = state.clone().detach().to("cpu", torch.float32).reorder(torch.arange(2))
    decoding: DecodingState = DecodingState.from_state(copied, max_context=1000)
    step: Tensor = log_linear_attention_step(q, k, v, g, level_scales, decoding)
    position: Tensor = decoding.position
    size: int = decoding.nbytes + int(position.max())
    return torch.cat([first, rest, step], dim=1) * size


def delta_rule(q: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    return log_linear_delta_rule(q, q, v, None, beta, None, use_qk_l2norm_in_kernel=True)[0]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixer = LogLinearMamba2(hidden_size=width, num_heads=4)
        self.other = LogLinearGatedDeltaNet(hidden_size=width, num_heads=4, key_dim=16, value_dim=32)

    def forward(self, hidden: Tensor, state: MixerState | None = None) -> Tensor:
        out: Tensor = self.mixer(hidden)
        return out


def model() -> LogLinearForCausalLM:
    config = LogLinearConfig(mixer=[*MIXERS][:2], vocab_size=256, hidden_size=64, num_hidden_layers=2)
    made = LogLinearForCausalLM(config)
    report: LiftReport = lift(made)
    graph: type[DecodingGraph] = DecodingGraph
    print(report, graph, config.hidden_size)
    return made


levels: list[int] = [level(12, s) for s in range(13)]
count: int = num_levels(1000)
version: str = loglinear.__version__
