"""SIGTERM, as schedulers of clusters and containers send it before they kill: the step ends, and a checkpoint is saved."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

EXIT_STATUS = 143  # 128 + SIGTERM, as of a process that the signal has killed


class StopAtSigterm(TrainerCallback):
    """Inside a ``with`` block, SIGTERM ends training after the step that is under way, on all processes together."""

    def __init__(self) -> None:
        self.told = False
        self._group = distributed.new_group(backend="gloo") if distributed.is_initialized() else None

    def __enter__(self) -> StopAtSigterm:
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *error) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _tell(self, number: int, frame: object) -> None:
        self.told = True

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._group is not None:
            # The signal may reach one process alone, or each at another step. Hosts meet here, devices work on.
            told = torch.tensor(int(self.told))
            distributed.all_reduce(told, distributed.ReduceOp.MAX, group=self._group)
            self.told = bool(told)
        if self.told:
            # A logged loss is a mean since the last one, and a checkpoint holds no half of it: it is logged now.
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there may be seconds left
