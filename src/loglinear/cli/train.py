"""``loglinear train``: the options are ``TrainConfig``'s; the work is ``loglinear.training.run``'s.

Options may also come from a file, from the record of a run, or from a checkpoint. The command reads them as if the user had
typed them. A typed option takes the place of an option from elsewhere.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from loglinear.cli import errors
from loglinear.cli.errors import UsageError, option_types
from loglinear.training.config import TrainConfig

__all__ = ["TrainArgs", "parse", "train"]


@dataclass(frozen=True)
class TrainArgs(TrainConfig):
    """Train a language model, or go on with a run: the same command again goes on where it stopped."""

    config: Path | None = None
    """A YAML file of options by their names here, as every run leaves one in its folder (config.yaml). Options of the
    command line take their place."""
    resume: Path | None = None
    """Folder of a run to go on with, with the options of its record. Given beside it, --steps may grow, the three --*-every
    may change, and so may the processes, with --batch-size and --accumulate so that a step has as many sequences."""


def train(args: TrainArgs) -> None:
    """Train to the end of the run."""
    from accelerate import PartialState
    from rich.console import Console

    from loglinear.training.checkpoints import complete_checkpoints
    from loglinear.training.run import train as run

    config = TrainConfig(**{field.name: getattr(args, field.name) for field in fields(TrainConfig)})
    status: Any = None
    try:
        run(config, Console(soft_wrap=True))
    except SystemExit as stop:  # of all processes together, after SIGTERM
        status = stop.code
    except RuntimeError as error:
        if not lost_a_process(error):
            raise
        done = complete_checkpoints(config.output)
        place = f"from {done[-1].name} in {config.output}" if done else "from the start: no checkpoint is saved"
        raise OSError(
            "another process of this run has ended, and its own message or that of the system says why (a signal, no memory "
            f"left); the same command goes on {place}"
        ) from error
    # DistributedDataParallel must go first: holding the last reference to its process group, it would wait for a thread of
    # that group, and the thread for Python's lock.
    gc.collect()
    PartialState().destroy_process_group()
    if status is not None:
        raise SystemExit(status)


def lost_a_process(error: RuntimeError) -> bool:
    """Whether a collective failed because a process it needs is gone. Of gloo this is a plain RuntimeError."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo/transport" in str(error)


def parse(argv: Sequence[str], prog: str) -> TrainArgs:
    """The options in ``argv`` and, before them, those of ``--resume``, or of ``--init`` and ``--config``."""
    if errors.wants_help(argv):
        return errors.parse(TrainArgs, argv, prog)
    file, options = _given_elsewhere(_paths(argv, prog))
    names = [word.partition("=")[0].removeprefix("--").removeprefix("no-") for word in argv if word.startswith("--")]
    typed = {name.replace("-", "_") for name in names}
    options = {name: value for name, value in options.items() if name not in typed}
    try:
        words = [word for name, value in options.items() for word in _words(name, value)]
        return errors.parse(TrainArgs, [*words, *argv], prog)
    except UsageError as error:
        if any(f"--{name.replace('_', '-')}" in str(error) for name in options):
            raise UsageError(f"{error} (in {file})") from error
        raise


def _paths(argv: Sequence[str], prog: str) -> argparse.Namespace:
    """The typed options that decide the defaults of the others."""
    parser = errors.Parser(prog=prog, add_help=False, allow_abbrev=False)
    for name in ("config", "resume", "init", "output"):
        parser.add_argument(f"--{name}", type=Path)
    return parser.parse_known_args(argv)[0]


def _given_elsewhere(paths: argparse.Namespace) -> tuple[Path | None, dict[str, Any]]:
    """The file that holds options, and the options."""
    if paths.resume is not None:
        for name in ("config", "output"):
            if getattr(paths, name) is not None:
                raise UsageError(f"--{name}: not beside --resume, which names the run and so all its options")
        return paths.resume, {**_recorded(paths.resume), "output": paths.resume}
    options = {} if paths.config is None else _read(paths.config)
    init = paths.init or options.get("init")
    if init is None:
        return paths.config, options
    from loglinear.training.checkpoints import model_folder
    from loglinear.training.start import model_options

    folder = model_folder(Path(init), "init")
    return paths.config or folder, {**model_options(folder), **options}


def _read(file: Path) -> dict[str, Any]:
    """The options in a YAML file. Raises UsageError naming the key that is no option, or the line that is no YAML."""
    import yaml

    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config: {file} is no YAML: {error}") from error
    if not isinstance(options, dict):
        raise UsageError(f"--config: {file} must hold lines of the form option: value")
    return _known(options, file)


def _recorded(folder: Path) -> dict[str, Any]:
    """The options in the record of a run."""
    from loglinear.training.record import RECORD, read_record

    record = read_record(folder)
    if record is None:
        raise UsageError(f"--resume: {folder} holds no {RECORD}; needs the folder of a run that has begun")
    options = {name: value for name, value in record["arguments"].items() if name != "processes"}
    return _known(options | ({"cache": record["cache"]} if "cache" in record else {}), folder / RECORD)


def _known(options: dict[str, Any], file: Path) -> dict[str, Any]:
    known = option_types(TrainConfig)
    for name in options:
        if name not in known:
            close = get_close_matches(str(name).replace("-", "_"), known, n=1)
            raise UsageError(f"{file}: no option is called {name!r}{f'; did you mean {close[0]!r}?' if close else ''}")
    return options


def _words(name: str, value: Any) -> list[str]:
    """An option of a file as words of the command line."""
    option = f"--{name.replace('_', '-')}"
    if option_types(TrainConfig)[name] == "bool":
        if not isinstance(value, bool):
            raise UsageError(f"{option} must be true or false: got {value!r}")
        return [option if value else f"--no{option[1:]}"]
    if isinstance(value, dict):
        raise UsageError(f"{option} must be one value or a list: got {value!r}")
    if isinstance(value, (list, tuple)):
        return [option, *(str(item) for item in value)]
    return [f"{option}={os.path.expanduser(str(value))}"]
