"""FASTA files as data: records, what is refused, tokens of single nucleotides and bytes, and the other strand."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from loglinear.tasks.lm.config import DataConfig
from loglinear.tasks.lm.data import load_data
from loglinear.tasks.lm.fasta import reverse_complement
from loglinear.tasks.lm.text_files import read_file
from loglinear.tasks.lm.tokenizer import built_in, num_ids

pytestmark = pytest.mark.default_packages
RECORDS = ">one, a header\nacgt\nNRUY\n\n>empty\n>two\nTTTTTTTTCC\n"


@pytest.fixture
def genome(tmp_path):
    path = tmp_path / "tiny.fna.gz"
    path.write_bytes(gzip.compress(RECORDS.encode()))
    return path


def test_records_are_documents_in_capitals_without_their_headers(genome):
    assert list(read_file(genome, "text")) == ["ACGTNRTY", "TTTTTTTTCC"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ACGT\n", "line 1: a FASTA file must begin with a header"),
        (">x\nAC\nAC-GT\n", "line 3 must hold nucleotides: got '-'"),
    ],
)
def test_what_is_no_fasta_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.fa"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_file(path, "text"))


def test_tokens_of_a_genome_are_its_nucleotides(genome, tmp_path):
    options = {"data": str(genome), "tokenizer": "nucleotides", "context": 4, "validation_fraction": 0.0}
    data = load_data(DataConfig(**options, cache=tmp_path / "cache"))
    assert num_ids(data.tokenizer) == 7
    assert data.train.tokens.values.tolist() == [0, 1, 2, 3, 4, 4, 3, 4, 5, *[3] * 8, 1, 1, 5]
    assert data.train.tokens.offsets.tolist() == [0, 9, 20]
    assert data.tokenizer("ACGR").input_ids == [0, 1, 2, 4]
    assert data.tokenizer.decode([0, 1, 2]) == "ACG"


def test_a_byte_is_a_token_also_in_the_cache(tmp_path):
    path = tmp_path / "some.txt"
    for text in ("Ab c\n", "Ä b"):  # by the table, and by the tokenizer
        path.write_text(text, encoding="utf-8")
        data = load_data(
            DataConfig(data=str(path), tokenizer="bytes", context=2, validation_fraction=0.0, cache=tmp_path / "c")
        )
        expected = built_in("bytes")(text).input_ids
        assert len(expected) == len(text.encode())
        assert data.train.tokens.values.tolist() == [*expected, data.tokenizer.eos_token_id]


def test_the_other_strand_is_read_backwards():
    assert reverse_complement(np.array([0, 0, 1, 3, 4, 5])).tolist() == [5, 4, 0, 2, 3, 3]
