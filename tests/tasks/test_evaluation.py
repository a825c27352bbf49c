"""The loss by position against the plain computation from all logits at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.tasks.lm import evaluation
from loglinear.tasks.lm.evaluation import Mean, by_position, per_sequence, position_losses, summary
from loglinear.tasks.lm.figure import draw_losses
from loglinear.tasks.lm.tokens import Tokens, Windows

CONTEXT = 40


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LogLinearConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, mamba_head_dim=16, mamba_state_size=16,
        max_position_embeddings=CONTEXT, initializer_range=0.5,
    )  # fmt: skip
    return LogLinearForCausalLM(config)


@pytest.fixture(scope="module")
def windows():
    values = np.random.default_rng(0).integers(0, 50, 5 * CONTEXT + 3).astype(np.uint16)
    return Windows(Tokens(values, np.array([0, len(values)])), CONTEXT)


def test_position_losses_are_the_cross_entropies_of_the_logits(model, windows, monkeypatch):
    monkeypatch.setattr(evaluation, "TOKENS_PER_HEAD_CALL", 7)
    done = []
    losses = position_losses(model, windows, batch_size=2, on_batch=done.append)
    ids = torch.stack([windows[i]["input_ids"] for i in range(5)])
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    expected = cross_entropy(output.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    np.testing.assert_allclose(losses, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert losses.mean() == pytest.approx(output.loss.item(), rel=1e-5)
    assert done == [2, 4, 5]


def test_buckets_partition_the_positions():
    losses = np.random.default_rng(1).normal(size=(6, 39)).astype(np.float32)
    rows = by_position(losses, buckets=5)
    assert [row["first"] for row in rows] == [0, *(row["last"] + 1 for row in rows[:-1])]
    assert rows[-1]["last"] == 38
    for row in rows:
        assert row["loss"] == pytest.approx(losses[:, row["first"] : row["last"] + 1].mean(), abs=1e-6)
    assert len(by_position(losses[:, :3], buckets=5)) == 3


def test_the_standard_error_is_that_of_the_sequence_means():
    losses = np.array([[1.0, 3.0], [4.0, 4.0], [6.0, 6.0]])
    mean = Mean.over_sequences(losses)
    assert mean.value == pytest.approx(4.0)
    assert mean.standard_error == pytest.approx(np.std([2.0, 4.0, 6.0], ddof=1) / 3**0.5)
    assert Mean.over_sequences(losses[:1]).standard_error == 0


def test_single_sequences_are_kept_so_that_differences_can_be_paired():
    """Two models whose losses differ by little where sequences differ by much: the pairs must show it."""
    rng = np.random.default_rng(3)
    one = (rng.normal(3, 1, (8, 1)) + rng.normal(0, 0.01, (8, 39))).astype(np.float32)
    kept = [summary(losses)["per_sequence"] for losses in (one, one - 0.05)]
    edges = kept[0]["edges"]
    assert (edges[0], edges[-1], len(edges)) == (0, 39, 17)
    assert kept[0]["losses"][2][5] == pytest.approx(one[2, edges[5] : edges[6]].mean(), abs=1e-5)
    difference = np.array(kept[1]["losses"]) - np.array(kept[0]["losses"])
    np.testing.assert_allclose(difference, -0.05, atol=2.1e-5)
    assert per_sequence(one[:, :5])["edges"] == [0, 1, 2, 3, 4, 5]


def test_the_summary_holds_loss_and_perplexity():
    result = summary(np.full((2, 8), 1.5, np.float32), buckets=4)
    assert result["perplexity"] == pytest.approx(np.exp(1.5))
    assert result["predictions"] == 16
    assert [row["loss"] for row in result["by_position"]] == [1.5] * 4


def test_the_figure_shows_what_it_is_given(tmp_path):
    import matplotlib.image

    losses = np.random.default_rng(2).normal(3, 0.1, size=(4, 64)).astype(np.float32)
    draw_losses({"one": losses}, tmp_path / "a.png")
    draw_losses({"one": losses, "two": losses + 1}, tmp_path / "b.png")
    one, two = (matplotlib.image.imread(tmp_path / name) for name in ("a.png", "b.png"))
    assert two.shape[0] > one.shape[0]
    assert one[..., :3].min() < 0.5
