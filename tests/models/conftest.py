"""Tiny models of every mixer, in float64 so that equal means equal."""

import pytest
import torch

from loglinear.models import LogLinearConfig, LogLinearForCausalLM

VOCAB = 61
PAD, BOS, EOS = 0, 1, 2
HYBRID = ["log_linear_mamba2", "attention", "log_linear_gated_deltanet"]
KIMI = ["kda", "kda", "attention"]
# The fixed decays are the scalar gate to a model; of the linear twins, gla and retnet keep what the others keep.
MIXERS = [
    *("log_linear_mamba2", "mamba2", "log_linear_gated_deltanet", "gated_deltanet"),
    *("log_linear_kda", "log_linear_gla", "log_linear_retnet", "attention"),
]


def tiny_config(mixer, **overrides):
    """Three layers of width 24; contexts of 64 have own levels, so that longer ones share the last."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "num_hidden_layers": 3,
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


# With the newest and the oldest packages these suffice: the others are the same two kinds of layers to transformers.
ASKED_OF_ALL_PACKAGES = ("log_linear_mamba2", "attention")


def every(mixers):
    """Mixers as parameters, of which the newest and the oldest packages see some."""
    return [
        pytest.param(name, marks=() if name in ASKED_OF_ALL_PACKAGES else pytest.mark.default_packages)
        for name in mixers
    ]


@pytest.fixture(
    params=[
        *every(MIXERS),
        pytest.param(HYBRID, id="hybrid"),
        pytest.param(KIMI, id="kimi", marks=pytest.mark.default_packages),
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
