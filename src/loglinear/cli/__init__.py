"""The command line: ``loglinear COMMAND``. Each command is a module here, imported only when it is asked for.

A command's module holds ``<Command>Args``, a dataclass whose fields are the options, and a function of the command's
name that takes it. Both are found by name.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "train": "train a language model on text, or go on with an interrupted run",
    "evaluate": "perplexity and loss by position of a checkpoint",
    "niah": "needle in a haystack: samples, a short fine-tune, and the heatmap of length and depth",
    "generate": "continue a prompt and show the size of the state",
    "demo": "train Log-Linear Mamba-2 and its linear twin on this Python's sources, and compare them",
    "mqar": "train small models on associative recall side by side, and compare how many pairs they recall",
    "masks": "draw the attention masks side by side",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 for input that cannot be used, 130 when interrupted.

    A ValueError or a file that cannot be read or written is the user's to mend and prints as one line; with
    LOGLINEAR_TRACEBACK=1 in the environment it keeps its traceback, as every other error does.
    """
    argv = sys.argv[1:] if argv is None else argv
    name = _parser().parse_args(argv[:1]).command
    import tyro

    module = import_module(f"loglinear.cli.{name}")
    try:
        arguments = tyro.cli(
            getattr(module, f"{name.capitalize()}Args"),
            args=argv[1:],
            prog=f"loglinear {name}",
            config=(tyro.conf.OmitArgPrefixes,),
        )
        getattr(module, name)(arguments)
    except (ValueError, OSError) as error:
        if os.environ.get("LOGLINEAR_TRACEBACK"):
            raise
        print(f"loglinear {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"loglinear {name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    summaries = "\n".join(f"  {name:<10}{summary}" for name, summary in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="loglinear",
        usage="loglinear COMMAND [OPTIONS]",
        description="Log-linear attention: train, evaluate and generate.",
        epilog=f"commands:\n{summaries}\n\nloglinear COMMAND --help lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    return parser
