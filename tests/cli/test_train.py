"""`loglinear train`: what it records, and that a run survives whatever kills it."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import fields
from pathlib import Path
from typing import get_args
from unittest.mock import MagicMock

import pytest
import torch
from ranks import process_of
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PreTrainedTokenizerFast, Trainer

from loglinear.cli import main
from loglinear.cli.errors import parse
from loglinear.cli.train import TrainArgs
from loglinear.models import MIXERS, LogLinearConfig, LogLinearForCausalLM
from loglinear.models.causal import OutputLayer
from loglinear.tasks.lm.config import DataConfig
from loglinear.training.checkpoints import complete_checkpoints
from loglinear.training.config import Mixer, ModelConfig, OptimizerConfig, TrainConfig
from loglinear.training.model import build_model
from loglinear.training.trainer import LanguageModelTrainer, training_arguments


def record(run: Path) -> dict:
    return json.loads((run / "record.json").read_text())


def losses(run: Path) -> dict[int, float]:
    return {log["step"]: log["loss"] for log in record(run)["history"] if "loss" in log}


def tensorboard_losses(run: Path) -> dict[int, float]:
    logs = EventAccumulator(str(run / "tensorboard"))
    logs.Reload()
    events = logs.Scalars("train/loss")
    assert len(events) == len({event.step for event in events})
    return {event.step: event.value for event in events}


def assert_same_outcome(run: Path, expected: Path) -> None:
    """The same loss at every step, bit by bit, and the same weights."""
    assert losses(run) == losses(expected)
    assert record(run)["metrics"] == record(expected)["metrics"]
    weights, expected_weights = (load_file(folder / "model.safetensors") for folder in (run, expected))
    assert all(torch.equal(weights[name], value) for name, value in expected_weights.items())


def kill_after(output: Path, checkpoint: int, options: list[str]) -> None:
    """Start a run, wait until it has written ``checkpoint``, and take the process away from under it."""
    process = process_of(options)
    deadline = time.monotonic() + 120
    while not any(int(path.name.split("-")[1]) >= checkpoint for path in complete_checkpoints(output)):
        assert process.is_alive(), "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -9


@pytest.mark.default_packages
def test_a_run_killed_twice_ends_like_an_unbroken_one(train_options, tmp_path):
    # 60 steps of 4 sequences of 74: three epochs of 19 steps, and checkpoints inside and at the border of one.
    options = [*train_options, "--steps", "60", "--save-every", "3", "--evaluate-every", "30", "--accumulate", "2"]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert main([*options, "--output", str(unbroken)]) == 0
    kill_after(broken, 6, [*options, "--output", str(broken)])
    kill_after(broken, 30, [*options, "--output", str(broken)])
    assert record(broken)["status"] == "running"
    assert main([*options, "--output", str(broken)]) == 0
    assert_same_outcome(broken, unbroken)
    assert sorted(path.name for path in broken.glob("checkpoint-*")) == ["checkpoint-57", "checkpoint-60"]
    # One value for each step, although some steps were taken twice.
    assert tensorboard_losses(broken) == pytest.approx(losses(unbroken), rel=1e-6)


def damaged_copy(finished_run: Path, tmp_path: Path) -> Path:
    """The finished run as it was before its end: no final model, and the record not closed."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "model.safetensors").unlink()
    content = record(run)
    content["status"] = "running"
    (run / "record.json").write_text(json.dumps(content))
    return run


@pytest.mark.default_packages
def test_a_half_written_checkpoint_is_not_used(finished_run, finished_options, tmp_path, capsys):
    run = damaged_copy(finished_run, tmp_path)
    (run / "checkpoint-12" / "complete").unlink()
    (run / "checkpoint-12" / "optimizer.pt").write_bytes(b"half")
    assert main([*finished_options, "--output", str(run)]) == 0
    output = capsys.readouterr().out
    assert f"removed {run / 'checkpoint-12'}" in output
    assert f"going on from {run / 'checkpoint-8'}" in output
    assert_same_outcome(run, finished_run)


@pytest.mark.default_packages
def test_a_run_killed_after_its_last_checkpoint_only_ends(finished_run, finished_options, tmp_path, capsys):
    run = damaged_copy(finished_run, tmp_path)
    assert main([*finished_options, "--output", str(run)]) == 0
    assert "step 12/12  loss" not in capsys.readouterr().out
    assert_same_outcome(run, finished_run)


def test_a_complete_run_is_left_alone(finished_run, finished_options, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    assert main([*finished_options, "--output", str(finished_run)]) == 0
    assert "complete: nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before


def test_other_arguments_are_named(finished_run, finished_options, capsys):
    changed = [*finished_options, "--output", str(finished_run), "--learning-rate", "0.5", "--seed", "3"]
    assert main(changed) == 2
    error = capsys.readouterr().err
    for change in ("--learning-rate was 0.001 and is now 0.5", "--seed was 0 and is now 3"):
        assert change in error
    assert "batch-size" not in error


def test_other_text_behind_the_same_arguments_is_named(finished_run, finished_options, texts, tmp_path, capsys):
    run, moved = tmp_path / "run", tmp_path / "texts"
    shutil.copytree(finished_run, run)
    shutil.copytree(texts, moved)
    content = record(run)
    content["arguments"]["data"] = str(moved)
    (run / "record.json").write_text(json.dumps(content))
    options = [*finished_options, "--data", str(moved), "--output", str(run)]
    assert main(options) == 0
    (moved / "00.txt").write_text("another text " * 50)
    assert main(options) == 1
    assert "the text behind data" in capsys.readouterr().err


def test_checkpoints_without_a_record_are_not_overwritten(finished_run, finished_options, tmp_path, capsys):
    run = damaged_copy(finished_run, tmp_path)
    (run / "record.json").unlink()
    assert main([*finished_options, "--output", str(run)]) == 1
    assert "has checkpoints but no record.json" in capsys.readouterr().err


def test_the_record_says_what_ran(finished_run):
    content = record(finished_run)
    assert content["status"] == "complete"
    assert content["arguments"]["context"] == 32
    assert content["arguments"]["processes"] == 1
    assert content["versions"]["torch"] == torch.__version__
    data = content["data"]
    assert data["train"]["documents"] == 12
    assert data["validation"]["documents"] == 3
    for side in ("train", "validation"):
        assert data[side]["tokens"] == 32 * data[side]["sequences"] + data[side]["tail_tokens"]
    weights = load_file(finished_run / "model.safetensors")
    assert content["model"]["parameters"] == sum(weight.numel() for weight in weights.values())
    logs = [log for log in content["history"] if "loss" in log]
    assert all(log["tokens_per_second"] > 0 and log["memory_gib"] > 0 for log in logs)
    assert logs[0]["loss"] > logs[-1]["loss"]


def test_only_matrices_decay():
    config = LogLinearConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, mamba_head_dim=8, mamba_state_size=8, delta_num_heads=2,
        mixer=["log_linear_mamba2", "log_linear_gated_deltanet"],
    )  # fmt: skip
    model = LogLinearForCausalLM(config)
    decaying = set(LanguageModelTrainer.get_decay_parameter_names(None, model))
    others = {name.rpartition(".")[2] if "norm" not in name else "norm" for name, _ in model.named_parameters()}
    kept = {name for name, parameter in model.named_parameters() if name not in decaying}
    assert {name.rpartition(".")[2] for name in kept} >= {"A_log", "dt_bias", "D", "L"}
    assert not any(name.endswith((".L", ".A_log", ".dt_bias", ".D", ".bias")) or "norm" in name for name in decaying)
    assert {name for name in kept if name.endswith("proj.weight")} == set(), others
    assert "model.embed_tokens.weight" in decaying


def test_no_step_and_no_evaluation_makes_logits(train_options, tmp_path, monkeypatch):
    """The output layer is only ever asked for a loss, and the Trainer's count of operations is its own formula's."""
    asked, counted = [], []
    layer, count = OutputLayer.forward, LanguageModelTrainer.floating_point_ops
    monkeypatch.setattr(OutputLayer, "forward", lambda self, *x, **o: asked.append(len(x)) or layer(self, *x, **o))

    def floating_point_ops(self, inputs):
        counted.append((count(self, inputs), Trainer.floating_point_ops(self, inputs)))
        return counted[-1][0]

    monkeypatch.setattr(LanguageModelTrainer, "floating_point_ops", floating_point_ops)
    assert main([*train_options, "--output", str(tmp_path / "run"), "--steps", "2", "--evaluate-every", "1"]) == 0
    assert set(asked) == {2}  # hidden states and targets
    assert len(asked) > 4, "more than two steps and one batch to evaluate"
    assert [got for got, _ in counted] == [want for _, want in counted] != [0, 0]


@pytest.mark.slow
def test_two_processes_of_accelerate_take_the_steps_of_one_with_twice_the_batch(start, train_options, tmp_path):
    """`accelerate launch` is torchrun and more variables in the environment; tests/cli/test_fsdp.py has torchrun's alone."""
    options = [*train_options, "--steps", "6", "--save-every", "3"]
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    single, double = tmp_path / "single", tmp_path / "double"
    assert main([*options, "--batch-size", "4", "--output", str(single)]) == 0
    process = start(*launcher, "-m", "loglinear.cli", *options, "--fsdp", "--output", str(double))
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert losses(double) == pytest.approx(losses(single), rel=1e-4)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (double, single))
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-2, atol=1e-4)
    assert [path.name for path in complete_checkpoints(double)] == ["checkpoint-3", "checkpoint-6"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "./no/such/file.txt"], "--data: no file or folder './no/such/file.txt'"),
        (["--context", "100000"], "training data: --context must be at most"),
        (["--vocab-size", "10"], "--vocab-size must be at least 258"),
        (["--tokenizer", "./nowhere"], "--tokenizer: './nowhere' holds no tokenizer"),
        (["--fsdp"], "--fsdp: needs two or more processes (torchrun or accelerate launch): got 1;"),
    ],
)
def test_mistakes_are_named_in_one_line(options, message, train_options, tmp_path, capsys):
    assert main([*train_options, "--output", str(tmp_path / "run"), "--steps", "2", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("loglinear train: ")
    assert message in error
    assert "Traceback" not in error


def test_every_field_of_a_model_is_an_option():
    data = {"vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
    others = {"use_cache", "decoding_entry_dtype", "keys_to_ignore_at_inference"}
    # Of checkpoints that other libraries have trained: a converted folder has them, and a new run has the defaults.
    converted = {"mixer_norm_eps", "level_scale_bias"} | {
        f"mamba_{name}"
        for name in ("use_bias", "conv_bias", "norm", "norm_groups", "norm_before_gate", "dt_limit", "skip_per_channel")
    }
    converted |= {
        f"delta_{name}"
        for name in ("conv_bias", "gate_activation", "decay", "use_beta", "neg_eigval", "qk_activation", "qk_norm")
    }
    converted |= {
        f"kda_{name}" for name in ("conv_bias", "decay_rank", "gate_rank", "gate_bias", "decay_bound", "neg_eigval")
    }
    converted |= {
        f"{kind}_{name}" for kind in ("gla", "retnet") for name in ("conv_bias", "qk_activation", "gate_activation")
    }
    converted |= {"gla_decay_rank", "gla_decay_normalizer", "gla_decay_min"}
    assert {field.name for field in fields(ModelConfig)} | data | others | converted == set(
        LogLinearConfig.__annotations__
    )
    assert get_args(Mixer) == tuple(MIXERS)


def test_options_of_a_model_reach_it():
    options = {
        "mixer": "log_linear_gated_deltanet", "hidden_size": 32, "num_hidden_layers": 1, "conv_size": 3,
        "delta_num_heads": 4, "delta_num_key_heads": 2, "delta_key_dim": 8, "delta_value_dim": 16, "mamba_num_heads": 6,
        "mamba_num_groups": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "rope_theta": 100.0,
        "rms_norm_eps": 1e-5, "initializer_range": 0.01, "level_scale_start": "one",
        "level_scale_std": 0.006,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    config = parse(TrainArgs, ["--output", "run", *words], "loglinear train").model
    tokenizer = MagicMock(spec=PreTrainedTokenizerFast, pad_token_id=1, eos_token_id=0, bos_token_id=None)
    tokenizer.__len__.return_value = 20
    tokenizer.get_vocab.return_value = {str(i): i for i in range(20)}
    model = build_model(config, tokenizer, 64)
    assert {name: getattr(model.config, name) for name in options} == options
    mixer = model.model.layers[0].mixer
    assert mixer.conv_widths == [16, 16, 64], "q and k of 2 heads of 8, v of 4 of 16"
    assert build_model(ModelConfig(num_hidden_layers=1), tokenizer, 64).config.conv_size == 4, "left to LogLinearConfig"


def test_where_the_rate_ends_and_the_order_of_the_data_are_options(tmp_path):
    options = parse(TrainArgs, ["--output", str(tmp_path), "--final-rate", "0", "--data-seed", "7"], "loglinear train")
    assert options.arguments()["final_rate"] == 0
    arguments = training_arguments(options)
    assert arguments.lr_scheduler_kwargs == {"min_lr_rate": 0.0}
    assert (arguments.seed, arguments.data_seed) == (0, 7)
    plain = TrainConfig(tmp_path)
    assert training_arguments(plain).data_seed == 0
    assert not {"final_rate", "data_seed", "level_scale_std"} & plain.arguments().keys(), (
        "records of older runs lack them"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(final_rate=1.5), r"final_rate must be in \[0, 1\], a share of learning_rate: got 1.5"),
        (lambda: TrainConfig(Path("run"), save_every=5, log_every=2), "save_every must be a multiple .* got 5 and 2"),
        (lambda: TrainConfig(Path("run"), log_every=0), "log_every must be at least 1: got 0"),
        (lambda: TrainConfig(Path("run"), seed=-1), "seed must be at least 0: got -1"),
        (lambda: OptimizerConfig(warmup=2), r"warmup must be in \[0, 1\), a share of the steps: got 2"),
        (lambda: OptimizerConfig(steps=0), "steps must be at least 1: got 0"),
        (lambda: DataConfig(validation_fraction=1), r"validation_fraction must be in \[0, 1\): got 1"),
        (lambda: DataConfig(context=1), "context must be at least 2 tokens.* got 1"),
    ],
)
def test_options_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
