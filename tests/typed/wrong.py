"""Mistakes that a checker reports, each in the line that says so (tests/test_typed.py)."""

import torch

import loglinear
from loglinear import LogLinearConfig, LogLinearForCausalLM, log_linear_attention
from loglinear.fenwick import level
from loglinear.layers import LogLinearMamba2

x = torch.zeros(1, 8, 1, 8)

log_linear_attention(x, x, x)  # wrong: two arguments are missing
log_linear_attention(x, x, x, None, x, scale="1")  # wrong: a text for a number
log_linear_attention(x, x, x, None, x, initial_sate=None)  # wrong: a name that no argument has
loglinear.log_linear_atention(x, x, x, None, x)  # wrong: a name that the package does not have
o, state = log_linear_attention(x, x, x, None, x)
position = state.position  # wrong: it may be None
level(1.5, 0)  # wrong: a position that is no integer
mixer = LogLinearMamba2(64, num_heads=4, level_scale_start="two")  # wrong: there is no such start
mixer.forward([1.0])  # wrong: a list for a tensor
LogLinearForCausalLM("run")  # wrong: a name for a config
number: int = LogLinearConfig.model_type  # wrong: a text
