"""The torchtitan recipe against the installed torchtitan: its own argument parser, loss, optimizer, checkpointing wrapper."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import distributed
from torch.distributed.tensor import DTensor

from loglinear.models import LogLinearForCausalLM
from loglinear.training.sharding import whole
from loglinear.training.trainer import decay_parameter_names

pytest.importorskip("torchtitan", reason="needs torchtitan")
pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of other packages

NAME = "loglinear.integrations.torchtitan"


@pytest.fixture
def group_of_one(monkeypatch):
    """A process group of this process alone, on the CPU: torchtitan takes CUDA for granted."""
    from torchtitan.distributed import parallel_dims

    monkeypatch.setattr(parallel_dims, "device_type", "cpu")
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield
    distributed.destroy_process_group()


def configuration(*options: str):
    from torchtitan.config import ConfigManager

    return ConfigManager().parse_args(["--module", NAME, "--config", "log_linear_mamba2_debug", *options])


def built(config):
    """The model as torchtitan's trainer makes it: on the meta device, then in shards, then initialised."""
    from torchtitan.distributed import ParallelDims

    spec, dims = config.model_spec, ParallelDims.from_config(config.parallelism, 1)
    spec.model.update_from_config(config=config)
    with torch.device("meta"):
        model = spec.model.build()
    model.verify_module_protocol()
    sizes = spec.model.get_nparams_and_flops(model, config.training.seq_len)
    model = spec.parallelize_fn(
        model,
        parallel_dims=dims,
        training=config.training,
        parallelism=config.parallelism,
        compile_config=config.compile,
        ac_config=config.activation_checkpoint,
        dump_folder="",
    )
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
    return model.train(), sizes


def test_a_step_in_torchtitans_hands_is_ours(group_of_one):
    config = configuration("--training.seq_len", "48", "--training.mixed_precision_param", "float32")
    model, (parameters, flops) = built(config)
    assert '"hidden_size": 64' in json.dumps(config.to_dict())  # torchtitan logs it
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert parameters == sum(parameter.numel() for parameter in model.parameters())
    assert flops == 6 * (parameters - 2048 * 64)

    # The same values in a plain model, by the names that a checkpoint for Hugging Face has.
    spec = config.model_spec
    adapter = spec.state_dict_adapter(spec.model, None)
    weights = whole(adapter.to_hf(model.state_dict()))
    plain = LogLinearForCausalLM(spec.model.model_config())
    for name, fresh in plain.state_dict().items():
        if fresh.min() == fresh.max():
            assert torch.equal(weights[name], fresh), name
        elif fresh.numel() > 99:
            assert weights[name].std().item() == pytest.approx(fresh.std().item(), rel=0.2), name
        else:
            assert weights[name].isfinite().all(), name
            assert weights[name].min() < weights[name].max(), name
    plain.load_state_dict(weights)
    assert plain.config.max_position_embeddings == 48
    assert adapter.from_hf(adapter.to_hf({"causal.lm_head.weight": 1})) == {"causal.lm_head.weight": 1}

    # Two documents in the first row, in the second one.
    tokens, labels = torch.randint(2048, (2, 48)), torch.randint(2048, (2, 48))
    positions = torch.stack([torch.cat([torch.arange(20), torch.arange(28)]), torch.arange(48)])
    loss, _ = config.loss.build(compile_config=config.compile)(
        model(tokens, positions=positions), labels, torch.tensor(96.0)
    )
    loss.backward()
    rows = [plain(tokens[:1, :20]), plain(tokens[:1, 20:]), plain(tokens[1:])]
    logits = torch.cat([row.logits[0] for row in rows])
    expected = F.cross_entropy(logits, labels.flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    gradients = whole({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, value in plain.named_parameters():
        torch.testing.assert_close(gradients.pop(wrapped(name)), value.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert not gradients

    # What decays is what decays in our own trainer.
    optimizers = config.optimizer.build(model_parts=[model])
    decayed = {
        id(parameter)
        for group in optimizers.optimizers[0].param_groups
        if group["weight_decay"]
        for parameter in group["params"]
    }
    assert {n for n, p in model.named_parameters() if id(p) in decayed} == {
        wrapped(n) for n in decay_parameter_names(plain)
    }
    before = plain.lm_head.weight.detach().clone()
    optimizers.step()
    assert not torch.equal(whole(model.causal.lm_head.weight), before)


def wrapped(name: str) -> str:
    """The name in a model whose blocks are wrapped for activation checkpointing."""
    if ".layers." not in name:
        return f"causal.{name}"
    head, index, tail = name.partition(".layers.")[0], name.split(".")[2], name.split(".", 3)[3]
    return f"causal.{head}.layers.{index}._checkpoint_wrapped_module.{tail}"


def test_other_parallelism_is_refused():
    from types import SimpleNamespace

    from loglinear.integrations.torchtitan import parallelize

    nothing = dict.fromkeys(("training", "parallelism", "compile_config", "ac_config", "dump_folder"))
    with pytest.raises(ValueError, match="cp must be 1 for log-linear models: got 2"):
        parallelize(None, parallel_dims=SimpleNamespace(tp=1, cp=2, pp=1, ep=1), **nothing)


@pytest.mark.parametrize("name", ["log_linear_mamba2_800m", "log_linear_gated_deltanet_800m"])
def test_large_configurations_are_the_papers(name):
    import loglinear.integrations.torchtitan as recipe

    config = getattr(recipe, name)()
    parameters, _ = config.model_spec.model.get_nparams_and_flops(None, 16_384)
    assert 0.75e9 < parameters < 0.85e9
