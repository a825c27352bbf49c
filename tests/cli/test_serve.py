"""`loglinear serve`: OpenAI-style requests to a checkpoint over loopback, several open at a time."""

from __future__ import annotations

import importlib.util
import re
import signal

import pytest
import torch

from loglinear.cli import main
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.tasks.lm.tokenizer import train_tokenizer

pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")),
        reason="needs pip install '.[serve]'",
    ),
    pytest.mark.timeout(90),
]

PROMPTS = ["alpha beta", "def gamma(delta):\n", "gamma"]
NEW_TOKENS = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(folder, model, tokenizer): random weights, whose text is 40 tokens of ASCII, so that bytes and characters agree."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer(["alpha beta gamma delta def return " * 20], 300)
    torch.manual_seed(0)
    config = LogLinearConfig(
        mixer=["log_linear_mamba2", "log_linear_gated_deltanet"],
        vocab_size=len(tokenizer),
        hidden_size=24,
        num_hidden_layers=2,
        mamba_head_dim=12,
        mamba_state_size=6,
        delta_num_heads=2,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LogLinearForCausalLM(config).eval()
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    unwanted = [i for i, text in enumerate(texts) if not text.isascii() or i in tokenizer.all_special_ids]
    model.generation_config.suppress_tokens = unwanted
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


@pytest.fixture
def server(checkpoint, start, tmp_path, monkeypatch):
    """(address, process) of a server on a port that was free. Asked for continuous batching it must do without.

    Nothing was ever downloaded: there is no cache of the hub.
    """
    monkeypatch.setenv("HF_HOME", str(tmp_path / "nothing"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    options = ["--device", "cpu", "--host", "127.0.0.1", "--port", "0", "--continuous-batching"]
    process = start("loglinear", "serve", str(checkpoint[0]), *options)
    log = ""
    try:
        for line in process.stdout:
            log += line
            if ready := re.search(r"running on (http://127.0.0.1:\d+)", line):
                yield ready[1], process
                break
        else:
            pytest.fail(f"the server stopped before it was ready:\n{log}")
    finally:
        process.kill()
        process.communicate(timeout=10)


def greedy(checkpoint, prompt):
    _, model, tokenizer = checkpoint
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :])


def test_streams_of_several_requests_at_a_time(checkpoint, server):
    """All are open before any is read, the last is read first; a whole answer is asked for in between."""
    import openai

    address, process = server
    want = [greedy(checkpoint, prompt) for prompt in PROMPTS]
    assert len(set(want)) == len(want)
    request = {"model": str(checkpoint[0]), "max_tokens": NEW_TOKENS, "temperature": 0}
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=30, max_retries=0) as client:
        streams = [client.completions.create(**request, prompt=prompt, stream=True) for prompt in PROMPTS]
        pieces = [[chunk.choices[0].text for chunk in stream] for stream in reversed(streams)][::-1]
        whole = client.completions.create(**request, prompt=PROMPTS[0])
        served = [model.id for model in client.models.list()]
    assert ["".join(texts) for texts in pieces] == want
    assert all(len([text for text in texts if text]) > NEW_TOKENS // 2 for texts in pieces)
    assert served == [str(checkpoint[0])]
    assert whole.choices[0].text == want[0]
    assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (NEW_TOKENS, "length")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert "does not support continuous batching" in output
    assert "Application shutdown complete" in output
    assert process.returncode == 0


def test_models_are_listed_without_a_model_and_without_a_cache(tmp_path):
    """Before transformers 5.24 this was an error of the server."""
    import huggingface_hub

    from loglinear.cli.serve import list_models

    class Manager:
        force_model = None

    assert list_models(lambda folder: [{"id": folder}])(Manager(), "cache") == [{"id": "cache"}]
    assert list_models(huggingface_hub.scan_cache_dir)(Manager(), str(tmp_path / "none")) == []


@pytest.mark.parametrize(
    ("options", "status", "line"),
    [
        (["--prot", "3"], 2, "loglinear serve: No such option:? '?--prot.*"),
        (["./nowhere"], 1, "loglinear serve: .*'./nowhere'.*"),
    ],
)
def test_errors_are_one_line(options, status, line, capsys):
    assert main(["serve", *options]) == status
    assert re.fullmatch(line, capsys.readouterr().err.splitlines()[-1])


def test_help_lists_the_options_of_transformers_and_offline(capsys):
    assert main(["serve", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--port", "--compile", "--offline", "loglinear serve"))
