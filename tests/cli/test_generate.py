"""`loglinear generate`: the text of the plain computation, streamed, and the size of what was remembered."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loglinear.cli import main
from loglinear.cli.generate import describe_state
from loglinear.models import LogLinearConfig, LogLinearForCausalLM

PROMPT = "alpha beta gamma ( delta"


def test_greedy_text_is_the_argmax_of_every_step(finished_run, capsys):
    options = ["generate", str(finished_run), "--prompt", PROMPT, "--max-new-tokens", "12", "--temperature", "0"]
    assert main(options) == 0
    captured = capsys.readouterr()
    tokenizer = AutoTokenizer.from_pretrained(finished_run)
    model = AutoModelForCausalLM.from_pretrained(finished_run).eval()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert captured.out.strip() == (PROMPT + tokenizer.decode(ids[0, length:])).strip()
    # The last token is written but never read.
    assert f"after {length + 11} tokens, room for {length + 12}: recurrent state" in captured.err
    assert re.search(r" bytes in 1 layers; \d+\.\d\d ms per token$", captured.err.strip())


def test_room_for_a_million_tokens(finished_run, capsys):
    """The text does not depend on the room; the state is a few slots larger."""
    texts, sizes = [], []
    for options in ([], ["--context", "1000000"]):
        options = ["--prompt", PROMPT, "--max-new-tokens", "80", "--temperature", "0", *options]
        assert main(["generate", str(finished_run), *options]) == 0
        captured = capsys.readouterr()
        texts.append(captured.out)
        sizes.append(int(re.findall(r"recurrent state ([\d,]+) bytes", captured.err)[0].replace(",", "")))
    assert texts[0] == texts[1]
    assert "room for 1,000,000: " in captured.err
    assert sizes[0] < sizes[1] < 12 * sizes[0]


def test_a_context_that_is_too_short_is_named(finished_run, capsys):
    assert main(["generate", str(finished_run), "--prompt", PROMPT, "--context", "20"]) == 1
    assert re.search(
        r"--context must be at least 2\d\d, prompt and new tokens together: got 20", capsys.readouterr().err
    )


def test_sampling_follows_the_seed_and_reads_a_file(finished_run, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    texts = []
    for seed in ("1", "1", "2"):
        options = ["--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "30", "--seed", seed]
        assert main(["generate", str(finished_run), *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith(PROMPT) for text in texts)


def test_the_state_is_counted_by_kind():
    config = LogLinearConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, mamba_head_dim=8, mamba_state_size=8, head_dim=16,
        num_attention_heads=1, mixer=["log_linear_mamba2", "attention"],
    )  # fmt: skip
    model = LogLinearForCausalLM(config).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    recurrent, attention = (layer.state for layer in cache.layers)
    assert attention.keys.shape[1] >= 10
    expected = (
        f"recurrent state {recurrent.nbytes:,} bytes in 1 layers, KV cache {attention.nbytes:,} bytes in 1 layers"
    )
    assert describe_state(cache, 10) == f"after 10 tokens: {expected}"
    assert int(re.findall(r"KV cache ([\d,]+)", expected)[0].replace(",", "")) >= 2 * 10 * 16 * 4


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--prompt", ""], 1, "--prompt: needs at least one token"),
        ([], 2, "--prompt and --prompt-file: give exactly one"),
    ],
)
def test_a_missing_prompt_is_named(options, status, message, finished_run, capsys):
    assert main(["generate", str(finished_run), *options]) == status
    assert message in capsys.readouterr().err


def test_a_prompt_that_is_no_utf_8_is_refused_with_the_byte(finished_run, tmp_path, capsys):
    (tmp_path / "latin").write_bytes(b"alpha caf\xe9")
    command = ["generate", str(finished_run), "--prompt-file", str(tmp_path / "latin"), "--max-new-tokens", "1"]
    assert main(command) == 1
    printed = capsys.readouterr()
    assert printed.err.endswith("latin is not UTF-8 text: byte 9 is 0xe9\n")
    assert printed.out == ""
