"""Recall in real text: repeats against brute force, definitions against a model that copies, λ against its definition."""

from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest
import torch
from stand_ins import StandIn, copy_after_match
from torch.nn.functional import cross_entropy

from loglinear import fenwick
from loglinear.layers.level_scale import LevelScale
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.tasks.lm import retrieval
from loglinear.tasks.lm.levels import draw_levels, level_counts, mean_level_scales
from loglinear.tasks.lm.repeats import by_distance, draw_repeats, repeat_distances
from loglinear.tasks.lm.retrieval import DEFINITION, PER_FILE, definitions, draw_retrieval, questions, retrieve
from loglinear.tasks.lm.tokenizer import train_tokenizer
from loglinear.tasks.lm.tokens import Tokens, Windows

# ------------------------------------------------------------------------------------------------------------- repeats


def brute_force(ids: np.ndarray, ngram: int) -> tuple[list[int], list[bool]]:
    distances, held = [], []
    for t in range(1, len(ids)):
        earlier = [s for s in range(ngram, t) if t >= ngram and (ids[s - ngram : s] == ids[t - ngram : t]).all()]
        distances.append(t - earlier[-1] if earlier else 0)
        held.append(bool(earlier) and bool(ids[earlier[-1]] == ids[t]))
    return distances, held


@pytest.mark.parametrize("ngram", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 4, 5, 120])
def test_repeats_are_those_of_brute_force(length, ngram):
    for seed in range(3):
        # Large ids, so that a product of a few of them would overflow.
        ids = np.random.default_rng(seed).integers(0, 3, length) * 2**40 + 2**50
        distances, held = repeat_distances(ids, ngram)
        assert (distances.tolist(), held.tolist()) == brute_force(ids, ngram)


def test_losses_are_gathered_by_distance():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 3, (5, 200))
    found = [repeat_distances(row) for row in ids]
    distances, held = (np.stack(part) for part in zip(*found))
    losses = rng.normal(3, 1, distances.shape).astype(np.float32)
    rows = by_distance(ids, losses)
    assert sum(row["tokens"] for row in rows) == distances.size
    assert [row["first"] for row in rows] == sorted(row["first"] for row in rows)
    for row in rows:
        chosen = (distances >= row["first"]) & (distances <= row["last"])
        assert row["tokens"] == chosen.sum()
        assert row["loss"] == pytest.approx(losses[chosen].mean(), rel=1e-5)
        if row["first"]:
            assert row["repeated_tokens"] == (chosen & held).sum()
            assert row["repeated_loss"] == pytest.approx(losses[chosen & held].mean(), rel=1e-5)
            assert row["repeated_counts"] == (chosen & held).sum(1).tolist()
            assert row["repeated_sums"][3] == pytest.approx(losses[3][(chosen & held)[3]].sum(), abs=1e-3)


def test_the_error_of_equal_sequences_is_that_of_their_means():
    """Where every sequence has the same number of tokens at a distance, the ratio's error is the plain one."""
    ids = np.tile([1, 2, 3, 4, 5, 6] * 4, (6, 1))
    losses = np.random.default_rng(0).normal(size=(6, 23))
    row = next(row for row in by_distance(ids, losses) if row["first"] == 4)
    means = losses[:, 9:].mean(1)  # from the fifth token of the second round on
    assert (row["last"], row["tokens"], row["repeated_tokens"]) == (7, 6 * 14, 6 * 14)
    assert row["loss"] == pytest.approx(means.mean())
    assert row["loss_standard_error"] == pytest.approx(means.std(ddof=1) / 6**0.5)
    assert by_distance(ids[:1], losses[:1])[-1]["loss_standard_error"] is None


# ----------------------------------------------------------------------------------------------------------- retrieval


def file_text(number: int, lines: int = 60) -> str:
    body = "".join(f"\tcall_{number}_{i}(a, b);\n" for i in range(lines))
    return f"/* file {number} */\n#define WIDTH_{number}\t\t0x{number}5  /* bits */\n{body}MAX_{number} = 7{number}\n{body}"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([file_text(i) for i in range(10, 14)], 400)


def test_definitions_are_found_in_c_and_python():
    text = (
        "#define PAGE_SHIFT 12\n  # define\tNAME_B\t(1UL)  // why\nCONST_A = 'ab' # yes\n"
        "#define FUNC(x) 12\n#define ONE1 1\n#define LONG_ONE 1 + 2\nlower = 12\nif CONST == 12:\nCALL_A = f(x, 2)\n"
    )
    found = [(match["c"] or match["py"], match["value"]) for match in DEFINITION.finditer(text)]
    assert found == [("PAGE_SHIFT", "12"), ("NAME_B", "(1UL)"), ("CONST_A", "'ab'")]


def test_a_definition_knows_its_tokens(tokenizer):
    text = file_text(21) + "#define TWICE 10\n#define TWICE 11\n"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    found, names = definitions(text, encoded["offset_mapping"])
    assert [(d.name, d.value) for d in found] == [("WIDTH_21", "0x215"), ("MAX_21", "721")]
    assert names == {"WIDTH_21": 1, "MAX_21": 1, "TWICE": 2}
    for definition in found:
        ids = encoded["input_ids"]
        assert tokenizer.decode(ids[definition.value_at : definition.stop]).strip() == definition.value
        head = tokenizer.decode(ids[definition.start : definition.value_at]).strip()
        assert head in (f"#define {definition.name}", f"{definition.name} =")
    assert definitions("no definition", [(0, 2), (2, 13)]) == ([], {})


def test_questions_ask_for_the_definition_at_their_distance(tokenizer):
    documents = [file_text(i) for i in range(30, 50)]
    pairs = list(questions(documents, tokenizer, (300, 900), samples=6))
    assert len(pairs) == 12
    for question, without in pairs:
        value = tokenizer.decode(question.ids[question.answer :]).strip()
        assert value == question.value
        text = tokenizer.decode(question.ids[: question.answer])
        assert text.count(question.name) == 2
        assert text.rstrip().removesuffix("=").rstrip().endswith(question.name)
        answer = question.ids[question.answer :].tolist()
        first = next(i for i in range(len(question.ids)) if question.ids[i : i + len(answer)].tolist() == answer)
        assert question.answer - first == question.distance
        assert tokenizer.decode(without.ids[: without.answer]).count(question.name) == 1
        assert tokenizer.decode(without.ids[without.answer :]).strip() == question.value
        assert 0 < question.own <= 1
    far = [question.own for question, _ in pairs if question.distance == 900]
    near = [question.own for question, _ in pairs if question.distance == 300]
    assert np.mean(far) < np.mean(near)


def test_a_name_that_a_later_file_defines_again_is_not_asked_behind_it(tokenizer):
    length = len(tokenizer(file_text(30))["input_ids"])
    documents = [file_text(30), file_text(31), file_text(30), *(file_text(i) for i in range(32, 40))]
    first = list(questions(documents, tokenizer, (length // 2, 3 * length), samples=2))
    assert {pair[0].distance for pair in first} == {length // 2}


def test_few_questions_come_from_one_file(tokenizer):
    table = "".join(f"#define ENTRY_{i} 0x{i}7\n" for i in range(40))
    documents = [table + file_text(50), *(file_text(i) for i in range(51, 60))]
    names = [pair[0].name for pair in questions(documents, tokenizer, (400,), samples=10)]
    assert sum(name.startswith("ENTRY") or name.endswith("50") for name in names) == PER_FILE
    assert len(names) == 10


def test_a_model_that_copies_finds_the_value_and_without_the_definition_does_not(tokenizer, tmp_path):
    documents = [file_text(i) for i in range(60, 80)]
    asked = list(questions(documents, tokenizer, (300, 900), samples=5))
    rows = retrieve(StandIn(len(tokenizer), copy_after_match), asked)
    assert [(row["distance"], row["questions"], row["exact"], row["without"]) for row in rows] == [
        (300, 5, 1.0, 0.0), (900, 5, 1.0, 0.0)
    ]  # fmt: skip
    assert all(row["loss"] < row["loss_without"] for row in rows)
    assert [row["right"] for row in rows] == ["11111"] * 2
    draw_retrieval({"copies": rows, "again": rows}, tmp_path / "figure.png")
    assert matplotlib.image.imread(tmp_path / "figure.png")[..., :3].min() < 0.5


def test_questions_side_by_side_are_answered_as_each_alone(tokenizer, monkeypatch):
    """Lengths of one batch differ, by the names and values and by the definition that half of them lack."""
    documents = [file_text(i) for i in range(60, 80)]
    asked = list(questions(documents, tokenizer, (300, 900), samples=5))
    torch.manual_seed(0)
    config = LogLinearConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, mamba_head_dim=16, mamba_state_size=8,
        max_position_embeddings=512, initializer_range=0.5,
    )  # fmt: skip
    model = LogLinearForCausalLM(config)
    together = retrieve(model, asked)
    losses: dict[int, list[float]] = {}
    for question, _ in asked:
        ids = torch.from_numpy(question.ids)[None]
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0, question.answer - 1 :]
        losses.setdefault(question.distance, []).append(float(cross_entropy(logits, ids[0, question.answer :])))
    for row in together:
        assert row["loss"] == pytest.approx(np.mean(losses[row["distance"]]), rel=1e-4)
    monkeypatch.setattr(retrieval, "BATCH_TOKENS", 2048)
    for row, other in zip(together, retrieve(model, asked), strict=True):
        assert [row["loss"], row["loss_without"]] == pytest.approx([other["loss"], other["loss_without"]], rel=1e-4)


def test_text_without_definitions_is_named(tokenizer):
    none = questions(["some text\n" * 100] * 3, tokenizer, (50,), samples=5)
    with pytest.raises(ValueError, match="found no definition"):
        retrieve(StandIn(len(tokenizer), copy_after_match), none)


# -------------------------------------------------------------------------------------------------------------- levels


@pytest.mark.parametrize(("length", "levels"), [(1, 1), (1, 4), (40, 7), (40, 4), (33, 1)])
def test_a_level_counts_as_often_as_a_token_has_a_bucket_there(length, levels):
    counts = level_counts(length, levels)
    for t in range(length):
        expected = [0] * levels
        expected[0] = 1
        for entry in fenwick.query_path(t):
            expected[min(fenwick.level(t, fenwick.bucket(entry).start), levels - 1)] += 1
        assert counts[t].tolist() == expected


@pytest.fixture
def model():
    config = LogLinearConfig(
        mixer=["log_linear_mamba2", "mamba2", "log_linear_gated_deltanet"], num_hidden_layers=3, vocab_size=50,
        hidden_size=24, mamba_head_dim=12, mamba_state_size=8, delta_num_heads=2, max_position_embeddings=16,
        initializer_range=0.5,
    )  # fmt: skip
    return LogLinearForCausalLM(config)


@pytest.fixture
def windows():
    values = np.random.default_rng(0).integers(0, 50, 5 * 40).astype(np.uint16)
    return Windows(Tokens(values, np.array([0, len(values)])), 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_scales_are_averages_over_tokens_with_a_bucket(dtype, model, windows, tmp_path):
    """Under autocast, too: averages of thousands of tokens must not be rounded to its eight bits."""
    scales: dict[int, torch.Tensor] = {}
    hooks = [
        layer.mixer.level_scale.register_forward_hook(lambda m, x, out, i=i: scales.update({i: out}))
        for i, layer in enumerate(model.model.layers)
        if i != 1
    ]
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model.eval()(torch.stack([windows[i]["input_ids"] for i in range(5)]))
    for hook in hooks:
        hook.remove()
    rows = mean_level_scales(model, windows, batch_size=2, dtype=dtype)
    assert [row["layer"] for row in rows] == ["model.layers.0", "model.layers.2"]
    for row, layer in zip(rows, (0, 2)):
        for head, means in enumerate(row["heads"]):
            for level, mean in enumerate(means):
                tokens = level_counts(40, len(means))[:, level].repeat(5)
                values = scales[layer][:, :, head, level].float().flatten()
                assert mean == pytest.approx(float((values * tokens).sum() / tokens.sum()), rel=1e-4)
    assert not any(module._forward_hooks for module in model.modules())
    draw_levels(rows, tmp_path / "levels.png")
    assert matplotlib.image.imread(tmp_path / "levels.png").shape[0] > 200


def test_levels_without_a_bucket_have_no_mean(model, windows):
    short = Windows(windows.tokens, 3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LevelScale):
                module.L.zero_()
    heads = [head for row in mean_level_scales(model, short, 8) for head in row["heads"]]
    ln2 = pytest.approx(np.log(2), rel=1e-5)
    assert all(head == [ln2, ln2, ln2, None, None] for head in heads)  # softplus(0); tokens 0 to 2 have two bits


def test_a_linear_model_has_no_levels(windows):
    config = LogLinearConfig(mixer="mamba2", num_hidden_layers=1, vocab_size=50, hidden_size=24, mamba_head_dim=12)
    with pytest.raises(ValueError, match="levels needs a model with a log-linear layer"):
        mean_level_scales(LogLinearForCausalLM(config), windows, 2)


def test_the_figure_of_repeats_leaves_gaps_where_one_sequence_cannot_tell(tmp_path):
    ids = np.random.default_rng(0).integers(0, 3, (1, 200))
    rows = by_distance(ids, np.ones((1, 199), np.float32))
    draw_repeats({"one": rows, "two": rows}, tmp_path / "repeats.png")
    assert matplotlib.image.imread(tmp_path / "repeats.png")[..., :3].min() < 0.5


def test_text_without_repeats_has_a_figure_too(tmp_path):
    rows = by_distance(np.arange(200)[None], np.ones((1, 199), np.float32))
    assert [row["first"] for row in rows] == [0]
    draw_repeats({"one": rows}, tmp_path / "repeats.png")
    assert (tmp_path / "repeats.png").exists()
