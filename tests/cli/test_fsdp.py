"""FSDP2 on two processes: the losses of one, whatever a run's processes were before, and weights that one can load.

On CPUs over gloo; where there are two GPUs, the same tests run on them over NCCL.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from loglinear.cli import main
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.training import checkpoints
from loglinear.training.model import compile_blocks
from loglinear.training.sharding import shard, shard_like, whole
from loglinear.training.trainer import decay_parameter_names

pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs or none")
TOLERANCE = 1e-4 if torch.cuda.is_available() else 1e-5


def command(options: list[str]) -> None:
    """The command line on this process, which keeps all checkpoints."""
    checkpoints.KEPT = 9
    assert main(options) == 0


def content(run: Path) -> dict:
    return json.loads((run / "record.json").read_text())


def assert_same_run(run: Path, expected: Path) -> None:
    """Losses, gradient norms, weights and optimizer state, up to rounding."""
    logs, expected_logs = ([log for log in content(folder)["history"] if "loss" in log] for folder in (run, expected))
    for name in ("step", "loss", "grad_norm"):
        assert [log[name] for log in logs] == pytest.approx([log[name] for log in expected_logs], rel=TOLERANCE)
    assert content(run)["metrics"] == pytest.approx(content(expected)["metrics"], rel=TOLERANCE)
    torch.testing.assert_close(
        *(load_file(folder / "model.safetensors") for folder in (run, expected)), rtol=1e-2, atol=1e-5
    )
    states = [torch.load(folder / "checkpoint-9" / "optimizer.pt", map_location="cpu") for folder in (run, expected)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    torch.testing.assert_close(states[0]["state"], states[1]["state"], rtol=1e-2, atol=1e-5)


def interrupted_copy(run: Path, step: int, copy: Path) -> Path:
    """The run as it was when its checkpoint ``step`` was the last."""
    shutil.copytree(run, copy)
    (copy / "model.safetensors").unlink()
    for checkpoint in checkpoints.complete_checkpoints(copy):
        if checkpoints.checkpoint_step(checkpoint) > step:
            shutil.rmtree(checkpoint)
    (copy / "record.json").write_text(json.dumps({**content(copy), "status": "running"}))
    return copy


def test_two_processes_are_one_and_go_on_as_one_and_back(train_options, tmp_path, capsys):
    options = [*train_options, "--steps", "9", "--save-every", "3", "--evaluate-every", "9", "--precision", "float32"]
    single, double = tmp_path / "single", tmp_path / "double"
    one, two = [*options, "--batch-size", "4"], [*options, "--batch-size", "2", "--fsdp"]
    assert main([*one, "--output", str(single)]) == 0
    run_ranks(command, 2, [*two, "--output", str(double)])
    assert_same_run(double, single)

    # Three steps on two processes, three on one, three on two.
    first = interrupted_copy(double, 3, tmp_path / "first")
    assert main([*one, "--output", str(first)]) == 0
    assert f"going on from {first / 'checkpoint-3'}" in capsys.readouterr().out
    second = interrupted_copy(first, 6, tmp_path / "second")
    run_ranks(command, 2, [*two, "--output", str(second)])
    assert_same_run(second, single)
    arguments = content(second)["arguments"]
    assert (arguments["processes"], arguments["batch_size"], arguments["fsdp"]) == (2, 2, True)

    # What is left is a model like any other, with tied weights stored once.
    model = LogLinearForCausalLM.from_pretrained(second)
    assert model.config.architectures == ["LogLinearForCausalLM"]
    assert model.lm_head.weight is model.model.embed_tokens.weight

    # Other batches are another run.
    assert main([*options, "--batch-size", "3", "--output", str(second)]) == 2
    assert "--batch-size x accumulate x processes was 4 and is now 3" in capsys.readouterr().err


@pytest.mark.default_packages
@pytest.mark.parametrize("more", [[], ["--fsdp"]], ids=["replicated", "sharded"])
def test_sequences_that_fill_up_the_last_batch_do_not_count(more, train_options, tmp_path):
    options = [*train_options, "--steps", "1", "--learning-rate", "0.1", "--precision", "float32"]
    single, double = tmp_path / "single", tmp_path / "double"
    assert main([*options, "--batch-size", "8", "--output", str(single)]) == 0
    assert content(single)["data"]["validation"]["sequences"] % 8 == 2, (
        "half of what one process takes, and none for the other"
    )
    run_ranks(command, 2, [*options, *more, "--batch-size", "4", "--output", str(double)])
    assert content(double)["metrics"] == pytest.approx(content(single)["metrics"], rel=TOLERANCE)


def small_model(**options) -> LogLinearForCausalLM:
    torch.manual_seed(0)
    config = LogLinearConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, mamba_head_dim=8, mamba_state_size=8, **options
    )
    return LogLinearForCausalLM(config)


def compare_compiled() -> None:
    """A compiled and sharded model on this process with the plain one: loss, gradients, marks, shards and back."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    plain, model = small_model().to(device), small_model().to(device)
    compile_blocks(model, backend="eager")
    shard(model, init_device_mesh(device, (1,)))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert decay_parameter_names(model) == decay_parameter_names(plain)
    tokens = torch.randint(20, (2, 24), device=device)
    losses = [each(input_ids=tokens, labels=tokens).loss for each in (plain, model)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    gradients = whole({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad.cpu(), msg=name)
    parameter = model.lm_head.weight
    value = torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape)
    assert torch.equal(whole(shard_like(value, parameter)), value)
    assert whole([parameter], keep=False)[0].numel() == 0


def test_compiled_blocks_can_be_sharded():
    run_ranks(compare_compiled, 1)
