"""Sections of the page with one or two seeds: recipes, lifted pairs, documents and a genome."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from collect_stacks import collect
from reporting import smaller
from text_stacks import Copy

pytestmark = pytest.mark.default_packages


def test_a_recipe_has_the_spread_of_its_seeds_and_says_what_weights_and_order_do():
    base = Copy("mamba2", "", 0.008, 200, 200, part="recipe")
    losses = {
        base: 3.0,
        replace(base, seed=1, order=1): 3.2,
        replace(base, seed=2, part="recipe: weights"): 3.05,
        replace(base, order=2, part="recipe: order"): 2.9,
        replace(base, steps=1800, part="recipe: batch 2"): 2.5,
        replace(base, part="sweep"): 9.0,
    }
    text = smaller.recipe_lines([{"copy": asdict(copy), "validation": loss} for copy, loss in losses.items()])
    assert "| Mamba-2 | 0.008 | 4 | 0 | 0.05 | 2 | 3.1000 | 0.1414 |" in text
    assert "| Mamba-2 | 0.008 | 2 | 0 | 0.05 | 1 | 2.5000 |  |" in text
    assert "the loss by +0.0500, another order with the same weights by -0.1000" in text[-2]


def test_a_start_of_lambda_is_compared_with_one_on_equal_seeds():
    one = Copy("log_linear_mamba2", "one", 0.008, 300, 300, part="start")
    losses = {one: 3.0, replace(one, seed=301, order=301): 3.2, replace(one, part="fresh"): 9.0}
    losses |= {
        replace(copy, start="noise"): loss + more for (copy, loss), more in zip([*losses.items()][:2], (0.02, -0.04))
    }
    text = smaller.start_lines([{"copy": asdict(copy), "validation": loss} for copy, loss in losses.items()])
    assert "| Log-Linear Mamba-2 | noise | 2 | 3.0900 | 0.0990 | −0.0100 ± 0.0300 | 1 of 2 |" in text
    assert "| Log-Linear Mamba-2 | one | 2 | 3.1000 | 0.1414 |  |  |" in text


def test_lifted_is_compared_with_plain_of_the_same_base():
    losses, needles = [], []
    for seed, gain in ((0, -0.02), (1, -0.04)):
        for kind, more in (("plain", 0.0), ("lifted", gain)):
            evaluation = {"per_sequence": {"edges": [0, 2, 4], "losses": [[1.0 + more] * 2, [2.0 + more] * 2]}}
            shared = {"base": f"mamba2-s{seed}", "kind": kind}
            losses.append(shared | {"evaluations": {"16384-document": evaluation}, "parameters": 4e7, "tokens": 1e8})
            cells = [{"kind": name, "right": "1" if kind == "plain" else "10"[seed]} for name in smaller.NEEDLES]
            needles.append(shared | {"tune_seed": 1, "cells": cells})
    text = smaller.lifted_lines(losses, needles)
    assert "| perplexity, 16K | Mamba-2 | −2.96 ± 1.00% | 2 models | 2 |" in text
    assert "| needles, 4 keys, to 16K | Mamba-2 | −50.0 ± 50.0 points | 2 fine-tunes | 0 |" in text


def test_documents_and_a_genome_go_from_collected_rows_to_tables(tmp_path):
    after = [{"distance": 1024, "exact": 0.25, "without": 0.125, "perplexity": 2.0, "perplexity_without": 4.0}]
    document = {"checkpoint": "mamba2-s8", "kind": "define", "steps": 4, "questions": 8, "after": after}
    run = {"mixer": "mamba2", "steps": 2, "batch": 1, "context": 1024}
    repeats = [{"strand": "same", "repeated_tokens": n, "repeated_loss": loss} for n, loss in ((1, 1.0), (3, 2.0))]
    rows = [document]
    for mixer, losses in (("mamba2", [[1.0], [2.0]]), ("log_linear_mamba2", [[0.9], [1.7]])):
        per_sequence = {"edges": [0, 4], "losses": losses}
        one = {"context": 1024, "loss": 1.5, "repeats": repeats, "per_sequence": per_sequence}
        rows.append({"run": run | {"mixer": mixer}, "parameters": 1e7, "evaluations": [one]})
    found = collect(rows, tmp_path)
    assert "| Mamba-2 | 1,024 | 25.0% | 12.5% | 2.00 | 4.00 |" in smaller.document_lines(found["documents"])
    text = smaller.genome_lines(found["genome"])
    assert "| Mamba-2 | 1.5000 | 1.7500 |  |" in text
    assert "−0.2000 ± 0.1000 at 1,024" in text[-2]
