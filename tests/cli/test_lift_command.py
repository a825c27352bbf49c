"""`loglinear lift`, and the commands that take what it writes: runs of ours and models of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BambaConfig, BambaForCausalLM

import loglinear
from loglinear.cli import main
from loglinear.models.levels import level_parameters
from loglinear.tasks.lm.tokenizer import load_tokenizer


def record(run: Path) -> dict:
    return json.loads((run / "record.json").read_text())


def losses(run: Path) -> dict[int, float]:
    return {log["step"]: log["loss"] for log in record(run)["history"] if "loss" in log}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def cache(train_options) -> list[str]:
    return ["--cache", train_options[train_options.index("--cache") + 1]]


@pytest.fixture(scope="module")
def text(texts, cache) -> list[str]:
    """What `train` needs beside a model."""
    return ["train", "--data", str(texts), *cache, "--validation-fraction", "0.2", "--context", "32", "--batch-size", "2",
            "--log-every", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def linear_run(train_options, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("linear") / "run"
    assert main([*train_options, "--mixer", "mamba2", "--steps", "2", "--output", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def bamba(finished_run, tmp_path_factory) -> Path:
    """A folder as of the hub: a tiny hybrid model of transformers in bfloat16, and the tokenizer of our finished run."""
    folder = tmp_path_factory.mktemp("bamba") / "model"
    torch.manual_seed(0)
    config = BambaConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=2, attn_layer_indices=[1], intermediate_size=32,
        num_attention_heads=2, num_key_value_heads=2, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
        mamba_chunk_size=16, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    BambaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(str(finished_run)).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(folder: Path, **options) -> torch.Tensor:
    ids = torch.arange(60).view(2, 30) + 3
    return AutoModelForCausalLM.from_pretrained(folder, **options)(ids, use_cache=False).logits


def test_a_run_of_ours(linear_run, cache, tmp_path, capsys):
    """Lifted, it is evaluated, trained and written by like any other run, on the text of its record."""
    lifted = tmp_path / "lifted"
    assert main(["lift", str(linear_run), "--output", str(lifted)]) == 0
    printed = capsys.readouterr().out
    assert "1 layers lifted, 408 parameters added (" in printed
    torch.testing.assert_close(logits(lifted), logits(linear_run), rtol=1e-5, atol=1e-6)
    content = record(lifted)
    assert content["arguments"] == record(linear_run)["arguments"]
    assert content["lift"]["layers"] == ["model.layers.0.mixer"]
    assert content["lift"]["added"] == 408
    assert "metrics" not in content
    for run in (linear_run, lifted):
        assert main(["evaluate", str(run), "--output", str(tmp_path / run.name), *cache]) == 0
    one, other = (
        json.loads((tmp_path / run.name / "loss_by_position.json").read_text())["loss"] for run in (linear_run, lifted)
    )
    assert one == pytest.approx(other, abs=1e-5)
    assert main(["generate", str(lifted), "--prompt", "alpha", "--max-new-tokens", "3"]) == 0
    assert main(["lift", str(linear_run), "--output", str(lifted)]) == 1
    assert f"--output: {lifted} is not empty; choose another folder" in capsys.readouterr().err
    assert main(["lift", str(lifted), "--output", str(tmp_path / "again")]) == 2
    assert "model must have a linear mixer" in capsys.readouterr().err


@pytest.mark.default_packages
def test_levels_alone_go_from_a_run_to_its_base(linear_run, text, tmp_path, capsys):
    """Trained alone, taken out of the run, and put on the base again: the model of the run, to the bit."""
    run, levels, again = (tmp_path / name for name in ("run", "levels", "again"))
    options = [
        *text,
        "--init",
        str(linear_run),
        "--lift",
        "--train",
        "levels",
        "--steps",
        "3",
        "--learning-rate",
        "0.1",
    ]
    assert main([*options, "--output", str(run)]) == 0
    assert ", of which 408 are trained; new run" in capsys.readouterr().out
    before, after = weights(linear_run), weights(run)
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert all(after[name].ne(0).any() for name in after.keys() - before.keys())
    assert record(run)["arguments"]["train"] == "levels"
    assert main(["lift", str(run), "--levels-only", "--output", str(levels)]) == 0
    assert [path.name for path in levels.iterdir()] == ["levels.safetensors"]
    put_on = ["lift", str(linear_run), "--levels", str(levels / "levels.safetensors")]
    assert main([*put_on, "--output", str(again)]) == 0
    assert all(torch.equal(x, after[name]) for name, x in weights(again).items())
    assert main([*put_on, "--num-levels", "3", "--output", str(tmp_path / "x")]) == 2
    assert "--num-levels must be left out with levels" in capsys.readouterr().err

    assert main(["train", "--resume", str(run), "--steps", "4"]) == 0  # goes on with the levels alone
    assert all(torch.equal(weights(run)[name], x) for name, x in before.items())
    assert not torch.equal(
        weights(run)["model.layers.0.mixer.level_scale.L"], after["model.layers.0.mixer.level_scale.L"]
    )


def test_levels_alone_need_levels(linear_run, text, train_options, tmp_path, capsys):
    output = ["--train", "levels", "--steps", "1", "--output", str(tmp_path / "run")]
    assert main([*train_options, *output]) == 2
    assert "--train: levels needs --init" in capsys.readouterr().err
    assert main([*text, "--init", str(linear_run), *output]) == 2
    assert "--train: levels needs a log-linear model or --lift" in capsys.readouterr().err


def test_a_model_of_transformers_through_every_command(bamba, texts, text, cache, tmp_path, capsys):
    """lift, train, evaluate, niah, generate: with the tokenizer of its folder."""
    lifted, run = (tmp_path / name for name in ("lifted", "run"))
    assert main(["lift", str(bamba), "--num-levels", "6", "--output", str(lifted), "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert "1 layers lifted, 408 parameters added (" in printed
    assert "model.layers.1.self_attn left: BambaAttention is no linear mixer" in printed
    assert not (lifted / "record.json").exists()
    torch.testing.assert_close(logits(lifted), logits(bamba, dtype=torch.float32), rtol=1e-5, atol=1e-5)

    train = [*text, "--init", str(lifted), "--steps", "4", "--save-every", "2", "--learning-rate", "0.01"]
    assert main([*train, "--output", str(run)]) == 0
    assert losses(run)[4] < losses(run)[1]
    arguments = record(run)["arguments"]
    assert arguments["init"] == str(lifted)
    assert not {"mixer", "hidden_size", "vocab_size"} & {*arguments, *yaml.safe_load((run / "config.yaml").read_text())}
    trained = AutoModelForCausalLM.from_pretrained(run)
    assert isinstance(trained, BambaForCausalLM)
    assert all(x.ne(0).any() for x in level_parameters(trained).values())
    assert record(run)["metrics"]["validation_loss"] > 0

    assert main(["evaluate", str(run), "--measures", "levels", "repeats", *cache]) == 0
    evaluated = json.loads((run / "evaluation" / "loss_by_position.json").read_text())
    assert evaluated["loss"] == pytest.approx(record(run)["metrics"]["validation_loss"], rel=1e-5)
    levels = json.loads((run / "evaluation" / "levels.json").read_text())["rows"]
    assert [row["layer"] for row in levels] == ["model.layers.0.mamba.level_scale"]
    grid = ["--contexts", "128", "--depths", "2", "--samples", "1", "--kinds", "word", *cache]
    assert main(["niah", "evaluate", str(run), *grid]) == 0
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "alpha beta", "--max-new-tokens", "4", "--temperature", "0"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("alpha beta")
    assert "recurrent state " in printed.err
    assert "KV cache " in printed.err

    assert main(["train", "--resume", str(run), "--steps", "5"]) == 0
    assert list(losses(run)) == [1, 2, 3, 4, 5]
    assert (
        main(["train", "--config", str(run / "config.yaml"), "--output", str(tmp_path / "same"), "--steps", "4"]) == 0
    )
    assert list(losses(tmp_path / "same").values()) == list(losses(run).values())[:4]


def test_train_lifts_a_model_of_transformers(bamba, text, tmp_path):
    """--lift on the way, and its levels alone: the other weights stay, and come back from bfloat16 as they were."""
    run = tmp_path / "run"
    options = ["--lift", "--train", "levels", "--steps", "2", "--learning-rate", "0.1", "--activation-checkpointing"]
    assert main([*text, "--init", str(bamba), *options, "--output", str(run)]) == 0
    before, after = weights(bamba), weights(run)
    assert all(torch.equal(after[name], x.float()) for name, x in before.items())
    assert after["model.layers.0.mamba.level_scale.dl_proj.weight"].ne(0).any()
    loglinear.save_levels(AutoModelForCausalLM.from_pretrained(run), tmp_path / "levels")
    base = AutoModelForCausalLM.from_pretrained(bamba, dtype=torch.float32)
    assert len(loglinear.load_levels(base, tmp_path / "levels").lifted) == 1


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--mixer", "mamba2"], 2, "--mixer must be left out: the model of --init={bamba} is of type 'bamba'"),
        (["--vocab-size", "400"], 2, "--vocab-size must be left out: the model of --init={bamba} is of type 'bamba'"),
        (["--init", "{bare}"], 2, "--tokenizer: needed, because {bare} (init) holds none"),
        (["--init", "{encoder}"], 1, "--init: {encoder} holds a model of type 'vit': needs a causal language model"),
        (["--lift", "--init", "{llama}"], 2, "--lift: model must have a linear mixer"),
    ],
)
def test_what_contradicts_a_model_of_transformers(options, status, message, bamba, text, tmp_path, capsys):
    places = {"bamba": bamba, "bare": tmp_path / "bare", "encoder": tmp_path / "encoder", "llama": tmp_path / "llama"}
    for name in ("bare", "encoder", "llama"):
        shutil.copytree(bamba, places[name])
    for path in places["bare"].glob("tokenizer*"):
        path.unlink()
    (places["encoder"] / "config.json").write_text('{"model_type": "vit"}')
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 320,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(places["llama"])
    options = [option.format(**places) for option in options]
    command = [*text, "--init", str(bamba), "--output", str(tmp_path / "run"), "--steps", "1", *options]
    assert main(command) == status
    assert f"loglinear train: {message.format(**places)}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "status", "message"),
    [
        ("{encoder}", 1, "model: {encoder} holds one of type 'vit': needs a causal language model"),
        ("{empty}", 1, "model: {empty} holds no model (config.json) and no complete checkpoint"),
    ],
)
def test_what_cannot_be_lifted_is_named(model, status, message, tmp_path, capsys):
    places = {"encoder": tmp_path / "encoder", "empty": tmp_path / "empty"}
    for place in places.values():
        place.mkdir()
    (places["encoder"] / "config.json").write_text('{"model_type": "vit"}')
    assert main(["lift", model.format(**places), "--output", str(tmp_path / "out")]) == status
    assert capsys.readouterr().err == f"loglinear lift: {message.format(**places)}\n"
    assert not (tmp_path / "out").exists()
