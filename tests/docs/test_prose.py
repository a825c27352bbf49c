"""The check of prose finds what it should, on the right line, and leaves code alone."""

import importlib.util
from pathlib import Path

import pytest

PROSE = Path(__file__).parents[2] / "docs" / "prose.py"
spec = importlib.util.spec_from_file_location("prose", PROSE)
prose = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prose)


@pytest.fixture
def check(tmp_path, capsys):
    """(status, printed lines without the path) for the text of one file."""

    def run(text: str, name: str = "page.md") -> tuple[int, list[str]]:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        status = prose.main([str(path)])
        return status, [line.removeprefix(f"{path}:") for line in capsys.readouterr().out.splitlines()]

    return run


BAD = [
    "What there is none of is x instead.",
    "A model reads tokens. What is left is dropped.",
    "- **What was found.** Nothing.",
    "The first kernel is fast. That of the\nsecond is slow.",
    "Three models, of which there are two sizes.",
    "A state. None if there is no token.",
    "Special about this file: nothing.",
    "A number that can not be read.",
    "The former is faster.",
    "We utilise a kernel in order to run.",
]


@pytest.mark.parametrize("text", BAD)
def test_the_vocabulary_finds(check, text):
    status, lines = check(f"# Title\n\n{text}\n")
    assert status == 1
    assert lines[0].startswith("3:")


def test_every_phrase_of_the_vocabulary_is_tried_by_an_example():
    found = {pattern.pattern for pattern, _ in prose.rules() for text in BAD if pattern.search(text)}
    rest = [pattern.pattern for pattern, _ in prose.rules() if pattern.pattern not in found]
    others = (
        "Of the two one is fast.",
        "A state is made anew.",
        "A tree, wherein buckets lie.",
        "Whoever reads.",
        "Of course.",
    )
    assert [p for p in rest if not any(prose.re.search(p, text, prose.re.I) for text in others)] == []


def test_proselint_reads_pages(check):
    status, lines = check("# Title\n\nA good line.\n\nIt is a very\nunique line of of text.\n")
    assert status == 1
    assert {line.split(":")[0] for line in lines} == {"5", "6"}


def test_good_sentences_pass(check):
    text = "# What the page holds\n\nIt asks: what is a level? A level is a number.\n\n| what it does | none if |\n|---|---|\n"
    assert check(text) == (0, [])


def test_code_formulas_and_links_are_no_prose(check):
    text = "Run `x anew`, see [page](anew.md).\n\n```bash\nanew # of of\n```\n\n    anew\n\n$x$ is $x$ $x$. <!-- anew -->\n"
    assert check(text) == (0, [])
    assert check(f"{text}\nIt is anew.\n") == (1, ["11: 'anew': again"])


def test_docstrings_and_comments_are_read_and_code_is_not(check):
    code = 'anew = "anew"\n\n\ndef f():\n    """A line.\n\n    Made anew.\n    """\n'
    text = f"{code}    # A comment.\n    # Those of the\n    # others.\n    x = 1  # None if odd\n"
    assert check(text, "module.py") == (1, ["7: 'anew': again", "10: 'Those of': repeat the noun"])


def test_everything_that_lint_reads_exists():
    paths = [path for pattern in (*prose.PAGES, *prose.CODE) for path in prose.ROOT.glob(pattern)]
    assert {"README.md", "CHANGELOG.md", "algorithm.md", "lab-notes.md", "lift.py"} <= {path.name for path in paths}
    assert len(paths) > 200
