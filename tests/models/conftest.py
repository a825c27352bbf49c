"""Tiny models of every mixer, in float64 so that equal means equal.

A test asks four models, which share the mixers: a hybrid, a log-linear one, a linear one, and a Transformer. tests/layers asks
each mixer alone.
"""

import pytest
import torch

from loglinear.models import LogLinearConfig, LogLinearForCausalLM

VOCAB = 61
PAD, BOS, EOS = 0, 1, 2
HYBRID = ["log_linear_mamba2", "attention", "log_linear_gated_deltanet"]
LOG_LINEAR = ["log_linear_kda", "log_linear_gla", "log_linear_retnet"]  # lightning is retnet to a model
LINEAR = ["mamba2", "gated_deltanet", "kda"]  # the other linear twins keep what these keep


def tiny_config(mixer, **overrides):
    """A layer for each mixer, or two; width 24. Contexts of 64 have own levels, so that longer ones share the last."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "num_hidden_layers": 2 if isinstance(mixer, str) else len(mixer),
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "mamba_head_dim": 12,
        "mamba_state_size": 6,
        "mamba_num_groups": 2,
        "delta_num_heads": 4,
        "delta_num_key_heads": 2,
        "delta_key_dim": 6,
        "delta_value_dim": 8,
        "kda_num_heads": 4,
        "kda_num_key_heads": 2,
        "kda_value_dim": 8,
        "gla_num_heads": 4,
        "gla_num_kv_heads": 2,
        "retnet_num_heads": 4,
        "retnet_num_kv_heads": 2,
        "lightning_num_heads": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,  # far from uniform predictions, so that a wrong state shows in the tokens
        "pad_token_id": PAD,
        "bos_token_id": BOS,
    }
    return LogLinearConfig(mixer=mixer, **(sizes | overrides))


# To transformers there are layers with a state and layers of attention: the newest and the oldest packages see a model of both.
@pytest.fixture(
    params=[
        pytest.param(HYBRID, id="hybrid"),
        pytest.param(LOG_LINEAR, id="log-linear", marks=pytest.mark.default_packages),
        pytest.param(LINEAR, id="linear", marks=pytest.mark.default_packages),
        "attention",
    ]
)
def mixer(request):
    return request.param


@pytest.fixture
def make_model():
    """``make_model(mixer, **config)``: an untrained model with fixed weights, in float64 and evaluation mode."""

    def make(mixer, seed=0, **overrides):
        torch.manual_seed(seed)
        return LogLinearForCausalLM(tiny_config(mixer, **overrides)).double().eval()

    return make


@pytest.fixture
def tokens():
    """``tokens(*shape)``: random ids that are not special."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randint(3, VOCAB, shape, generator=generator)


@pytest.fixture
def config_of():
    return tiny_config
