"""Questions about a dictionary: its entries in a package, documents of whole entries, and a fine-tune that lowers the loss."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import pytest
import torch

import documents
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.tasks.lm.retrieval import questions
from loglinear.tasks.lm.tokenizer import train_tokenizer

pytestmark = pytest.mark.default_packages
ENTRY = (
    "{name}\n    n 1: {first} {name} with a long\n         tail; more of it [syn: {{other}}]\n    2: another meaning\n"
)
NAMES = [a + b for a in ("apple", "birch", "cedar", "damson") for b in (" tree", " wood", " leaf", " fruit", " bark")]
TEXT = "".join(
    ENTRY.format(name=name, first=first) for name, first in zip(NAMES, ("tall", "small", "green", "sweet", "dry") * 4)
)


def test_the_dictionary_of_a_package_is_cut_at_headwords(monkeypatch):
    archive, content = io.BytesIO(), gzip.compress(TEXT.encode())
    with tarfile.open(fileobj=archive, mode="w:xz") as tar:
        entry = tarfile.TarInfo("./usr/share/dictd/wn.dict.dz")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    size = len(archive.getvalue())
    package = (
        b"!<arch>\n"
        + f"{'data.tar.xz':16}{'0':12}{'0':6}{'0':6}{'100644':8}{size:<10}`\n".encode()
        + archive.getvalue()
    )
    assert documents.dictionary(package) == TEXT
    monkeypatch.setattr(documents, "PART", 300)
    parts = list(documents.parts(TEXT))
    assert "".join(parts) == TEXT
    assert len(parts) > 3
    assert all(part[0].isalpha() for part in parts)


def test_the_value_of_a_headword_is_the_first_words_of_its_first_meaning():
    found = [(match["name"], match["value"]) for match in documents.HEADWORD.finditer(TEXT)]
    assert len(found) == len(NAMES)
    assert found[0] == ("apple tree", "tall apple tree with a long")


def test_tuned_models_know_more_and_the_rows_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BATCH_TOKENS", 1024)
    tokenizer = train_tokenizer([TEXT], 258)
    asked = [one for one, _ in questions([TEXT] * 4, tokenizer, (200,), 12, 0, documents.HEADWORD)]
    assert {one.value for one in asked} <= {match["value"] for match in documents.HEADWORD.finditer(TEXT)}
    torch.manual_seed(0)
    sizes = {"mamba_num_heads": 2, "mamba_head_dim": 16, "mamba_state_size": 8, "hidden_size": 32}
    model = LogLinearForCausalLM(LogLinearConfig(vocab_size=512, num_hidden_layers=1, intermediate_size=0, **sizes))
    losses = documents.tune(model, asked[:4], 10, 1e-2, torch.float32)
    assert losses[-1] < losses[0] - 0.5
    (tmp_path / "valid.jsonl").write_text(json.dumps({"text": TEXT}) + "\n" + json.dumps({"text": TEXT}) + "\n")
    options = documents.argparse.Namespace(distances=(200,), questions=3, kind="headword")
    (row,) = documents.answers(model, tokenizer, tmp_path / "valid.jsonl", options)
    assert row["questions"] == 3
    assert row["perplexity"] == pytest.approx(torch.tensor(row["loss"]).exp().item(), rel=1e-4)
