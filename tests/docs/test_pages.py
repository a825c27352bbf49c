"""The pages that people follow keep their word: their Python runs, and the commands and options that they name exist."""

import re
import shlex
from pathlib import Path

import pytest

from loglinear.cli import COMMANDS, PROGRAMS, main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(page for folder in ("start", "guides", "concepts") for page in (DOCS / folder).glob("*.md"))
WIDEST = 92  # columns of code that a page shows without scrolling


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


RUNNABLE = [page for page in PAGES if blocks(page, "python")]


def name(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_python_of_a_page_runs_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    namespace = {"__name__": page.stem}
    for number, block in enumerate(blocks(page, "python"), 1):
        exec(compile(block, f"{name(page)}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_code_is_narrow_enough_to_read(page):
    wide = [line for block in blocks(page, "python") for line in block.splitlines() if len(line) > WIDEST]
    assert wide == []


def options_of(command: str, capsys) -> set[str]:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    return set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))


def commands(page: Path) -> list[list[str]]:
    """The commands of ours that a page names, in blocks and in running text, as lists of words."""
    text = page.read_text(encoding="utf-8")
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:loglinear|python -m loglinear\.cli) [^`]+)`", text)
    found = []
    for line in lines:
        ours = re.search(r"(?:^|\s)(?:loglinear|-m loglinear\.cli) (.+)", line.split(" #")[0])
        if ours and not ours[1].isupper():  # COMMAND stands for any
            found.append(shlex.split(ours[1]))
    return found


EVERY_PAGE = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])


def test_commands_and_options_named_in_the_pages_exist(capsys):
    unknown, seen, known = [], 0, {}
    for page in EVERY_PAGE:
        if page.name in ("lab-notes.md", "CHANGELOG.md"):  # dated: what they name may be gone
            continue
        for words in commands(page):
            if words[0] in ("--help", "--version"):
                continue
            if words[0] not in COMMANDS:
                unknown.append((page.name, words[0]))
                continue
            if words[0] in PROGRAMS:  # their options are others'
                continue
            parts = words[:2] if words[0] == "niah" and len(words) > 1 and words[1].isalpha() else words[:1]
            command = " ".join(parts)
            if command not in known:
                known[command] = options_of(command, capsys)
            named = {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)} - {"--help"}
            unknown += [(page.name, command, option) for option in sorted(named - known[command])]
            seen += len(named)
    assert unknown == []
    assert seen > 20


def test_options_in_running_text_of_the_training_pages_exist(capsys):
    """These pages name options alone, such as `--fsdp`."""
    known = options_of("train", capsys)
    for page in (DOCS / "guides/train.md", DOCS / "start/sizes.md", DOCS / "data.md"):
        named = set(re.findall(r"`(--[a-z][\w-]*)", page.read_text(encoding="utf-8")))
        assert named - known == set(), page.name
