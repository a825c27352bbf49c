"""Layers, a whole model and its training over two ranks against one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from processes import on_ranks

from loglinear.distributed import context_span
from loglinear.layers import set_context_group
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from oracle import error

LENGTH = 256
MIXERS = ["log_linear_mamba2", "log_linear_gated_deltanet", "log_linear_kda", "log_linear_retnet", "mamba2", "gla"]
SIZES = {
    "vocab_size": 31, "hidden_size": 16, "num_hidden_layers": len(MIXERS), "intermediate_size": 16, "mixer": MIXERS,
    "max_position_embeddings": LENGTH, "mamba_head_dim": 8, "mamba_state_size": 4, "mamba_num_groups": 2,
    "delta_num_heads": 2, "delta_num_key_heads": 1, "delta_key_dim": 4, "delta_value_dim": 6, "initializer_range": 0.3,
    "kda_num_heads": 2, "kda_key_dim": 4, "gla_num_heads": 2, "gla_key_dim": 4, "retnet_num_heads": 2,
}  # fmt: skip


def make_model() -> LogLinearForCausalLM:
    torch.manual_seed(0)
    model = LogLinearForCausalLM(LogLinearConfig(**SIZES)).double()
    for layer in model.model.layers:
        if hasattr(layer.mixer, "A_log"):
            layer.mixer.A_log.data -= 4  # a past that lasts: most of an untrained one is forgotten in a span
    return model.train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and of each the next one."""
    ids = torch.randint(31, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    return ids, torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)


def loss_and_gradients(model, ids, targets) -> dict[str, torch.Tensor]:
    """The loss's sum over the tokens given, and of every parameter its gradient."""
    logits = model(input_ids=ids).logits  # in float64, where the model's own loss is in float32
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="sum")
    loss.backward()
    return {"loss": loss.detach()} | {name: value.grad for name, value in model.named_parameters()}


def on_a_span(rank: int, checkpointing: bool) -> dict:
    dist.init_process_group("gloo")
    model = make_model()
    set_context_group(model, dist.group.WORLD)
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids, targets = batch()
    own = context_span(LENGTH, dist.group.WORLD)
    found = loss_and_gradients(model, ids[:, own], targets[:, own])
    return {"found": found, "errors": refusals(model, ids[:, own])}


def refusals(model, ids: torch.Tensor) -> list[str]:
    mask = torch.ones_like(ids)
    mask[:, 3] = 0
    calls = [dict(attention_mask=mask), dict(use_cache=True), dict(input_ids=ids[:, :65])]
    found = []
    for options in calls:
        with pytest.raises(ValueError) as caught, torch.no_grad():
            model.eval()(**{"input_ids": ids, "use_cache": False} | options)
        found.append(str(caught.value))
    return found


def test_a_model_over_two_ranks_is_that_of_one_process():
    results = on_ranks(2, on_a_span, True)
    expected = loss_and_gradients(make_model(), *batch())
    for name, want in expected.items():
        have = sum(torch.as_tensor(result["found"][name]) for result in results)
        assert error(have, want) < 1e-10, name
    for result in results:
        padded, cached, ragged = result["errors"]
        assert "without padding" in padded
        assert "use_cache=False" in cached
        assert "q must hold a multiple of 64 tokens on every rank: got T=65" in ragged


def test_softmax_attention_is_refused():
    hybrid = LogLinearForCausalLM(LogLinearConfig(**SIZES | {"mixer": [*MIXERS[:-1], "attention"]}))
    with pytest.raises(ValueError, match=r"softmax attention with a context group: got it in model\.layers\.5\.mixer"):
        set_context_group(hybrid, object())
