"""Progress: a bar with loss, tokens per second and memory on a terminal, one line per log elsewhere."""

from __future__ import annotations

import time

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


class Meter(TrainerCallback):
    """Training tokens per second since the last log, without the time spent on saving and evaluating."""

    def __init__(self, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self._since = (0, 0.0)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._since = (state.global_step, time.perf_counter())

    # The Trainer logs, evaluates and saves in this order, so each of these ends a pause that began with a log.
    on_log = on_evaluate = on_save = on_train_begin

    def read(self, step: int) -> dict[str, float]:
        """``tokens_per_second``, and ``memory_gib``: the peak on a GPU, what the process holds now on a CPU."""
        first, start = self._since
        seconds = time.perf_counter() - start
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
        else:
            memory = psutil.Process().memory_info().rss
        return {
            "tokens_per_second": round((step - first) * self.tokens_per_step / seconds, 1),
            "memory_gib": round(memory / 2**30, 3),
        }


class ShowProgress(TrainerCallback):
    """Shows what the Trainer logs. The bar lives inside a ``with`` block, so an error gives the terminal back."""

    def __init__(self, console: Console):
        self.console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> ShowProgress:
        self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        self._bar.stop()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, status="")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args, state, control, **kwargs) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            rate, memory = logs["tokens_per_second"], logs["memory_gib"]
            status = f"loss {logs['loss']:.4f}  {rate:,.0f} tokens/s  {memory:.2f} GiB"
            self._bar.update(self._task, status=status)
            if not self.console.is_terminal:
                self.console.print(f"step {state.global_step}/{state.max_steps}  {status}")
        elif "eval_loss" in logs:
            self.console.print(f"step {state.global_step}/{state.max_steps}  validation loss {logs['eval_loss']:.4f}")
