"""Stacks: the losses and weights of models that train alone, one graph for all, and what the stacks of text ask and read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import text_stacks
from loglinear.tasks.mqar.config import Cell, Recipe
from loglinear.tasks.mqar.train import TrainingSteps, build_model, training_blocks
from stack_training import RecallStack, Steps, blocks, built, stack_training
from stacked import Shape, Stack, hidden_states
from text_stacks import Copy

pytestmark = pytest.mark.default_packages
RECIPE = Recipe(3, 192, 32, 1, 0, 0.1, 0.1, 4, equal_shares=True, tied=True)
RULES = ("Log-Linear Mamba-2, probe", "Log-Linear Mamba-2, norm", "Log-Linear Gated DeltaNet, probe")
MODELS = ("Mamba-2", "Log-Linear Mamba-2", "Gated DeltaNet", "Log-Linear Gated DeltaNet")


def last(turns):
    """What a generator returns."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            return end.value


def cells(model, **changes):
    start = "one" if model.startswith("Log-Linear Mamba-2") else "noise"
    one = Cell(model, 16, 4, 32, (2, 4), 0.01, 0, RECIPE, "any", start)
    return [replace(one, **changes), replace(one, learning_rate=0.02, seed=1, **changes)]


@pytest.mark.parametrize("model", [*MODELS, *RULES])
def test_a_stack_has_the_losses_and_weights_of_models_that_train_alone(model):
    both = cells(model)
    stack = RecallStack(both, "cpu", compiled=False)
    given = [next(training_blocks(cell, "cpu", torch.zeros(1, dtype=torch.int64))) for cell in both]
    alone = [built(cell) for cell in both]
    wanted = [TrainingSteps(one, cell)(block) for one, cell, block in zip(alone, both, given)]
    for i in range(RECIPE.steps):
        batch = [torch.stack([getattr(block, name)[i] for block in given]) for name in ("tokens", "queries", "answers")]
        found = stack.step(*batch, torch.tensor([i]))
        torch.testing.assert_close(found, torch.stack([losses[i] for losses in wanted]), rtol=1e-4, atol=1e-4)
    for name, weights in stack.stack.weights.items():
        expected = torch.stack([dict(one.named_parameters())[name].detach() for one in alone])
        torch.testing.assert_close(
            weights.detach(), expected, rtol=0, atol=2e-3
        )  # 1e-4 there; Adam divides by small numbers


def test_copies_of_one_seed_have_the_same_sequences_and_rows_come_for_each_copy():
    one, other = cells("Mamba-2")
    three = [one, replace(one, learning_rate=0.02), other]
    tokens, queries, _ = next(blocks(three, "cpu", torch.zeros(1, dtype=torch.int64), None, 0))
    assert torch.equal(tokens[:, 0], tokens[:, 1])
    assert not torch.equal(tokens[:, 0], tokens[:, 2])
    assert tokens.shape[:2] == queries.shape[:2] == (3, 3)
    rows = last(stack_training(three))
    assert len({row["final_loss"] for row in rows}) == len(rows) == 3
    assert sum(right + asked > 0 for level in rows[0]["test_by_level"].values() for right, asked in level) > 2


def test_levels_beyond_the_last_one_read_share_it():
    model = build_model(cells("Log-Linear Mamba-2", level_scale_start="noise")[0])
    weights = {name: p.detach().unsqueeze(0) for name, p in model.named_parameters()}
    shape = Shape.of(model, torch.float32)
    ids = torch.randint(32, (1, 1, 32), generator=torch.Generator().manual_seed(0))
    whole, shared = (hidden_states(weights, ids, replace(shape, levels=levels)) for levels in (None, 4))
    torch.testing.assert_close(shared[:, :, :8], whole[:, :, :8])  # levels 0 to 3 reach seven tokens back
    assert (shared[:, :, 16:] - whole[:, :, 16:]).abs().max() > 1e-3


def test_a_copy_with_other_weights_reads_the_same_text_and_stacks_follow_the_plan(tmp_path):
    for side in ("train", "valid"):
        np.save(tmp_path / f"{side}.npy", np.arange(40_000, dtype=np.uint16) % 2048)
        np.save(tmp_path / f"{side}_offsets.npy", np.array([0, 20_000, 40_000]))
    text = text_stacks.Text(tmp_path, "train", "cpu")
    base = Copy("mamba2", "", 1e-3, 0, 0)
    assert np.array_equal(text.starts(base), text.starts(replace(base, seed=1)))
    assert not np.array_equal(text.starts(base), text.starts(replace(base, order=1)))
    assert text.whole(8192, 1).shape == (2, 8193)
    assert int(text.whole(8192, 1)[0, 0]) == 20_000 % 2048, "the second document"
    rows = {copy: {"validation": abs(copy.rate - 4e-3)} for copy in text_stacks.sweep("mamba2", "")}
    assert next(text_stacks.stacks({}))[0].part == "sweep"
    fresh = next(text_stacks.stacks(rows))
    assert [copy.seed for copy in fresh] == list(text_stacks.FRESH_SEEDS)
    assert {copy.rate for copy in fresh} == {4e-3}


def test_steps_that_were_stopped_go_on_from_their_file(tmp_path, monkeypatch):
    monkeypatch.setattr("stack_training.SAVE_EVERY", 0.0)

    def steps():
        model = build_model(cells("Mamba-2")[0])
        stack = Stack([model], torch.full((40, 1), 1e-2), 0.1, torch.float32, compiled=False)
        ids = torch.randint(32, (40, 1, 2, 17), generator=torch.Generator().manual_seed(0))

        def step(place):
            h = stack.hidden(ids[int(place)][..., :-1])
            found = text_stacks.mean_losses(h, stack.table, ids[int(place)][..., 1:])
            stack.update(found, place)
            return found.detach()

        return Steps(step, stack, None)

    whole, file = steps().through(40), tmp_path / "state.pt"
    assert len(steps().through(32, file)) == 32
    torch.testing.assert_close(steps().through(40, file), whole, rtol=0, atol=0)
    torch.testing.assert_close(steps().through(40, file), whole, rtol=0, atol=0)  # nothing is left to do
