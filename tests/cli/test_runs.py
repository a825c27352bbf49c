"""Runs that go on: from another checkpoint's weights, with more steps, from a file, after SIGTERM or a full disk."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from ranks import process_of, run_ranks
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import Trainer

from loglinear.cli import main
from loglinear.models import LogLinearForCausalLM
from loglinear.tasks.lm.atomic import atomic_folder, write_atomically
from loglinear.tasks.lm.tokenizer import load_tokenizer
from loglinear.training.checkpoints import checkpoint_step, complete_checkpoints
from loglinear.training.disk import writing_to

DELTA = ["--mixer", "log_linear_gated_deltanet", "--delta-num-heads", "2"]


def record(run: Path) -> dict:
    return json.loads((run / "record.json").read_text())


def logs(run: Path, name: str) -> dict[int, float]:
    return {log["step"]: log[name] for log in record(run)["history"] if name in log}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def value_of(options: list[str], name: str) -> str:
    return options[options.index(name) + 1]


@pytest.fixture
def data_options(texts, train_options) -> list[str]:
    """What `train` needs beside a checkpoint: no option of the model, and of the tokenizer none."""
    return ["train", "--data", str(texts), "--cache", value_of(train_options, "--cache"), "--validation-fraction", "0.2",
            "--context", "32", "--batch-size", "2", "--log-every", "1"]  # fmt: skip


@pytest.fixture
def run_of_twelve(finished_run, tmp_path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


# --------------------------------------------------------------------------------------------- from a checkpoint: --init


@pytest.mark.parametrize(
    "part", ["", *(pytest.param(part, marks=pytest.mark.default_packages) for part in ("checkpoint-8", "saved"))]
)
def test_a_new_run_starts_from_the_weights_of_any_of_our_checkpoints(
    part, finished_run, data_options, tmp_path, capsys
):
    source, options = finished_run / part, [*data_options, "--steps", "1", "--learning-rate", "1e-9"]
    if part == "saved":  # by itself, in bfloat16, its tokenizer elsewhere
        source = tmp_path / "saved"
        LogLinearForCausalLM.from_pretrained(finished_run).bfloat16().save_pretrained(source)
        assert main([*options, "--init", str(source), "--output", str(tmp_path / "run")]) == 2
        assert "--tokenizer: needed, because" in capsys.readouterr().err
        load_tokenizer(str(finished_run)).save_pretrained(tmp_path / "tokenizer")
        options += ["--tokenizer", str(tmp_path / "tokenizer")]
    run = tmp_path / "run"
    assert main([*options, "--init", str(source), "--output", str(run)]) == 0
    assert f"new run with the weights of {source}" in capsys.readouterr().out
    begun, ended = weights(source), weights(run)
    assert ended.keys() == begun.keys()
    for name, value in begun.items():
        torch.testing.assert_close(ended[name], value.float(), rtol=0, atol=1e-7)
        assert ended[name].dtype == torch.float32
    content = record(run)
    assert content["arguments"]["init"] == str(source)
    assert content["init"]["checkpoint"] == str(source)
    assert content["arguments"]["mamba_head_dim"] == 8
    assert content["data"]["tokenizer_hash"] == record(finished_run)["data"]["tokenizer_hash"]
    assert list(logs(run, "loss")) == [1], "a schedule of its own"


@pytest.mark.default_packages
def test_a_run_from_a_checkpoint_goes_on_like_any_other(finished_run, data_options, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("beta gamma minus equals ( ) " * 200)
    options = [*data_options, "--data", str(other), "--init", str(finished_run), "--save-every", "2", "--steps", "6"]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert main([*options, "--output", str(unbroken)]) == 0
    shutil.copytree(unbroken, broken)
    shutil.rmtree(broken / "checkpoint-6")
    (broken / "record.json").write_text(json.dumps({**record(broken), "status": "running"}))
    assert main(["train", "--resume", str(broken)]) == 0
    assert f"going on from {broken / 'checkpoint-4'}" in capsys.readouterr().out
    assert logs(broken, "loss") == logs(unbroken, "loss")
    assert record(broken)["init"] == record(unbroken)["init"]
    assert all(torch.equal(value, weights(unbroken)[name]) for name, value in weights(broken).items())


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--hidden-size", "32"], 2, "--hidden-size must be 16, as the model of --init={run} has it: got 32"),
        (
            ["--mixer", "mamba2"],
            2,
            "--mixer must be log_linear_mamba2, as the model of --init={run} has it: got mamba2",
        ),
        (["--vocab-size", "400"], 2, "--vocab-size must be 295, as the model of --init={run} has it: got 400"),
        (["--tokenizer", "{other}"], 2, "--tokenizer must be that of --init={run}: got '{other}', another one"),
        (["--init", "{folder}"], 1, "--init: {folder} holds no model (config.json) and no complete checkpoint"),
        (["--init", "{other}"], 1, "--init: {other} holds a model of type 'vit': needs a causal language model"),
    ],
)
def test_what_contradicts_the_checkpoint_is_named(
    options, status, message, finished_run, data_options, tmp_path, capsys
):
    places = {"run": finished_run, "folder": tmp_path, "other": tmp_path / "other"}
    shutil.copytree(finished_run, places["other"], ignore=shutil.ignore_patterns("checkpoint-*"))
    (places["other"] / "config.json").write_text('{"model_type": "vit"}')
    spelling = (places["other"] / "tokenizer.json").read_text()
    (places["other"] / "tokenizer.json").write_text(spelling.replace('"ignore_merges": false', '"ignore_merges": true'))
    options = [option.format(**places) for option in options]
    command = [*data_options, "--init", str(finished_run), "--output", str(tmp_path / "run"), "--steps", "1", *options]
    assert main(command) == status
    assert capsys.readouterr().err == f"loglinear train: {message.format(**places)}\n"


@pytest.mark.default_packages
def test_a_linear_run_goes_on_log_linear(train_options, data_options, tmp_path):
    """--lift: the weights of the linear run, λ beside them, and from the first step on another model."""
    linear, lifted, plain = (tmp_path / name for name in ("linear", "lifted", "plain"))
    assert (
        main([*train_options, "--mixer", "mamba2", "--steps", "4", "--save-every", "4", "--output", str(linear)]) == 0
    )
    start = [*data_options, "--init", str(linear), "--steps", "2", "--save-every", "2"]
    assert main([*start, "--lift", "--output", str(lifted)]) == 0
    assert main([*start, "--output", str(plain)]) == 0
    model = LogLinearForCausalLM.from_pretrained(lifted)
    assert (model.config.mixer, model.config.level_scale_start) == ("log_linear_mamba2", "one")
    assert weights(lifted).keys() - weights(plain).keys() == {
        f"model.layers.0.mixer.level_scale.{name}" for name in ("L", "dl_proj.weight")
    }
    first, second = (logs(run, "loss") for run in (lifted, plain))
    assert first[1] == pytest.approx(second[1], abs=1e-6)  # the same model, and the same batch
    assert not torch.equal(weights(lifted)["model.embed_tokens.weight"], weights(plain)["model.embed_tokens.weight"])
    assert record(lifted)["arguments"]["lift"] is True
    assert "lift" not in record(plain)["arguments"]
    assert main(["train", "--resume", str(lifted), "--steps", "3"]) == 0  # its own checkpoint is log-linear already
    assert list(logs(lifted, "loss")) == [1, 2, 3]


def test_lift_needs_a_linear_model(data_options, finished_run, tmp_path, capsys):
    start = [*data_options, "--lift", "--steps", "1", "--output", str(tmp_path / "run")]
    assert main(start) == 2
    assert "--lift: needs --init" in capsys.readouterr().err
    assert main([*start, "--init", str(finished_run)]) == 2
    assert "--lift: model must have a linear mixer" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- the same run: --steps, --resume


@pytest.mark.default_packages
def test_a_finished_run_takes_more_steps(run_of_twelve, finished_options, tmp_path, capsys):
    """They are those of a run that was planned as long, from the step on at which it was given them."""
    planned = tmp_path / "planned"
    more = [*finished_options, "--steps", "20"]
    assert main([*more, "--output", str(planned)]) == 0
    assert main([*more, "--output", str(run_of_twelve)]) == 0
    output = capsys.readouterr().out
    assert f"going on from {run_of_twelve / 'checkpoint-12'}" in output
    assert "steps: 12 become 20" in output
    assert list(logs(run_of_twelve, "loss")) == list(range(1, 21))
    rates, expected = logs(run_of_twelve, "learning_rate"), logs(planned, "learning_rate")
    assert {step: rates[step] for step in range(13, 21)} == {step: expected[step] for step in range(13, 21)}
    assert rates[12] != expected[12]
    content = record(run_of_twelve)
    assert content["status"] == "complete"
    assert content["arguments"]["steps"] == 20
    assert content["extended"] == [{"at_step": 12, "steps": 12, "new_steps": 20}]
    assert len(list((run_of_twelve / "tensorboard").iterdir())) == 2
    assert LogLinearForCausalLM.from_pretrained(run_of_twelve)

    # The command of the shorter run is another run now.
    assert main([*finished_options, "--output", str(run_of_twelve)]) == 2
    assert "--steps was 20 and is now 12, and a run may be given more steps but not fewer" in capsys.readouterr().err


def test_more_steps_need_a_checkpoint(run_of_twelve, finished_options, capsys):
    for checkpoint in complete_checkpoints(run_of_twelve):
        shutil.rmtree(checkpoint)
    assert main([*finished_options, "--output", str(run_of_twelve)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*finished_options, "--output", str(run_of_twelve), "--steps", "20"]) == 2
    assert f"--steps: {run_of_twelve} has no checkpoint left to go on from after step 12" in capsys.readouterr().err


def test_resume_takes_everything_from_the_record(run_of_twelve, finished_run, texts, monkeypatch, capsys):
    shutil.rmtree(run_of_twelve / "checkpoint-12")
    (run_of_twelve / "record.json").write_text(json.dumps({**record(run_of_twelve), "status": "running"}))
    intervals = ["--log-every", "2", "--save-every", "2", "--evaluate-every", "3"]
    assert main(["train", "--resume", str(run_of_twelve), *intervals]) == 0
    assert f"going on from {run_of_twelve / 'checkpoint-8'}" in capsys.readouterr().out
    # Nothing that is computed depends on how often it is told of.
    assert all(torch.equal(value, weights(finished_run)[name]) for name, value in weights(run_of_twelve).items())
    assert list(logs(run_of_twelve, "loss")) == [*range(1, 9), 10, 12]
    assert list(logs(run_of_twelve, "eval_loss")) == [6, 9, 12]
    assert [checkpoint_step(path) for path in complete_checkpoints(run_of_twelve)] == [10, 12]

    assert main(["train", "--resume", str(run_of_twelve), "--steps", "14"]) == 0
    assert list(logs(run_of_twelve, "loss"))[-2:] == [12, 14]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--resume", "{run}", "--learning-rate", "0.5"], 2, "--learning-rate was 0.001 and is now 0.5"),
        (["--resume", "{run}", "--batch-size", "4"], 2, "accumulate x processes was 2 and is now 4"),
        (["--resume", "{run}", "--steps", "4"], 2, "--steps was 12 and is now 4, and a run may be given more"),
        (["--resume", "{run}", "--output", "{run}"], 2, "--output: not beside --resume"),
        (["--resume", "{run}", "--config", "x"], 2, "--config: not beside --resume"),
        (["--resume", "{run}/checkpoint-8"], 2, "--resume: {run}/checkpoint-8 holds no record.json"),
        (["--resume"], 2, "argument --resume: expected one argument"),
    ],
)
def test_what_resume_cannot_do_is_named(options, status, message, finished_run, capsys):
    assert main(["train", *(option.format(run=finished_run) for option in options)]) == status
    error = capsys.readouterr().err
    assert message.format(run=finished_run) in error
    assert error.count("\n") == 1


def test_the_optimizer_of_another_model_is_refused(run_of_twelve, finished_options, capsys):
    """Its states would be taken for those of other parameters, of other shapes, and written beyond their ends."""
    shutil.rmtree(run_of_twelve / "checkpoint-12")
    (run_of_twelve / "record.json").write_text(json.dumps({**record(run_of_twelve), "status": "running"}))
    path = run_of_twelve / "checkpoint-8" / "optimizer.pt"
    saved = torch.load(path)
    saved["state"][0], saved["state"][1] = saved["state"][1], saved["state"][0]
    torch.save(saved, path)
    assert main([*finished_options, "--output", str(run_of_twelve)]) == 1
    assert "checkpoint-8: exp_avg of its optimizer is of another model: needs shape" in capsys.readouterr().err


@pytest.mark.default_packages
def test_a_run_that_never_saved_a_checkpoint_does_not_block_its_folder(train_options, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    options = [*train_options, "--steps", "2", "--output", str(run)]

    def fail(self, *args, **kwargs):
        (run / "checkpoint-1").mkdir()
        (run / "record.json.tmp").write_text("{")
        raise OSError("no step")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", fail)
        assert main(options) == 1
    assert record(run)["status"] == "running"
    assert main([*options, "--learning-rate", "0.5", *DELTA]) == 0
    assert record(run)["arguments"]["learning_rate"] == 0.5
    assert "new run" in capsys.readouterr().out
    # It has a model now.
    assert main(options) == 2
    assert "records another run" in capsys.readouterr().err


def test_a_model_of_which_no_record_tells_is_not_overwritten(finished_run, train_options, tmp_path, capsys):
    LogLinearForCausalLM.from_pretrained(finished_run).save_pretrained(tmp_path / "model")
    assert main([*train_options, "--steps", "2", "--output", str(tmp_path / "model")]) == 1
    assert "has a model but no record.json; choose another folder" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- files: --config


@pytest.mark.default_packages
def test_the_file_beside_a_run_repeats_it(finished_run, tmp_path, capsys):
    file, run = finished_run / "config.yaml", tmp_path / "run"
    options = yaml.safe_load(file.read_text())
    assert options["steps"] == 12
    assert options["mixer"] == ["log_linear_mamba2"]
    assert main(["train", "--config", str(file), "--output", str(run)]) == 0
    assert all(torch.equal(value, weights(finished_run)[name]) for name, value in weights(run).items())
    assert (run / "config.yaml").read_text() == file.read_text()
    # What is typed takes the place of what the file says.
    capsys.readouterr()
    assert main(["train", "--config", str(file), "--output", str(run), "--seed=4", "--no-tie-word-embeddings"]) == 2
    error = capsys.readouterr().err
    assert "--seed was 0 and is now 4" in error
    assert "--tie-word-embeddings was True and is now False" in error


@pytest.mark.default_packages
def test_a_file_by_hand(texts, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"output: {tmp_path / 'run'}\ndata: [{texts / '00.txt'}, {texts / '01.txt'}]\ncache: {tmp_path}\n"
        "mixer: gated_deltanet\nhidden_size: 16\nnum_hidden_layers: 1\ndelta_num_heads: 2\nvocab_size: 300\n"
        "validation_data: null\nbetas: [0.5, 0.9]\nlearning_rate: 1e-3\ntie_word_embeddings: false\nclip: .inf\n"
        "context: 32\nvalidation_fraction: 0.3\nsteps: 4\nlog_every: 1\nbatch_size: 2\n"
    )
    assert main(["train", "--config", str(file), "--steps", "2"]) == 0
    arguments = record(tmp_path / "run")["arguments"]
    assert arguments["data"] == [str(texts / "00.txt"), str(texts / "01.txt")]
    assert (arguments["mixer"], arguments["betas"]) == (["gated_deltanet"], [0.5, 0.9])
    assert (arguments["learning_rate"], arguments["clip"], arguments["steps"]) == (1e-3, float("inf"), 2)
    assert arguments["tie_word_embeddings"] is False


@pytest.mark.default_packages
@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("batch-size: 2", 2, "{file}: no option is called 'batch-size'; did you mean 'batch_size'?"),
        ("optimizer: {{steps: 2}}", 2, "{file}: no option is called 'optimizer'"),
        ("steps: many", 2, "--steps: invalid literal for int() with base 10: 'many' (in {file})"),
        ("steps: 0", 2, "--steps must be at least 1: got 0 (in {file})"),
        ("fsdp: 3", 2, "--fsdp must be true or false: got 3 (in {file})"),
        ("steps: {{a: 2}}", 2, "--steps must be one value or a list: got {{'a': 2}} (in {file})"),
        ("just words", 2, "--config: {file} must hold lines of the form option: value"),
        ("steps: [2", 2, "--config: {file} is no YAML: .*"),
        (None, 1, "[Errno 2] No such file or directory: '{file}'"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(text, status, message, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text.format())
    assert main(["train", "--config", str(file), "--output", str(tmp_path / "run")]) == status
    error = capsys.readouterr().err
    assert error.startswith(f"loglinear train: {message.format(file=file).removesuffix('.*')}")
    assert error.count("\n") == 1


# --------------------------------------------------------------------------------------------------------------- SIGTERM


@pytest.mark.default_packages
def test_sigterm_saves_a_checkpoint(train_options, tmp_path):
    """At the end of its step, far from the next interval and the end; what follows repeats nothing."""
    options = [*train_options, "--steps", "50", "--save-every", "50", "--evaluate-every", "50"]
    run, unbroken, printed = (tmp_path / name for name in ("run", "unbroken", "printed"))
    process = process_of([*options, "--output", str(run)], printed)
    while not (printed.exists() and "\nstep 3/50" in printed.read_text()):
        assert process.is_alive(), "the run ended by itself"
        time.sleep(0.01)
    process.terminate()
    process.join(120)
    output = printed.read_text()
    assert process.exitcode == 143, output
    (checkpoint,) = complete_checkpoints(run)
    step = checkpoint_step(checkpoint)
    assert 3 <= step < 50
    assert f"stopped by SIGTERM after step {step}, which is saved" in output
    assert output.endswith("loglinear train: terminated\n")
    assert record(run)["status"] == "running"

    assert main(["train", "--resume", str(run)]) == 0
    assert main([*options, "--output", str(unbroken)]) == 0
    assert logs(run, "loss") == logs(unbroken, "loss")
    assert all(torch.equal(value, weights(unbroken)[name]) for name, value in weights(run).items())


def terminated_rank(options: list[str]) -> None:
    """A process of two, of which the second alone gets the signal, in the first step."""
    own, train = Trainer.training_step, []

    def training_step(self, *args, **kwargs):
        if os.environ["RANK"] == "1" and not train:
            train.append(1)
            signal.raise_signal(signal.SIGTERM)
        return own(self, *args, **kwargs)

    Trainer.training_step = training_step  # type: ignore[method-assign]
    assert main(options) == 143


@pytest.mark.default_packages
@pytest.mark.parametrize("more", [[], ["--fsdp"]], ids=["replicated", "sharded"])
def test_sigterm_to_one_process_ends_all(more, train_options, tmp_path):
    run = tmp_path / "run"
    run_ranks(terminated_rank, 2, [*train_options, *more, "--steps", "9", "--output", str(run)])
    assert [checkpoint_step(path) for path in complete_checkpoints(run)] == [1]


def killed_rank(options: list[str]) -> None:
    """A process of four, of which the third is killed in the second step."""
    own, train = Trainer.training_step, []

    def training_step(self, *args, **kwargs):
        train.append(1)
        if os.environ["RANK"] == "2" and len(train) == 2:
            signal.raise_signal(signal.SIGKILL)
        return own(self, *args, **kwargs)

    Trainer.training_step = training_step  # type: ignore[method-assign]
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        assert main(options) == 1
    line = printed.getvalue().splitlines()[-1]
    assert line.startswith("loglinear train: another process of this run has ended")
    assert "goes on from checkpoint-1 in" in line


@pytest.mark.default_packages
def test_a_killed_process_ends_all_with_a_line_and_fewer_go_on(train_options, tmp_path):
    run = tmp_path / "run"
    options = [*train_options, "--context", "128", "--steps", "3", "--save-every", "1", "--output", str(run)]
    run_ranks(killed_rank, 4, [*options, "--batch-size", "1", "--fsdp", "--context-parallel", "2"], killed=2)
    assert [checkpoint_step(path) for path in complete_checkpoints(run)] == [1]
    assert main([*options, "--batch-size", "2"]) == 0


# ------------------------------------------------------------------------------------------------------------- full disk


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Files grow no further, as on a full disk: writing the next byte fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save(torch.zeros(10_000), path),
        lambda path: save_file({"zeros": torch.zeros(10_000)}, path),
        lambda path: Tokenizer(models.BPE({str(i): i for i in range(1000)}, [])).save(str(path)),
        lambda path: path.write_bytes(b"0" * 10_000),
    ],
    ids=["torch", "safetensors", "tokenizers", "Python"],
)
def test_a_full_disk_is_known_in_the_words_of_every_library(write, tmp_path):
    wanted = f"output: a file in {tmp_path} could not be written: (File too large|the disk may be full .*)"
    with pytest.raises(OSError, match=wanted), writing_to(tmp_path), files_up_to(500):
        write(tmp_path / "file")


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA"), FileNotFoundError(2, "No such", "x"), BrokenPipeError(32, "x")]
)
def test_other_errors_stay(error, tmp_path):
    with pytest.raises(type(error)) as raised, writing_to(tmp_path):
        raise error
    assert raised.value is error


def fill_folder(folder: Path) -> None:
    with atomic_folder(folder) as unfinished:
        (unfinished / "part").write_bytes(b"0" * 10_000)


@pytest.mark.default_packages
@pytest.mark.parametrize(
    "write", [lambda path: write_atomically(path, "0" * 10_000), fill_folder], ids=["file", "folder"]
)
def test_what_a_full_disk_stops_is_named_and_not_there(write, tmp_path):
    with pytest.raises(OSError, match=f"File too large: '{tmp_path / 'wanted'}'"), files_up_to(500):
        write(tmp_path / "wanted")
    assert not (tmp_path / "wanted").exists()


def test_a_file_that_torch_cut_off_is_not_taken_for_a_checkpoint(train_options, tmp_path, monkeypatch, capsys):
    own, run = Trainer._save_checkpoint, tmp_path / "run"

    def save(self, *args, **kwargs):
        own(self, *args, **kwargs)
        os.truncate(run / "checkpoint-2" / "optimizer.pt", 3000)

    monkeypatch.setattr(Trainer, "_save_checkpoint", save)
    assert main([*train_options, "--steps", "2", "--output", str(run)]) == 1
    assert "optimizer.pt was not written whole; the disk may be full" in capsys.readouterr().err
    assert complete_checkpoints(run) == []


def test_damaged_weights_are_named(run_of_twelve, data_options, tmp_path, capsys):
    os.truncate(run_of_twelve / "model.safetensors", 3000)
    for command in (["evaluate", str(run_of_twelve)], [*data_options, "--init", str(run_of_twelve), "--output", "x"]):
        assert main(command) == 1
        assert f"{run_of_twelve} holds weights that cannot be read" in capsys.readouterr().err


@pytest.mark.default_packages
@pytest.mark.parametrize("what", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_full_disk_is_one_line(what, run_of_twelve, finished_options, finished_run, monkeypatch, capsys):
    """Real writes that fail: the kernel refuses to let the file grow, as a full disk does."""
    shutil.rmtree(run_of_twelve / "checkpoint-12")
    (run_of_twelve / "record.json").write_text(json.dumps({**record(run_of_twelve), "status": "running"}))
    limit, own = (finished_run / "checkpoint-12" / what).stat().st_size - 100, Trainer._save_checkpoint

    def save(self, *args, **kwargs):
        with files_up_to(limit):
            own(self, *args, **kwargs)

    options = [*finished_options, "--output", str(run_of_twelve)]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", save)
        assert main(options) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"loglinear train: --output: a file in {run_of_twelve} could not be written: ")
    assert error.count("\n") == 1
    assert complete_checkpoints(run_of_twelve) == [run_of_twelve / "checkpoint-8"]
    assert main(options) == 0
    assert all(torch.equal(value, weights(finished_run)[name]) for name, value in weights(run_of_twelve).items())
