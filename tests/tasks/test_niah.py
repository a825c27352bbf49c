"""Needles: where they stand, who may see them, and scores of models that are known to be right, wrong or greedy."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
import torch
from stand_ins import StandIn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.tasks.lm.tokenizer import train_tokenizer
from loglinear.tasks.lm.tokens import Tokens
from loglinear.tasks.niah.config import KINDS, GridConfig, TaskConfig, TuneConfig
from loglinear.tasks.niah.data import Haystack, Samples, draw_number, draw_words, grid_samples, side_of, training_batch
from loglinear.tasks.niah.evaluate import answer_logits, by_context, score_samples, table
from loglinear.tasks.niah.figure import draw_heatmaps
from loglinear.training.finetune import finetune, rate

TEXTS = [" ".join(f"line {i} of text {j}, 12 and 3456789;" for i in range(40)) + "\n" for j in range(3)]


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """Spaces are part of words and a text's first word gets one: nothing like a byte-level BPE."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    alphabet = [chr(c) for c in range(33, 127)] + ["\n"]
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request):
    return train_tokenizer(TEXTS, 300) if request.param == "bpe" else unigram_tokenizer()


def haystack(tokenizer) -> Haystack:
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    offsets = np.cumsum([0, *map(len, ids)])
    return Haystack(Tokens(np.concatenate(ids).astype(np.uint16), offsets), tokenizer.eos_token_id)


@pytest.fixture
def samples(tokenizer):
    """``samples(**task)``: makes samples of one side."""

    def build(side="test", **task) -> Samples:
        return Samples(haystack(tokenizer), tokenizer, side, TaskConfig(**task))

    return build


def places(ids: np.ndarray, part: list[int]) -> list[int]:
    return [i for i in range(len(ids) - len(part) + 1) if ids[i : i + len(part)].tolist() == list(part)]


# --------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_sample_has_its_length_and_its_needle_at_its_depth(samples, kind, depth):
    made = samples(needles=3).make(kind, 1200, depth, np.random.default_rng(0))
    assert made.ids.shape == (1200,)
    assert made.spans[-1][1] == 1200
    assert len(made.values) == len(made.spans) == (3 if kind == "multi-value" else 1)
    value = made.ids[slice(*made.spans[made.placed])].tolist()
    found, answer = places(made.ids, value)[0], made.spans[made.placed][0]
    assert found < made.answer_start <= answer
    # Others are at most two needles and a question of under 100 tokens each away from the share of the text.
    assert found == pytest.approx(depth * 1200, abs=310)
    if kind in ("number", "word"):
        head = places(made.ids, made.ids[made.answer_start - 5 : made.answer_start].tolist())
        assert found == head[0] + 5  # the value follows the same tokens as the answer follows the question


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_very_tokens_of_their_needles_in_order(samples, tokenizer, kind):
    made = samples().make(kind, 1500, 0.5, np.random.default_rng(1))
    first = [places(made.ids, made.ids[start:stop].tolist())[0] for start, stop in made.spans]
    assert first == sorted(first)
    assert first[-1] < made.answer_start
    text = tokenizer.decode(made.ids)
    needles = 1 if kind in ("number", "word") else 4
    assert text.count("The magic") == needles + 1
    assert all(text.count(value) >= 2 for value in made.values)


def test_the_seed_and_the_place_in_the_grid_decide_a_sample(samples):
    grid = GridConfig(contexts=(700, 900), depths=3, samples=2)
    once, again = list(grid_samples(samples(), grid)), list(grid_samples(samples(), grid))
    assert len(once) == 2 * 4 * 3 * 2
    assert all((a.ids == b.ids).all() and a.values == b.values for a, b in zip(once, again))
    more = list(grid_samples(samples(kinds=("word",)), replace(grid, contexts=(900,), samples=5)))
    same = [sample for sample in once if sample.kind == "word" and len(sample.ids) == 900]
    assert [sample.values for sample in more if sample.values in [s.values for s in same]] == [s.values for s in same]
    other = list(grid_samples(samples(seed=1), grid))
    assert not any(a.values == b.values for a, b in zip(once, other))


def test_training_never_sees_a_key_or_value_of_the_test(samples):
    tune = TuneConfig(contexts=(600,), batch_tokens=6000)
    trained = [sample for i in range(30) for sample in training_batch(samples("train"), tune, i)]
    tested = list(grid_samples(samples(), GridConfig(contexts=(600,), depths=5, samples=15)))
    for side, made in (("train", trained), ("test", tested)):
        assert {side_of(text) for sample in made for text in (sample.key, *sample.values)} == {side}
    assert not {s.key for s in trained} & {s.key for s in tested}
    assert {s.kind for s in trained} == set(KINDS)
    rng = np.random.default_rng(0)
    for draw in (draw_number, draw_words):
        assert not {draw("train", rng) for _ in range(300)} & {draw("test", rng) for _ in range(300)}


def test_the_haystack_goes_round_and_never_says_that_it_ends(tokenizer):
    hay = haystack(tokenizer)
    total = len(hay.values) - 3
    text = hay.cut(2 * total, np.random.default_rng(0))
    assert len(text) == 2 * total
    assert tokenizer.eos_token_id not in text
    assert (text[:total] == text[total:]).all()
    assert not (hay.cut(50, np.random.default_rng(1)) == hay.cut(50, np.random.default_rng(2))).all()
    with pytest.raises(ValueError, match="haystack needs at least one token"):
        Haystack(Tokens(np.array([tokenizer.eos_token_id]), np.array([0, 1])), tokenizer.eos_token_id)


def test_a_context_that_is_too_short_is_told_what_it_needs(samples):
    with pytest.raises(ValueError, match=r"contexts must be at least \d+ tokens for multi-key.*got 64"):
        samples().make("multi-key", 64, 0.5, np.random.default_rng(0))


@pytest.mark.parametrize(("config", "fields"), [(TaskConfig, {"kinds": ()}), (TaskConfig, {"needles": 1}),
    (GridConfig, {"contexts": ()}), (GridConfig, {"depths": 1}), (GridConfig, {"samples": 0}),
    (TuneConfig, {"contexts": ()}), (TuneConfig, {"steps": 0}), (TaskConfig, {"needles": 1001}),
    (TaskConfig, {"seed": -1}), (GridConfig, {"contexts": (64, -1)}), (TuneConfig, {"clip": 0.0})])  # fmt: skip
def test_settings_that_make_no_sense_are_named(config, fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        config(**fields)


# ------------------------------------------------------------------------------------------------------------ scoring


def grid_of(samples, **grid) -> list:
    return list(grid_samples(samples, GridConfig(**({"contexts": (800, 600), "depths": 3, "samples": 2} | grid))))


def know_all(ids: torch.Tensor) -> torch.Tensor:
    return ids.roll(-1)


def test_a_model_that_knows_all_is_exact_and_one_that_knows_nothing_is_not(samples, tokenizer):
    made = grid_of(samples())
    knows = StandIn(len(tokenizer), know_all)
    scored = score_samples(knows, made, batch_tokens=1700)
    assert all(score.exact and score.at_depth for _, score in scored)
    assert {shape for shape in knows.seen} == {(2, 600), (2, 800)}
    assert [len(sample.ids) for sample, _ in scored] == [600] * 24 + [800] * 24
    scored = score_samples(StandIn(len(tokenizer), torch.zeros_like), made, batch_tokens=1)
    assert not any(score.exact or score.at_depth for _, score in scored)


def test_one_wrong_token_of_another_value_spoils_exact_but_not_the_value_at_depth(samples, tokenizer):
    made = grid_of(samples(kinds=("multi-value",)), contexts=(800,))
    for sample in made:
        wrong = next(start for i, (start, _) in enumerate(sample.spans) if i != sample.placed)

        def rule(ids, wrong=wrong):
            predicted = know_all(ids)
            predicted[wrong - 1] += 1
            return predicted % len(tokenizer)

        ((_, score),) = score_samples(StandIn(len(tokenizer), rule), [sample], 1000)
        assert (score.exact, score.at_depth) == (False, True)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LogLinearConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, mamba_head_dim=16, mamba_state_size=16,
        max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    return LogLinearForCausalLM(config).eval()


def test_exact_is_what_greedy_decoding_writes(samples, model):
    made = samples().make("number", 300, 0.5, np.random.default_rng(0))
    prompt = torch.from_numpy(made.ids[: made.answer_start])[None]
    length = 300 - made.answer_start
    written = model.generate(prompt, max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0)[0]
    greedy = replace(made, ids=written.numpy())
    ((_, score),) = score_samples(model, [greedy], 300)
    assert score.exact
    for place in range(made.answer_start, 300):
        ids = written.numpy().copy()
        ids[place] = (ids[place] + 1) % 300
        ((_, score),) = score_samples(model, [replace(made, ids=ids)], 300)
        assert not score.exact


def test_answer_logits_are_those_of_the_whole_model(samples, model):
    batch = training_batch(samples("train"), TuneConfig(contexts=(600,), batch_tokens=2400), 3)
    logits, targets = answer_logits(model, batch)
    ids = torch.stack([torch.from_numpy(sample.ids) for sample in batch])
    columns = targets.shape[1]
    assert columns == max(600 - sample.answer_start for sample in batch)
    torch.testing.assert_close(logits, model(ids).logits[:, -columns - 1 : -1])
    assert (targets == ids[:, -columns:]).all()


def test_the_table_and_the_figure_hold_every_cell(samples, tokenizer, tmp_path):
    right = table(score_samples(StandIn(len(tokenizer), know_all), grid_of(samples()), 1000))
    wrong = table(score_samples(StandIn(len(tokenizer), torch.zeros_like), grid_of(samples()), 1000))
    assert len(right) == 4 * 2 * 3
    assert {row["exact"] for row in right} == {1.0}
    assert {row["samples"] for row in right} == {2}
    assert ({row["right"] for row in right}, {row["right"] for row in wrong}) == ({"11"}, {"00"})
    assert all(row["standard_error"] > 0 for row in right + wrong)
    assert [(row["context"], row["samples"], row["exact"]) for row in by_context(wrong) if row["kind"] == "word"] == [
        (600, 6, 0.0), (800, 6, 0.0)
    ]  # fmt: skip
    draw_heatmaps({"right": right}, tmp_path / "one.png", tuned_context=600)
    draw_heatmaps({"right": right, "wrong": wrong}, tmp_path / "two.png")
    one, two = (matplotlib.image.imread(tmp_path / name) for name in ("one.png", "two.png"))
    assert two.shape[0] > one.shape[0]


# -------------------------------------------------------------------------------------------------------- fine-tuning


def test_a_fine_tune_learns_the_answers_and_repeats_itself(samples, model):
    def run() -> tuple[list[dict], nn.Module]:
        torch.manual_seed(0)
        fresh = LogLinearForCausalLM(model.config)
        tune = TuneConfig(contexts=(200, 300), steps=24, batch_tokens=600, learning_rate=1e-2, log_every=8)
        return finetune(fresh, samples("train", kinds=("number", "word")), tune), fresh

    log, tuned = run()
    assert [entry["step"] for entry in log] == [8, 16, 24]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert not tuned.training
    again, _ = run()
    assert [entry["loss"] for entry in again] == [entry["loss"] for entry in log]


def test_the_rate_rises_and_falls():
    rates = [rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert rate(0, 1) == 1


def test_a_fine_tune_refuses_lengths_that_hold_no_sample(samples, model):
    with pytest.raises(ValueError, match="contexts must be at least"):
        finetune(model, samples("train"), TuneConfig(contexts=(50, 600), steps=1))
