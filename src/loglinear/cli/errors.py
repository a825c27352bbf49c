"""Errors of the command line: one line each, with every option as it is typed."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from io import BytesIO, TextIOWrapper
from typing import Any, NoReturn, get_args


class UsageError(Exception):
    """Options that cannot be used, as one line."""


class Parser(argparse.ArgumentParser):
    """argparse, with errors of our style."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(kind: Any, argv: Sequence[str], prog: str) -> Any:
    """The dataclass ``kind`` (or one of a union) with the options in ``argv``.

    Raises UsageError for options that do not exist, and for values that do not fit or that ``kind`` refuses. ``--help``
    exits.
    """
    import tyro

    config = (tyro.conf.OmitArgPrefixes,)
    if wants_help(argv):
        return tyro.cli(kind, args=argv, prog=prog, config=config)
    printed = TextIOWrapper(BytesIO(), encoding="utf-8")
    try:
        with redirect_stdout(printed), redirect_stderr(printed), _wide_terminal():
            return tyro.cli(kind, args=argv, prog=prog, config=config)
    except ValueError as error:  # early versions of tyro let an error of the dataclass through
        raise UsageError(as_typed(str(error), option_types(kind))) from error
    except SystemExit as stop:
        printed.seek(0)
        raise UsageError(as_typed(_one_line(printed.read()), option_types(kind))) from stop


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the user asked for text that tyro prints: help, or a script that completes commands."""
    return any(word in ("-h", "--help") or word.startswith("--tyro-") for word in argv)


def option_types(kind: Any) -> dict[str, str]:
    """Name and type of the fields that are options: of a dataclass and of those in it, or of all dataclasses of a union."""
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return {name: kind for part in get_args(kind) for name, kind in option_types(part).items()}
    types: dict[str, str] = {}
    for field in fields(kind):
        if is_dataclass(field.default_factory):
            types |= option_types(field.default_factory)
        elif "Positional" not in str(field.type):
            types[field.name] = str(field.type)
    return types


def as_typed(message: str, names: Collection[str]) -> str:
    """``message`` with fields as options: "batch_size must be" is "--batch-size must be".

    A name of one word may be an ordinary word: it is a field where a statement about it begins, or in "name=value".
    """

    def option(match: re.Match) -> str:
        return "--" + match[0].replace("_", "-")

    compound = "|".join(sorted((name for name in names if "_" in name), key=len, reverse=True))
    single = "|".join(name for name in names if "_" not in name)
    if compound:
        message = re.sub(rf"(?<![\w./\\'\"-])(?:{compound})(?![\w/\\'\"-]|\.\w)", option, message)
    if single:
        begins = r"(?:^|(?<=[:;] )|(?<=and ))"
        message = re.sub(rf"{begins}(?:{single})(?=:| must | was | and [\w-]+:)", option, message)
        message = re.sub(rf"(?<= )(?:{single})(?==)", option, message)
    return message


def _one_line(printed: str) -> str:
    """The message that tyro printed in a box, without the box and the help below it."""
    lines = [line.strip("│").rstrip() for line in printed.splitlines()]
    sections: list[list[str]] = [[]]
    for line in lines:
        if line.startswith(("╭", "╰")):
            continue
        if line.strip("─ "):
            sections[-1].append(line)
        else:
            sections.append([])
    # Text that explains an option is indented further than the option.
    said = [" ".join(line.strip() for line in section if not line.startswith(" " * 8)) for section in sections]
    message = re.sub(r"^Error parsing (--[\w-]+):", r"\1:", said[0])
    message = re.sub(r"^Error parsing [\w.-]+: ", "", message)
    meant = [match[1] for section in said if (match := re.match(r"Perhaps you meant: +(--[\w-]+)", section))]
    more = [section for section in said if section.startswith("Available")]
    return "; ".join([message.removesuffix("."), *(f"did you mean {option}?" for option in meant[:1]), *more])


@contextmanager
def _wide_terminal() -> Iterator[None]:
    """tyro breaks its messages, and long paths in them, at the terminal's width."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def say(command: str, message: object) -> None:
    """The line on the standard error that a user sees."""
    print(f"{command}: {message}", file=sys.stderr)
