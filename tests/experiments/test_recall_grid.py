"""The recall grid: weights that see the bucket against the op, the order of the plan, and a run in two halves."""

from __future__ import annotations

from dataclasses import replace
from queue import SimpleQueue

import pytest
import torch

import recall_plan
from bucket_weights import BucketWeights, see_buckets
from loglinear.tasks.mqar.config import VALUE_DIM, Cell, Recipe
from loglinear.tasks.mqar.train import BATCHES_AT_ONCE, build_model
from recall_grid import chosen, work
from recall_plan import FRESH_SEEDS, RATES, Arm, best_rate, cell_of, chooser, fresh, phases, sweep, wanted
from recall_report import lines

pytestmark = pytest.mark.default_packages
RECIPE = Recipe(
    steps=BATCHES_AT_ONCE + 2,
    batch_tokens=128,
    vocab_size=32,
    layers=1,
    mlp=0,
    warmup=0.1,
    weight_decay=0.1,
    held_out=4,
    equal_shares=True,
    tied=True,
)
CELL = Cell("Log-Linear Mamba-2", 16, 4, 64, (4, 8), 0.01, 0, RECIPE, "end", "one")


@pytest.mark.parametrize("model", ["Log-Linear Mamba-2", "Log-Linear Gated DeltaNet"])
def test_a_probe_starts_as_the_log_linear_model_and_a_norm_does_not(model):
    cell = replace(CELL, model=model, recipe=replace(RECIPE, output_scale=1.0))
    ids = torch.randint(32, (2, 64), generator=torch.Generator().manual_seed(0))
    plain, probe, norm = (
        build_model(cell),
        *(see_buckets(build_model(cell), rule, VALUE_DIM) for rule in ("probe", "norm")),
    )
    for one in (plain, probe, norm):
        one.model.layers[0].mixer.level_scale.dl_proj.weight.data.mul_(50)  # λ far from 1
    with torch.no_grad():
        logits = [one.eval()(ids).logits for one in (plain, probe, norm)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert (logits[2] - logits[0]).abs().max() > 0.01


def test_the_weight_of_a_bucket_is_its_share_of_the_norms():
    """Two tokens: the second reads itself and the first."""
    q, k, v = (torch.randn(1, 2, 1, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    g, scales = torch.full((1, 2, 1), -0.5), torch.tensor([2.0, 3.0]).expand(1, 2, 1, 2)
    o = BucketWeights("norm", 1, 4)({"q": q, "k": k, "v": v, "g": g}, scales, unit_length=False)[0, 1, 0]
    own = (q[0, 1, 0] @ k[0, 1, 0]) * v[0, 1, 0]
    other = (q[0, 1, 0] @ k[0, 0, 0]) * torch.exp(torch.tensor(-0.5)) * v[0, 0, 0]
    both = (own.square().sum() + other.square().sum()) / 2
    expected = 2 * own.square().sum() / both * own + 3 * other.square().sum() / both * other
    torch.testing.assert_close(o, expected)


def test_gradients_reach_the_probe():
    model = see_buckets(build_model(CELL), "probe", VALUE_DIM)
    model(torch.arange(64).remainder(32)[None]).logits.square().sum().backward()
    weights = model.model.layers[0].mixer.bucket_weights
    assert weights.exponent.grad.abs().min() > 0
    assert weights.direction.grad.abs().max() > 0


def test_the_plan_has_each_arm_once_and_fresh_seeds_go_to_the_rate_that_a_sweep_finds():
    arms = [arm for phase in phases() for arm in phase]
    assert len(set(arms)) == len(arms)
    first = arms[0]
    stacks = list(wanted({}))
    assert stacks == [sweep(arm) for arm in dict.fromkeys(map(chooser, arms))]
    rows = {cell: {"validation": {"32": cell.learning_rate}, "final_loss": 1.0} for cell in sweep(first)}
    assert best_rate(first, rows) == max(RATES)
    later = list(wanted(rows))
    assert later[len(phases()[0]) - 1] == fresh(first, max(RATES)), "behind the sweeps of its phase"
    assert best_rate(replace(first, kind="tagged"), rows) == max(RATES), "other kinds keep the rate"
    assert cell_of(stacks[0][0].identity()) == stacks[0][0]


def test_arms_that_are_asked_for_run_in_their_order():
    rows = {
        cell: {"validation": {"32": cell.learning_rate}, "final_loss": 0.0}
        for model, start in (("Mamba-2", "noise"), ("Log-Linear Mamba-2", "one"))
        for cell in sweep(Arm("any", model, start))
    }
    asked = ["end/Mamba-2/noise", "any/Log-Linear Mamba-2/one"]
    assert [(stack[0].kind, stack[0].model) for stack in chosen(rows, asked)] == [
        ("end", "Mamba-2"),
        ("any", "Log-Linear Mamba-2"),
    ]
    assert list(chosen(rows, None)) == list(wanted(rows))


def test_differences_are_those_of_pairs():
    arms = Arm("any", "Mamba-2"), Arm("any", "Log-Linear Mamba-2", "one")
    rows = {}
    for arm, gain in zip(arms, (0.0, 0.1)):
        for cell in [*recall_plan.sweep(arm), *(arm.cell(RATES[0], seed) for seed in FRESH_SEEDS)]:
            value = 0.2 + 0.01 * cell.seed + gain
            rows[cell] = {"validation": {"32": value}, "final_loss": cell.learning_rate, "test": {"32": value}}
    text = list(lines(rows))
    assert text[-1] == "    minus any, width 32, Mamba-2: 10.0 ± 0.0 points, ahead with 9 of 9"


def test_a_stack_that_was_stopped_goes_on_to_the_rows_of_one_that_was_not(tmp_path):
    """A worker that is told to stop after one block leaves its state; the next one has the same rows as a whole run."""

    class Stop:
        def __init__(self, looks: float) -> None:
            self.looks = looks

        def is_set(self) -> bool:
            self.looks -= 1
            return self.looks < 0

    found = {}
    stack = (CELL, replace(CELL, seed=1))
    for name, halves in (("halves", ((2, 0), (4, 1))), ("whole", ((4, 1),))):
        results: SimpleQueue = SimpleQueue()
        for looks, rows in halves:
            stacks: SimpleQueue = SimpleQueue()
            stacks.put(stack)
            work("cpu", 1, tmp_path / name, stacks, results, Stop(looks))
            assert results.qsize() == rows
            assert len(list((tmp_path / name).iterdir())) == 1 - rows
        found[name] = [row | {"seconds": 0} for _, row in results.get()]
    assert found["halves"] == found["whole"]
