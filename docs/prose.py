"""Reads the prose of the project: proselint and the project's own vocabulary.

    python docs/prose.py              # what `make lint` runs: every page, and the docstrings and comments of the code
    python docs/prose.py FILE ...

Pages are read by both, code by the vocabulary alone. Fenced code, inline code, formulas and link targets are no prose and are
left out. Lab notes are dated and stay as they are. The command prints one line for each finding, and ends with status 1 if
there are any.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tomllib
from proselint.checks import __register__
from proselint.config import DEFAULT, Config
from proselint.registry import CheckRegistry
from proselint.tools import LintFile

ROOT = Path(__file__).parents[1]
VOCABULARY = ROOT / "docs" / "vocabulary.toml"
PAGES = ("*.md", "docs/**/*.md", "examples/*.md")
CODE = ("src/**/*.py", "benchmarks/*.py", "experiments/**/*.py", "docs/*.py", "examples/*.py")
DATED = ("lab-notes.md",)

# Keyboards have straight quotes and three dots, "resume" is an option, and a range of tokens is no date.
OFF = ("typography.symbols", "typography.diacritical_marks", "dates_times.dates.dash_and_from")
NAMES = ("needle in a haystack",)  # of a task, no cliché here
CHECKS = {**{name: False for name in OFF}, **DEFAULT["checks"]}

NO_PROSE = re.compile(
    r"^(?P<fence>```|~~~).*?^(?P=fence)[ \t]*$"  # fenced code
    r"|^(?: {4,}|\t)\S[^\n]*$(?<!:   \S)"  # indented code
    r"|<!--.*?-->|<[^>\n]+>"  # comments and tags of HTML
    r"|\$\$.*?\$\$|\$[^$\n]+\$"  # formulas
    r"|``[^`]+``|`[^`]+`"  # inline code
    r"|(?<=\])\([^)\n]*\)|https?://\S+",  # the targets of links
    re.M | re.S,
)


LABEL = "_ "  # no sentence begins behind it


class Block(NamedTuple):
    """A paragraph, a docstring or a comment: its text, and the line of the file on which it begins."""

    line: int
    text: str


class Finding(NamedTuple):
    line: int
    message: str


def page_blocks(text: str) -> Iterator[Block]:
    """Paragraphs and table cells of a page, without code. Inline code becomes a word, so that its sentence stays one."""

    def blank(match: re.Match) -> str:
        inline = match[0].startswith("`") and not match["fence"]
        return (f"x{match.start()}" if inline else "") + "\n" * match[0].count("\n")

    line = 1
    for paragraph in re.split(r"(\n(?:[ \t]*\n)+)", NO_PROSE.sub(blank, text)):
        for piece in re.split(r"(?m)^(?=#|[ \t]*(?:[-*]|\d+\.) |\|)", paragraph):
            cells = piece.split("|") if piece.lstrip().startswith("|") else [piece]
            for cell in cells:
                if re.search(r"\w", cell):
                    yield Block(line, cell)
                line += cell.count("\n")


def code_blocks(text: str) -> Iterator[Block]:
    """Docstrings and comments of a module; comments on neighbouring lines are one block."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield Block(node.body[0].lineno, docstring)
    comments: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            line, words = token.start[0], token.string.lstrip("# ")
            if token.line[: token.start[1]].strip():  # behind code stands a label, which need not be a sentence
                yield Block(line, f"{LABEL}{words}")
            elif comments and line == comments[-1][0] + 1:
                comments.append((line, words))
            else:
                yield from _joined(comments)
                comments = [(line, words)]
    yield from _joined(comments)


def _joined(comments: list[tuple[int, str]]) -> Iterator[Block]:
    if comments:
        yield Block(comments[0][0], "\n".join(words for _, words in comments))


def rules(path: Path = VOCABULARY) -> list[tuple[re.Pattern, str]]:
    """The vocabulary, as patterns with their advice."""
    start = r"(?:\A|(?<=[.!?:]\s)|(?<=[.!?]\*\*\s)|\n\n)\s*(?:[-*] )?\**"
    places = {"start": (start, re.NOFLAG), "anywhere": (r"\b", re.IGNORECASE)}
    found = []
    for place, phrases in tomllib.loads(path.read_text(encoding="utf-8")).items():
        before, flags = places[place]
        found += [(re.compile(before + phrase, flags), advice) for phrase, advice in phrases.items()]
    return found


def by_vocabulary(block: Block, vocabulary: list[tuple[re.Pattern, str]]) -> Iterator[Finding]:
    for pattern, advice in vocabulary:
        for match in pattern.finditer(block.text):
            words = " ".join(match[0].split())
            lead = len(match[0]) - len(match[0].lstrip())
            line = block.line + block.text[: match.start() + lead].count("\n")
            yield Finding(line, f"'{words}': {advice}")


def by_proselint(block: Block) -> Iterator[Finding]:
    for result in LintFile("block", block.text).lint(Config(max_errors=100, checks=CHECKS)):
        found = result.check_result
        if any(name in found.message.lower() for name in NAMES):
            continue
        before = f"\n{block.text}"[: found.span[0]]  # proselint counts from a line break that it puts in front
        yield Finding(block.line + before.count("\n") - 1, f"{' '.join(found.message.split())} ({found.check_path})")


def findings(path: Path, vocabulary: list[tuple[re.Pattern, str]]) -> list[Finding]:
    """All findings in a page or a module, in the order of lines."""
    text = path.read_text(encoding="utf-8")
    found: list[Finding] = []
    for block in page_blocks(text) if path.suffix == ".md" else code_blocks(text):
        found += by_vocabulary(block, vocabulary)
        if path.suffix == ".md":
            found += by_proselint(block)
    return sorted(set(found))


def main(names: list[str]) -> int:
    registry = CheckRegistry()
    if not registry.checks:
        registry.register_many(__register__)
    paths = [Path(name) for name in names]
    if not names:
        paths = [path for pattern in (*PAGES, *CODE) for path in sorted(ROOT.glob(pattern)) if path.name not in DATED]
    vocabulary, count = rules(), 0
    for path in paths:
        for line, message in findings(path, vocabulary):
            print(f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{line}: {message}")
            count += 1
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
