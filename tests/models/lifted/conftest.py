"""Tiny models of transformers with linear mixers, built from their configs, with weights that make every mixer count."""

import inspect

import pytest
import torch
import transformers

VOCAB = 61

_COMMON = {"vocab_size": VOCAB, "hidden_size": 32, "max_position_embeddings": 64}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 6,
    "mamba_chunk_size": 16,
    "mamba_expand": 2,
}

_DELTA = {
    **_COMMON,
    **_ATTENTION,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
    "head_dim": 8,
    "pad_token_id": 0,  # that of some configs is beyond this vocabulary
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}

_KDA = {
    **_COMMON,
    **_ATTENTION,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "sparse", "dense"],
    "num_experts": 4,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "pad_token_id": 0,
}
_MINIMAX = {
    **_COMMON,
    **_ATTENTION,
    "num_hidden_layers": 3,
    "layer_types": ["full_attention", "linear_attention", "linear_attention"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "block_size": 16,
    "pad_token_id": 0,
}

# Model class, config class, config.
FAMILIES = {
    "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", {**_DELTA, **_EXPERTS}),
    "qwen3_5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", _DELTA),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", {**_DELTA, **_EXPERTS}),
    "olmo_hybrid": ("OlmoHybridForCausalLM", "OlmoHybridConfig", _DELTA),
    "kimi": ("KimiLinearForCausalLM", "KimiLinearConfig", _KDA),
    "minimax": ("MiniMaxForCausalLM", "MiniMaxConfig", _MINIMAX),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 6,
            "n_groups": 4,
            "chunk_size": 16,
        },
    ),
    "bamba": (
        "BambaForCausalLM",
        "BambaConfig",
        {**_COMMON, **_MAMBA, **_ATTENTION, "num_hidden_layers": 2, "attn_layer_indices": [1]},
    ),
    "granite": (
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {
            **_COMMON,
            **_MAMBA,
            **_ATTENTION,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 48,
        },
    ),
    "nemotron": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **_COMMON,
            **_ATTENTION,
            "layers_block_type": ["linear_attention", "full_attention", "mlp"],
            "head_dim": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 6,
            "chunk_size": 16,
        },
    ),
    "zamba2": (
        "Zamba2ForCausalLM",
        "Zamba2Config",
        {
            **_COMMON,
            "num_hidden_layers": 2,
            "layers_block_type": ["linear_attention", "hybrid"],
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "num_mem_blocks": 1,
            "mamba_d_state": 6,
            "mamba_expand": 2,
            "mamba_ngroups": 2,
            "n_mamba_heads": 8,
            "chunk_size": 16,
        },
    ),
    "falcon": (
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {
            **_COMMON,
            **_MAMBA,
            **_ATTENTION,
            "num_hidden_layers": 2,
            "head_dim": 8,
            "mamba_d_ssm": 64,
            "ssm_multipliers": [0.5, 0.7, 1.3, 1.1, 0.9],
            "ssm_in_multiplier": 0.8,
        },
    ),
}


@pytest.fixture(scope="session")
def make_family():
    """``make_family(name, **config)``: an untrained model with fixed weights, in float32 and evaluation mode.

    Its matrices are wide enough for every mixer to show in the logits, and no norm, bias or skip is the identity.
    """

    def make(name, **overrides):
        model, config, fields = FAMILIES[name]
        if not hasattr(transformers, model):
            pytest.skip(f"transformers {transformers.__version__} has no {model}")
        config = getattr(transformers, config)(**(fields | overrides))
        made = getattr(transformers, model)(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if name.endswith("A_log"):
                    parameter.copy_(noise.sub(1))
                elif parameter.dim() > 1:
                    parameter.copy_(noise * parameter[0].numel() ** -0.5)
                else:
                    parameter.copy_(noise * 0.3 + (0 if "bias" in name else 1))
        return made.eval()

    return make


@pytest.fixture
def ids():
    """``ids(*shape)``: random tokens."""
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randint(3, VOCAB, shape, generator=generator)


@pytest.fixture
def cache_name():
    """``cache_name(model)``: the model's argument and output field for its cache, in the installed transformers."""

    def find(model):
        known = inspect.signature(model.forward).parameters
        return next(name for name in ("cache", "cache_params", "past_key_values") if name in known)

    return find
