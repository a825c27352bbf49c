"""The additions of the site to mkdocs: formulas as MathML, the options of the commands, and the changelog as a page.

mkdocs calls the functions named ``on_...`` while it builds. Formulas are made here, so that a page loads no script for them.
"""

from __future__ import annotations

import contextlib
import html
import io
import os
import re
from pathlib import Path

from latex2mathml.converter import convert

from loglinear.cli import main

ROOT = Path(__file__).parents[1]
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
OPTIONS = re.compile(r"^<!-- options: (.+) -->$", re.M)


def on_page_markdown(markdown: str, page, **_) -> str:
    """The changelog as it stands in the repository, and the help of each command where the page names it."""
    if page.file.src_uri == "changelog.md":
        return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    return OPTIONS.sub(lambda match: help_of(match[1]), markdown)


def on_page_content(content: str, **_) -> str:
    """Formulas in LaTeX become MathML, which browsers draw themselves."""

    def draw(match: re.Match) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]), display=display)

    return FORMULA.sub(draw, content)


def help_of(command: str) -> str:
    """The output of ``loglinear COMMAND --help`` as Markdown: a list of options with their meaning."""
    printed, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "92"
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([*command.split(), "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    usage, _, *rest = printed.getvalue().replace(str(Path.home()), "~").splitlines()
    blocks, section = [f"`{usage.removeprefix('usage: ')}`"], ""
    for line in rest:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if not text.strip("-"):
            continue
        if indent == 1:
            section = text
            blocks.append(f"**{section.capitalize()}**")
        elif indent == 2 and (text.startswith("-") or section == "positional arguments"):
            option, _, meaning = text.partition("  ")
            blocks.append(f"`{option}`\n:   {plain(meaning)}")
        elif indent > 2:
            blocks[-1] += f" {plain(text)}"
        else:
            blocks.append(plain(text))
    return "\n\n".join(block for block in blocks if not block.startswith("`-h,"))


def plain(text: str) -> str:
    """Text whose characters mean themselves in Markdown."""
    return re.sub(r"([*_`<\[$|])", r"\\\1", text.strip())
