"""Needles for stacks: rows of several samples whose answers carry the loss, and shares of exact answers for each copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import stack_needles
import text_tokens
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from stacked import Stack

pytestmark = pytest.mark.default_packages
TUNE = stack_needles.Tune(3, 2e-3, (256, 512))
WORDS = "the magic number of a quiet harbour is seven 0123456789 and so on"


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(stack_needles, "TESTED", (512,))
    monkeypatch.setattr(stack_needles, "KINDS", {"1 key": ("number", 4), "4 values": ("multi-value", 4)})
    monkeypatch.setattr(stack_needles, "BATCH", 2)
    monkeypatch.setattr(stack_needles, "TESTS", 3)
    texts = [" ".join(np.random.default_rng(i).permutation(WORDS.split() * 40)) for i in range(4)]
    tokenizer = text_tokens.learned(iter(texts))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for side in ("train", "valid"):
        ids, offsets = text_tokens.encoded(tokenizer, iter(texts), None)
        assert (ids[offsets[1:] - 1] == text_tokens.END).all()
        np.save(tmp_path / f"{side}.npy", ids)
        np.save(tmp_path / f"{side}_offsets.npy", offsets)
    return tmp_path, tokenizer


def test_rows_hold_samples_one_behind_the_other_and_mark_their_answers(data):
    folder, tokenizer = data
    ids, answers = stack_needles.rows_of(folder, TUNE)
    assert ids.shape == answers.shape == (3, 2, 513)
    text = tokenizer.decode(ids[0, 0][answers[0, 0]].tolist())
    assert set(text) <= set("0123456789, Ġ"), text
    digits = sum(character.isdigit() for character in text)
    assert digits > 0
    assert digits % 7 == 0
    assert answers[..., -1].all(), "a row ends with an answer"


def test_a_copy_that_knows_the_answer_is_exact_and_another_is_not(data):
    folder, _ = data
    torch.manual_seed(0)
    sizes = {
        "mamba_num_heads": 2,
        "mamba_head_dim": 8,
        "mamba_state_size": 4,
        "hidden_size": 16,
        "num_hidden_layers": 1,
    }
    config = LogLinearConfig(
        vocab_size=2048, intermediate_size=0, tie_word_embeddings=True, max_position_embeddings=512, **sizes
    )
    models = [LogLinearForCausalLM(config) for _ in range(2)]
    stack = Stack(models, torch.zeros(3, 2), 0.1, torch.float32, compiled=False)
    needles = stack_needles.Needles(folder, TUNE)
    rows = stack_needles.tune_and_test(stack, needles, needles.rows(), None, trained=256)
    assert set(rows[0]["needles"]) == {"1 key 512", "1 key 512 as they are", "4 values 512", "4 values 512 as they are"}
    assert rows[0]["tune"][-1] < rows[0]["tune"][0], "the loss falls"
    samples = next(needles.tests())[2]
    wanted = samples[0].ids[-1]
    for sample in samples:
        sample.ids[sample.answer_start :] = wanted  # one token all along
    with torch.no_grad():
        stack.weights["model.norm.weight"][0] = 0
        stack.weights["model.embed_tokens.weight"][0] = 0
    assert stack_needles.exact(stack, samples, None) == [0.0, 0.0], (
        "all logits are equal, and the first token is the likeliest"
    )
    for sample in samples:
        sample.ids[sample.answer_start :] = 0
    assert stack_needles.exact(stack, samples, None) == [1.0, 0.0]
