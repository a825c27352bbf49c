"""The command line: ``loglinear COMMAND``. Each command is a module here, imported only when it is asked for.

A command's module holds ``<Command>Args``, a dataclass whose fields are the options, and a function of the command's
name that takes it. ``main`` finds both by name. A module that also reads options from a file has a function ``parse``. A
command of ``PROGRAMS`` is a program of another package: its function takes the words as they are.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from typing import NoReturn

from loglinear import __version__
from loglinear.cli.errors import Parser, UsageError, as_typed, option_types, parse, say
from loglinear.extras import explained
from loglinear.training.config import Contradiction

COMMANDS = {
    "train": "train a language model on text, or go on with an interrupted run",
    "lift": "make a linear model log-linear: the same model until it is trained",
    "evaluate": "perplexity and loss by position of a checkpoint",
    "niah": "needle in a haystack: samples, a short fine-tune, and the heatmap of length and depth",
    "generate": "continue a prompt and show the size of the state",
    "convert": "write a checkpoint of another library as one of ours",
    "demo": "train Log-Linear Mamba-2 and its linear twin on this Python's sources, and compare them",
    "mqar": "train small models on associative recall side by side, and compare how many pairs they recall",
    "masks": "draw the attention masks side by side",
    "serve": "transformers serve: answer requests over HTTP with a checkpoint",
    "harness": "lm_eval: run tasks of the evaluation harness on a checkpoint",
}
PROGRAMS = {"serve": "serve", "harness": "eval"}  # and the extra that brings them
FAILURE, USAGE, INTERRUPTED, CLOSED, TERMINATED = 1, 2, 130, 141, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status.

    0: success. 1: a failure, printed as one line. 2: options that cannot be used, or that contradict a record or a
    checkpoint. 130: interrupted. 143: SIGTERM. 141: the reader of the output has gone. The user can mend a ValueError and a
    file that cannot be read or written, so these print as one line. With LOGLINEAR_TRACEBACK=1 in the environment they keep
    their traceback, as every other error does.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        with _ended_by_sigterm():
            try:
                return _run(argv)
            finally:
                sys.stdout.flush()  # an output that cannot be written fails here, not when the interpreter ends
    except BrokenPipeError:
        _forget_output()
        return CLOSED
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # rich has met it
            return CLOSED
        if stop.code == TERMINATED:
            say(_prog(argv), "terminated")
            return TERMINATED
        raise


def _run(argv: Sequence[str]) -> int:
    prog, options = _prog(argv), dict[str, str]()
    try:
        name = _parser().parse_args(argv[:1]).command
        module = import_module(f"loglinear.cli.{name}")
        if name in PROGRAMS:
            getattr(module, name)(argv[1:], prog)
            return 0
        kind = getattr(module, f"{name.capitalize()}Args")
        options = option_types(kind)
        read = getattr(module, "parse", partial(parse, kind))
        getattr(module, name)(read(argv[1:], prog))
    except BrokenPipeError:
        raise
    except (UsageError, ValueError, OSError) as error:
        if os.environ.get("LOGLINEAR_TRACEBACK"):
            raise
        say(prog, as_typed(" ".join(str(error).split("\n")), options))
        return USAGE if isinstance(error, (UsageError, Contradiction)) else FAILURE
    except ModuleNotFoundError as error:
        missing = explained(error, "the command", PROGRAMS.get(prog.split()[-1], "cli"))
        if missing is error or os.environ.get("LOGLINEAR_TRACEBACK"):
            raise
        say(prog, missing)
        return FAILURE
    except KeyboardInterrupt:
        say(prog, "interrupted")
        return INTERRUPTED
    return 0


def _prog(argv: Sequence[str]) -> str:
    return f"loglinear {argv[0]}" if argv and argv[0] in COMMANDS else "loglinear"


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as an exception does, so that unfinished files and worker processes go with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _forget_output() -> None:
    """The reader of the standard output has gone. The interpreter's last flush must not fail on it."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    summaries = "\n".join(f"  {name:<10}{summary}" for name, summary in COMMANDS.items())
    parser = Parser(
        prog="loglinear",
        usage="loglinear COMMAND [OPTIONS]",
        description="Log-linear attention: train, evaluate and generate.",
        epilog=f"commands:\n{summaries}\n\nloglinear COMMAND --help lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"loglinear {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    return parser
