"""Training cells side by side, going on after an interruption, and what the numbers are made to say."""

from __future__ import annotations

import json
import re
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing import get_context
from queue import SimpleQueue
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from matplotlib.figure import Figure

from loglinear.cli import main
from loglinear.cli.mqar import MqarArgs
from loglinear.tasks.mqar import run
from loglinear.tasks.mqar.config import MODELS, PRESETS, Cell, Recipe
from loglinear.tasks.mqar.data import Recall
from loglinear.tasks.mqar.figure import draw_accuracy
from loglinear.tasks.mqar.report import Result, best_rate, results, verdicts, widest_spread
from loglinear.tasks.mqar.side_by_side import side_by_side
from loglinear.tasks.mqar.train import (
    BATCHES_AT_ONCE,
    TrainingSteps,
    accuracy,
    build_model,
    count_by_level,
    held_out,
    learning_rate,
    right_answers,
    train_cell,
    training_blocks,
)

RECIPE = Recipe(steps=3, batch_tokens=64, vocab_size=16, layers=1, mlp=0, warmup=0.1, weight_decay=0.1, held_out=6)
CELL = Cell("Log-Linear Mamba-2", 16, 4, 16, (2, 4), 0.01, 0, RECIPE)


def row(model, rate, seed, validation, test=0.5, state_size=8, state_floats=512, loss=1.0):
    cell = {"model": model, "width": 16, "length": 64, "state_size": state_size, "learning_rate": rate, "seed": seed}
    accuracies = {"validation": {"16": validation}, "test": {"16": test}}
    return {"cell": cell, "final_loss": loss, "state_floats": state_floats, **accuracies}


@pytest.mark.parametrize("model", MODELS)
def test_a_cell_trains_and_its_row_can_be_repeated(model):
    cell = replace(CELL, model=model)
    first, second = train_cell(cell), train_cell(cell)
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert set(first["test"]) == {"2", "4"}
    assert first["graph"] is False
    assert json.loads(json.dumps(cell.identity())) == cell.identity()


def test_recurrent_models_of_one_size_keep_equal_states():
    cells = [replace(CELL, model=model, width=32) for model in MODELS if model != "Transformer"]
    for cell in cells:
        mixer = build_model(cell).model.layers[0].mixer
        if "Mamba" in cell.model:
            values, key_width = mixer.conv_widths[0], mixer.conv_widths[1]
        else:
            heads = mixer.num_kv_heads if "GLA" in cell.model else mixer.num_key_heads
            values, key_width = mixer.conv_widths[2], mixer.conv_widths[1] // heads
        states = 5 if cell.model.startswith("Log-Linear") else 1  # 16 tokens: levels 0 to 4
        assert cell.state_floats == states * key_width * values
    assert replace(CELL, model="Transformer").state_floats is None


def test_accuracy_is_the_share_of_answers_by_number_of_pairs():
    cell = replace(CELL, recipe=replace(RECIPE, held_out=10))
    model = build_model(cell)
    test = held_out(cell, "cpu")[1]
    with torch.no_grad():
        logits = model(test.tokens[0]).logits.flatten(0, 1)[test.queries[0]]
    guesses = logits.argmax(-1)
    # Answers are set to what the model says in a known share of cases: all of two pairs, three quarters of four.
    answers = guesses.clone()
    answers[20::4] = (answers[20::4] + 1) % 16
    hits = right_answers(model, cell, Recall(test.tokens, test.queries, answers[None], test.sources))
    assert accuracy(cell, torch.stack([x.sum() for x in hits])) == {"2": 1.0, "4": 0.75}
    levels = count_by_level(cell, test, hits).tolist()
    for pairs, by_level, right in zip((2, 4), levels, (20, 30)):
        assert [sum(column) for column in zip(*by_level)] == [right, 10 * pairs]
        assert by_level[0] == [0, 0]  # no query is its own pair


def test_validation_test_and_training_sequences_are_disjoint():
    cell = replace(CELL, recipe=replace(RECIPE, held_out=50, steps=40))
    validation, test = (set(map(tuple, recall.tokens[0].tolist())) for recall in held_out(cell, "cpu"))
    blocks = list(training_blocks(cell, "cpu", torch.zeros(1, dtype=torch.int64)))
    train = {tuple(tokens) for block in blocks for tokens in block.tokens.flatten(0, 1).tolist()}
    assert len(train) == 40 * 4
    assert not validation & test
    assert not train & (validation | test)


def test_models_of_one_seed_see_the_same_sequences_and_seeds_differ():
    apart = torch.zeros(1, dtype=torch.int64)
    first, twin, other = (
        next(training_blocks(cell, "cpu", apart))
        for cell in (CELL, replace(CELL, model="Mamba-2"), replace(CELL, seed=1))
    )
    assert torch.equal(first.tokens, twin.tokens)
    assert not torch.equal(first.tokens, other.tokens)


def test_a_step_is_adamw_with_its_schedule():
    cell = replace(CELL, recipe=replace(RECIPE, steps=100))
    assert learning_rate(cell, 0) == pytest.approx(0.001)
    assert learning_rate(cell, 9) == learning_rate(cell, 10) == pytest.approx(0.01)
    assert learning_rate(cell, 55) == pytest.approx(0.005)
    steps = TrainingSteps(build_model(cell), cell)
    decayed = {p for group in steps.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in steps.model.named_parameters() if p not in decayed}
    assert {name.rsplit(".")[-1] for name in names} >= {"A_log", "dt_bias", "D", "L"}
    assert not any("proj.weight" in name or "embed" in name for name in names)


def test_a_model_learns_what_one_batch_asks():
    cell = replace(CELL, learning_rate=0.02, recipe=replace(RECIPE, steps=60))
    batch = next(training_blocks(cell, "cpu", torch.zeros(1, dtype=torch.int64)))
    one = Recall(*(x[:1].expand(60, *x.shape[1:]) for x in batch.parts()))
    losses = TrainingSteps(build_model(cell), cell)(one).tolist()
    assert losses[0] > 2.0
    assert losses[-1] < 0.5


def test_each_number_of_pairs_has_the_same_share_in_the_loss_when_asked():
    cell = replace(CELL, recipe=replace(RECIPE, steps=1, equal_shares=True))
    block = next(training_blocks(cell, "cpu", torch.zeros(1, dtype=torch.int64)))
    with torch.no_grad():
        logits = build_model(cell)(block.tokens[0]).logits.flatten(0, 1)[block.queries[0]]
    few, many = torch.nn.functional.cross_entropy(logits, block.answers[0], reduction="none").split([4, 8])
    (loss,) = TrainingSteps(build_model(cell), cell)(block)
    assert float(loss) == pytest.approx(float((few.mean() + many.mean()) / 2), rel=1e-5)
    assert float(loss) != pytest.approx(float(torch.cat([few, many]).mean()), rel=1e-5)


def test_tied_models_have_no_weights_for_the_output_alone():
    tied, own = (build_model(replace(CELL, recipe=replace(RECIPE, tied=tied))) for tied in (True, False))
    assert own.num_parameters() - tied.num_parameters() == 16 * 16
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_initial_decay_and_output_scale_are_factors_and_a_transformer_has_no_decay():
    def mixers(**options):
        return [build_model(replace(cell, recipe=replace(RECIPE, **options))).model.layers[0].mixer for cell in cells]

    cells = [CELL, replace(CELL, model="Transformer")]
    plain, other = mixers(), mixers(initial_decay=0.5, output_scale=0.2)
    torch.testing.assert_close(other[0].A_log.exp(), 0.5 * plain[0].A_log.exp())
    for a, b in zip(plain, other):
        torch.testing.assert_close(b.out_proj.weight, 2 * a.out_proj.weight)


def test_cells_side_by_side_give_the_rows_that_they_give_alone():
    recipe = replace(RECIPE, steps=BATCHES_AT_ONCE + 2)
    cells = [replace(CELL, model=model, recipe=recipe) for model in ("Mamba-2", "Log-Linear Mamba-2", "Transformer")]
    together = dict(side_by_side(iter([cells[0], None, *cells[1:]]), 2, "cpu"))
    assert list(together) == [cells[0], cells[1], cells[2]]
    for cell in cells:
        assert {**together[cell], "seconds": 0} == {**train_cell(cell), "seconds": 0}


def test_what_is_over_is_given_up():
    turns = iter([False, False, True])
    assert list(side_by_side(iter([CELL]), 1, "cpu", over=lambda: next(turns))) == []


def test_an_error_in_a_worker_is_raised_when_no_row_comes(monkeypatch):
    monkeypatch.setattr(run, "LOOK", 0.01)
    works, failed = Future(), Future()
    failed.set_exception(ValueError("this cell"))
    share = SimpleNamespace(rows=SimpleQueue())
    share.rows.put((CELL, {}))
    assert run._next_row(share, [works, failed]) == (CELL, {})  # what is there comes first
    with pytest.raises(ValueError, match="this cell"):
        run._next_row(share, [works, failed])


def test_steps_that_find_their_batch_and_rate_themselves_are_those_of_the_host():
    """As recorded on CUDA, launched one by one here."""
    cell = replace(CELL, recipe=replace(RECIPE, steps=BATCHES_AT_ONCE + 3))
    plain = TrainingSteps(build_model(cell), cell)
    indexed = TrainingSteps(build_model(cell), cell, stream=cast(torch.cuda.Stream, object()))
    indexed.records = False
    for block in training_blocks(cell, "cpu", torch.zeros(1, dtype=torch.int64)):
        torch.testing.assert_close(indexed(block), plain(block), rtol=1e-4, atol=1e-4)
    assert int(indexed.place) == BATCHES_AT_ONCE + 3


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@on_cuda
@pytest.mark.parametrize("model", MODELS)
def test_recorded_steps_are_those_of_the_cpu(model):
    cell = replace(CELL, model=model, width=32, recipe=replace(RECIPE, steps=BATCHES_AT_ONCE + 8, equal_shares=True))
    stream = torch.cuda.Stream()
    on_cpu = TrainingSteps(build_model(cell), cell)
    with torch.cuda.stream(stream):
        on_device = TrainingSteps(build_model(cell).cuda(), cell, stream)
    for block in training_blocks(cell, "cpu", torch.zeros(1, dtype=torch.int64)):
        with torch.cuda.stream(stream):
            losses = on_device(Recall(*(x.cuda() for x in block.parts()))).cpu()  # on that stream, which it waits for
        torch.testing.assert_close(losses, on_cpu(block), rtol=5e-3, atol=5e-3)
    assert on_device.replay is not None


@on_cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cells_on_streams_give_the_rows_that_they_give_alone(precision):
    recipe = replace(RECIPE, steps=3 * BATCHES_AT_ONCE, batch_tokens=640, precision=precision)
    cells = [replace(CELL, model=model, width=32, recipe=recipe) for model in MODELS]
    for cell, row in side_by_side(iter(cells), 3, "cuda"):
        alone = train_cell(cell, "cuda")
        assert row["graph"]
        assert row["final_loss"] == pytest.approx(alone["final_loss"], rel=0.02)


def test_the_grid_sweeps_every_model_alike_and_matches_states():
    full = list(replace(PRESETS["full"], matched_state=True).sweeps())
    for sweep in full:
        assert [cell.learning_rate for cell in sweep] == list(PRESETS["full"].learning_rates)
        assert len({replace(cell, learning_rate=0.0) for cell in sweep}) == 1
    plain = list(PRESETS["full"].sweeps())
    assert len(plain) == 5 * 3 * 2
    assert len(full) == len(plain) + 2 * 3 * 2
    assert {(cell.length, cell.pairs) for sweep in plain for cell in sweep} == {
        (256, (4, 8, 16, 32, 64)),
        (512, (8, 16, 32, 64, 128)),
    }
    states = {(c.model, c.width, c.length): set() for c, *_ in full}
    for cell, *_ in full:
        states[cell.model, cell.width, cell.length].add(cell.state_floats)
    for (model, width, length), floats in states.items():
        if model in ("Mamba-2", "Gated DeltaNet"):
            assert states[f"Log-Linear {model}", width, length] <= floats


def test_the_rate_is_chosen_on_validation_and_chance_is_decided_by_the_loss():
    assert best_rate([row("Mamba-2", 1e-3, 0, 0.2, test=0.9), row("Mamba-2", 1e-2, 0, 0.3, test=0.1)]) == 1e-2
    assert best_rate([row("Mamba-2", 1e-3, 0, 0.1, loss=2.0), row("Mamba-2", 1e-2, 0, 0.1, loss=3.0)]) == 1e-3


def test_results_are_means_over_seeds_at_the_chosen_rate():
    rows = [
        row("Mamba-2", 1e-3, 0, 0.2, test=0.9),
        row("Mamba-2", 1e-2, 0, 0.3, test=0.4),
        row("Mamba-2", 1e-2, 1, 0.1, test=0.6),
    ]
    (result,) = results(rows)
    assert (result.learning_rate, result.seeds) == (1e-2, 2)
    assert result.accuracy["16"] == pytest.approx((0.5, 0.02**0.5))


def test_verdicts_compare_equal_widths_and_equal_states():
    def result(model, mean, state_size, floats, spread=0.01, seeds=3):
        shares = [mean - spread, mean, mean + spread][:seeds]  # a standard deviation of spread
        return Result(
            model, 16, 64, state_size, floats, 1e-2, {seed: {"mean": share} for seed, share in enumerate(shares)}
        )

    log_linear = result("Log-Linear Mamba-2", 0.6, 8, 1792)
    twins, states = verdicts(
        [
            result("Mamba-2", 0.4, 8, 256),
            log_linear,
            result("Mamba-2", 0.7, 56, 1792),
            result("Transformer", 1, 8, None),
        ]
    )
    assert "same widths: Log-Linear Mamba-2 is better" in twins
    assert "ahead with 3 of 3 seeds" in twins
    assert "same state: Mamba-2 is better" in states
    assert "ahead with 0 of 3 seeds" in states
    (close,) = verdicts([result("Mamba-2", 0.5, 8, 256, spread=0.2), log_linear])
    assert "no winner" in close
    (single,) = verdicts([result("Mamba-2", 0.1, 8, 256, seeds=1), log_linear])
    assert "no winner" in single


def test_the_result_whose_seeds_differ_most_is_named():
    steady = Result("Mamba-2", 16, 64, 8, 256, 1e-2, {0: {"mean": 0.5}, 1: {"mean": 0.6}})
    wild = Result("Transformer", 16, 64, 8, None, 1e-2, {0: {"mean": 0.9}, 1: {"mean": 0.4}, 2: {"mean": 0.125}})
    said = widest_spread([steady, wild])
    assert (
        said
        == "One seed says little: Transformer, width 16, length 64, recalls 0.12 with one seed and 0.90 with another."
    )
    assert widest_spread([replace(wild, by_seed={0: {"mean": 0.9}})]) is None


def test_the_figure_draws_all_models_alike_but_for_their_colours(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: figures.append(figure))
    by_seed = {0: {"8": 0.2, "16": 0.1, "mean": 0.15}, 1: {"8": 0.6, "16": 0.4, "mean": 0.5}}
    sizes = [("Mamba-2", 8), ("Mamba-2", 56), ("Log-Linear Mamba-2", 8)]
    draw_accuracy([Result(model, 16, 64, k, 32 * k, 1e-2, by_seed) for model, k in sizes], tmp_path / "any.png")
    (panel,) = figures[0].axes
    curves = [container.lines[0] for container in panel.containers]
    assert [curve.get_ydata().tolist() for curve in curves] == 3 * [pytest.approx([0.4, 0.25])]
    styles = {(c.get_linestyle(), c.get_linewidth(), c.get_marker(), c.get_markersize(), c.get_alpha()) for c in curves}
    assert len(styles) == 1
    assert len({curve.get_color() for curve in curves}) == 3
    dots = [line.get_ydata().tolist() for line in panel.lines if line.get_marker() == "."]
    assert dots == 3 * [[0.2, 0.1], [0.6, 0.4]]
    assert len({*curves[0].get_xdata(), *curves[1].get_xdata(), *curves[2].get_xdata()}) == 6  # none hides another


def test_the_small_preset_has_ten_seeds_and_linear_models_with_as_large_a_state():
    grid = MqarArgs().grid()
    assert len(grid.seeds) == 10
    states = [(cells[0].model, cells[0].state_floats) for cells in grid.sweeps()]
    assert states == [("Mamba-2", 512), ("Mamba-2", 3584), ("Log-Linear Mamba-2", 3584)]


@pytest.mark.slow
def test_the_command_goes_on_where_it_was_cut_off(tmp_path, monkeypatch, capsys):
    # Workers from a server that has imported everything once: tests/test_portability.py has workers that import it themselves.
    server = get_context("forkserver")
    server.set_forkserver_preload(["loglinear.tasks.mqar.side_by_side"])
    monkeypatch.setattr(run, "get_context", lambda kind: server)
    sizes = ["--lengths", "16", "--pairs", "2", "4", "--widths", "16", "--state-size", "4", "--vocab-size", "16"]
    short = ["--steps", "2", "--batch-tokens", "64", "--seeds", "0", "1", "--learning-rates", "0.01", "0.02"]
    command = ["mqar", "--output", str(tmp_path), "--workers", "2", "--device", "cpu", *sizes, *short]
    assert main(command) == 0
    printed = capsys.readouterr().out
    rows = run.read_rows(tmp_path / "rows.jsonl")
    assert len(rows) == 3 * (2 + 1)
    assert "Log-Linear Mamba-2" in printed
    assert "One seed says little: " in printed
    assert "behind linear models with as large a state" in printed
    assert json.loads((tmp_path / "results.json").read_text())["results"][0]["seeds"] == 2
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000

    # The last line is cut off, as by a machine that went away while it was written: its cell alone is trained again.
    path = tmp_path / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:40])
    assert main(command) == 0
    assert len(re.findall(r"^\d+/\d+ ", printed, re.M)) == 9
    assert len(re.findall(r"^\d+/\d+ ", capsys.readouterr().out, re.M)) == 1
    again = run.read_rows(path)
    assert again[:-1] == rows[:-1]
    assert {**again[-1], "seconds": 0} == {**rows[-1], "seconds": 0}


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--models", "Mamba-3"], 2, "--models must be among"),
        (["--pairs", "40"], 1, "--pairs must be 1 to a quarter"),
        (["--at-once", "-1"], 2, "--at-once must be at least 1: got -1"),
        (["--workers", "0"], 2, "--workers must be at least 1: got 0"),
        (["--widths", "32", "0"], 2, "--widths must be at least 1: got 0"),
        (["--steps", "0"], 2, "--steps must be at least 1: got 0"),
        (["--pairs", "2", "4", "8"], 1, "a batch must hold a multiple of 3 sequences"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(options, status, words, tmp_path, capsys):
    assert main(["mqar", "--output", str(tmp_path / "none"), *options]) == status
    assert words in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
