"""The genome experiment: repeats on both strands, long filters, chromosomes of a package, and a tiny run in two halves."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch

import debian
import genome
import genomes
from long_filter import LongFilter
from strands import by_strand, reverse_distances

pytestmark = pytest.mark.default_packages
RNG = np.random.default_rng(0)


def by_search(ids, ngram):
    """Distance and whether it held, with loops."""
    distances, held = [0] * (len(ids) - 1), [False] * (len(ids) - 1)
    for token in range(ngram, len(ids)):
        wanted = [3 - x for x in reversed(ids[token - ngram : token])]
        for b in range(token - 2 * ngram, 0, -1):
            if list(ids[b : b + ngram]) == wanted:
                distances[token - 1], held[token - 1] = token - b + 1, ids[token] == 3 - ids[b - 1]
                break
    return distances, held


def test_repeats_on_the_other_strand_are_those_that_a_search_finds():
    ids = RNG.integers(0, 4, 200)
    ids[150:170] = (3 - ids[40:60])[::-1]
    distances, held = reverse_distances(ids, ngram=3)
    expected, expected_held = by_search(ids.tolist(), 3)
    assert distances.tolist() == expected
    assert held.tolist() == expected_held
    assert 0 < held.sum() < len(held)


def test_each_prediction_is_in_one_row():
    ids = RNG.integers(0, 4, (3, 300))
    ids[:, 200:240] = ids[:, 20:60]
    ids[:, 250:290] = (3 - ids[:, 100:140])[:, ::-1]
    losses = RNG.random((3, 299)).astype(np.float32)
    rows = by_strand(ids, losses, ngram=8)
    assert sum(row["tokens"] for row in rows) == losses.size
    assert sum(row["tokens"] * row["loss"] for row in rows) == pytest.approx(losses.sum(), rel=1e-5)
    repeated = {
        name: sum(row.get("repeated_tokens", 0) for row in rows if row["strand"] == name) for name in ("same", "other")
    }
    assert repeated["same"] >= 3 * 32
    assert repeated["other"] >= 3 * 32


def test_a_long_filter_is_the_sum_over_the_past():
    torch.manual_seed(0)
    layer = LongFilter(8, 6, 32)
    x = torch.randn(2, 20, 8)
    mixed = layer.short(layer.in_proj(x).transpose(1, 2))[..., :20]
    q, k, v = mixed.chunk(3, dim=1)
    u, h = k * v, layer.filters(20)
    y = (
        torch.stack([sum(h[:, t - s] * u[..., s] for s in range(t + 1)) for t in range(20)], -1)
        + layer.skip[:, None] * u
    )
    torch.testing.assert_close(layer(x)[0], layer.out_proj((q * y).transpose(1, 2)), rtol=1e-4, atol=1e-5)


def test_chromosomes_come_out_of_a_package_once_and_its_hash_is_checked(monkeypatch, tmp_path):
    monkeypatch.setattr(genomes, "CHROMOSOME", 8)
    files = {
        "E.Coli/a.fasta.gz": b">one\nACGT\nacgt\n>short\nAC\n",
        "S.Aureus/b.fasta.gz": b">copy\nACGTACGT\n>two\nTTTTTTTTT\n",
    }
    files["S.Aureus/c_contigs.fasta.gz"] = b">contig\nGGGGGGGGG\n"
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as archive:
        for name, text in files.items():
            content = gzip.compress(text)
            entry = tarfile.TarInfo(f"./usr/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    content = b"!<arch>\n"
    for name, member in (("debian-binary", b"2.0\n"), ("data.tar.xz", inner.getvalue())):
        content += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(member):<10}`\n".encode()
            + member
            + b"\n" * (len(member) % 2)
        )
    found = list(genomes.chromosomes(genomes.fasta_files(content)))
    assert found == [("Escherichia coli", "one", b"ACGTACGT"), ("Staphylococcus aureus", "two", b"TTTTTTTTT")]
    genomes.write(iter(found), tmp_path, "Escherichia coli")
    assert gzip.decompress((tmp_path / "held_out.fna.gz").read_bytes()) == b">one\nACGTACGT\n"
    (tmp_path / "p.deb").write_bytes(content)
    with pytest.raises(ValueError, match=r"p.deb must have the SHA-256 0+: got"):
        debian.fetch("x/p.deb", "0" * 64, tmp_path)


@pytest.mark.parametrize("mixer", ["log_linear_mamba2", "long_filter"])
def test_a_run_that_was_stopped_goes_on_and_has_a_row(mixer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(genome, "LAYERS", {mixer: 1})
    for name in ("train", "held_out"):
        letters = np.array(list("ACGT"))[RNG.integers(0, 4, 600)]
        (tmp_path / f"{name}.fna.gz").write_bytes(gzip.compress(f">{name}\n{''.join(letters)}\n".encode()))
    words = [
        str(tmp_path),
        str(tmp_path / "out"),
        "--context",
        "64",
        "--contexts",
        "64",
        "128",
        "--steps",
        "4",
        "--width",
        "64",
    ]
    monkeypatch.setattr(sys, "argv", ["genome.py", *words, "--mixers", mixer, "--tokens", "256", "--seconds", "10"])
    genome.main()  # no time is left: a checkpoint of nothing
    assert not (tmp_path / "out" / "genome.jsonl").exists()
    sys.argv[-1] = "600"
    genome.main()
    genome.main()  # what is done is not done again
    (line,) = (tmp_path / "out" / "genome.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert [one["context"] for one in row["evaluations"]] == [64, 128]
    assert all(0.5 < one["loss"] < 3 for one in row["evaluations"])
