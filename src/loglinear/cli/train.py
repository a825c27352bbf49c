"""``loglinear train``: the options are ``TrainConfig``'s; the work is ``loglinear.training.run``'s."""

from __future__ import annotations

from loglinear.training.config import TrainConfig as TrainArgs

__all__ = ["TrainArgs", "train"]


def train(args: TrainArgs) -> None:
    """Train to the end of the run."""
    from accelerate import PartialState
    from rich.console import Console

    from loglinear.training.run import train as run

    run(args, Console(soft_wrap=True))
    PartialState().destroy_process_group()
