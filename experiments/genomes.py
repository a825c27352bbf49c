"""Bacterial chromosomes from three Debian packages, as FASTA: ``python experiments/genomes.py OUT [--download FOLDER]``.

Writes OUT/train.fna.gz and OUT/held_out.fna.gz, which has all chromosomes of one species, and OUT/genomes.json, the list. The
packages are those of Debian 12. Each is fetched from the mirror, unless it lies in the download folder, and its SHA-256 is
checked. Contigs of assemblies and second copies are left out. Nothing of it is committed.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from debian import fetch, files

PACKAGES = {
    "r/ragout/ragout-examples_2.3-4_all.deb": "cbe6d0dd8b0e36ef2c93c9b9655955f42019dcd9e9b77388ee58ee54d50bd140",
    "s/sibelia/sibelia-examples_3.0.7+dfsg-3_all.deb": "ed55a9283215883a68a97db2a0bafbe66469dc7c04efcdd058f5fdd8bf3f552d",
    "k/kleborate/kleborate-examples_2.3.1-2_all.deb": "6039a0ee139e0b5f8a288f2bba298326419dc856c166e53e27da319c2d9ce29f",
}
NAMES = re.compile(r"\.(fna|fasta)\.(gz|xz)$")
SPECIES = {"E.Coli": "Escherichia coli", "H.Pylori": "Helicobacter pylori", "Helicobacter": "Helicobacter pylori"}
SPECIES |= {"S.Aureus": "Staphylococcus aureus", "Staphylococcus": "Staphylococcus aureus"}
SPECIES |= {"V.Cholerae": "Vibrio cholerae", "kleborate": "Klebsiella pneumoniae"}
HELD_OUT = "Escherichia coli"
CHROMOSOME = 900_000  # nucleotides: the shortest chromosome has 1.05 million, the longest plasmid and contig less


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--download", type=Path, help="folder of the packages; none: OUT")
    parser.add_argument("--held-out", default=HELD_OUT, choices=sorted(set(SPECIES.values())))
    options = parser.parse_args()
    folder = options.download or options.out
    for path in (folder, options.out):
        path.mkdir(parents=True, exist_ok=True)
    packages = [fetch(name, digest, folder) for name, digest in PACKAGES.items()]
    write(chromosomes(file for package in packages for file in fasta_files(package)), options.out, options.held_out)


def fasta_files(package: bytes) -> Iterator[tuple[str, bytes]]:
    """(path, text) of the FASTA files in a Debian package."""
    for path, content in files(package, NAMES):
        yield path, (lzma.decompress if path.endswith(".xz") else gzip.decompress)(content)


def chromosomes(files: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, str, bytes]]:
    """(species, header, nucleotides) of every chromosome, each once."""
    seen: set[bytes] = set()
    for path, text in files:
        species = next(species for mark, species in SPECIES.items() if mark in path)
        for record in text.split(b">")[1:]:
            header, _, lines = record.partition(b"\n")
            sequence = b"".join(lines.split()).upper()
            digest = hashlib.sha256(sequence).digest()
            if len(sequence) >= CHROMOSOME and "contigs" not in path and digest not in seen:
                seen.add(digest)
                yield species, header.decode().strip(), sequence


def write(found: Iterator[tuple[str, str, bytes]], out: Path, held_out: str) -> None:
    """The two files and the list."""
    described = []
    with zipped(out / "train.fna.gz") as train, zipped(out / "held_out.fna.gz") as other:
        for species, header, sequence in found:
            file = other if species == held_out else train
            file.write(b">%s\n%s\n" % (header.encode(), sequence))
            digest = hashlib.sha256(sequence).hexdigest()
            described.append({"species": species, "header": header, "nucleotides": len(sequence), "sha256": digest})
    (out / "genomes.json").write_text(json.dumps({"held_out": held_out, "chromosomes": described}, indent=1) + "\n")
    for species in sorted({one["species"] for one in described}):
        lengths = [one["nucleotides"] for one in described if one["species"] == species]
        print(
            f"{species}: {len(lengths)} chromosomes, {sum(lengths):,} nucleotides"
            + ", held out" * (species == held_out)
        )
    print(f"{len(described)} chromosomes, {sum(one['nucleotides'] for one in described):,} nucleotides")


def zipped(path: Path) -> IO[bytes]:
    return gzip.GzipFile(path, "wb", compresslevel=1, mtime=0)  # type: ignore[return-value]


if __name__ == "__main__":
    main()
