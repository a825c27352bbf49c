"""The pages keep their word: the README's code runs, its commands exist, links lead somewhere, pictures match the code."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from loglinear import fenwick
from loglinear.models.sizes import parameter_table

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text(page), re.M | re.S)


def test_readme_code_runs_as_it_stands(installed, tmp_path):
    """With the installed wheel, warnings as errors, away from the checkout. What it generates needs no cache to be right."""
    (block,) = code_blocks(ROOT / "README.md", "python")
    lines = [line for line in block.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 20
    uncached = "print(model.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=False)[0].tolist())"
    script = f"import torch\ntorch.manual_seed(0)\n{block}\n{uncached}"
    command = [installed / "python", "-W", "error", "-W", "ignore::DeprecationWarning", "-c", script]
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    state, generated, recomputed = done.stdout.splitlines()
    assert re.fullmatch(r"1000 tokens in [\d,]+ bytes", state)
    assert generated == recomputed
    assert len(json.loads(generated)) == 23


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", text(page))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


def test_files_named_in_the_docs_exist():
    """Paths in back quotes that start at a folder of the repository."""
    named = {
        (page.name, path)
        for page in PAGES
        for path in re.findall(
            r"`((?:src|tests|docs|benchmarks|experiments|reference|examples)/[\w./]+?)/?`", text(page)
        )
    }
    assert len(named) > 5
    roots = (ROOT, ROOT / "src" / "loglinear")
    assert {(page, path) for page, path in named if not any((root / path).exists() for root in roots)} == set()


def test_make_targets_named_in_the_pages_exist():
    targets = set(re.findall(r"^([\w-]+):", text(ROOT / "Makefile"), re.M))
    named = {target for page in PAGES for target in re.findall(r"(?:^|`)make ([\w-]+)", text(page), re.M)}
    assert {"demo", "test"} <= named <= targets


def test_commands_named_in_the_readme_exist():
    from loglinear.cli import COMMANDS

    named = {
        name
        for block in code_blocks(ROOT / "README.md", "bash")
        for name in re.findall(r"^loglinear (\w+)", block, re.M)
    }
    assert named == set(COMMANDS) - {"demo"}  # demo is `make demo`


def test_the_picture_of_eight_tokens_is_the_partition():
    rows = re.findall(r"^ +t=(\d) +([\d ]+)$", text(ROOT / "docs" / "algorithm.md"), re.M)
    drawn = {(int(t), s): int(level) for t, levels in rows for s, level in enumerate(levels.split())}
    assert drawn == {(t, s): fenwick.level(t, s) for t in range(8) for s in range(t + 1)}


def test_the_table_of_sizes_is_what_the_models_count():
    assert parameter_table() in text(ROOT / "docs" / "models.md")
