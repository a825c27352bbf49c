"""A recipe for language models whose seeds agree: short runs of the linear twins, one change at a time.

    python experiments/recipe.py run DATA OUT [--seconds 600] [--gpus 1]    DATA holds linux-c-long.{train,valid}.jsonl.xz
    python experiments/recipe.py report OUT

The jobs lie in one queue, which the GPUs share. At the end of the time the runs get SIGTERM, on which ``loglinear train``
leaves a checkpoint. Started again, the queue goes on. A change is judged by the spread over seeds and by the mean of the
validation loss. "order" and "start" split the spread: in "order" the seeds share the initial weights, in "start" the order of
the data.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

MIXERS = ("mamba2", "gated_deltanet")
SEEDS = (10, 11, 12)  # not those of the reported models
STEPS, BATCH, RATE = 768, 4, 1e-3  # 50M tokens: a quarter of the reported runs
# The sizes of experiments/runs/lm_settings.sh.
SIZES = {"vocab-size": 16384, "hidden-size": 512, "mamba-state-size": 128, "delta-num-heads": 6, "num-hidden-layers": 8}
CHANGES: dict[str, dict[str, float]] = {
    "base": {},
    "floor 0": {"final-rate": 0.0},
    "rate 2e-3": {"learning-rate": 2e-3},
    "rate 5e-4": {"learning-rate": 5e-4},
    "order": {"seed": SEEDS[0]},
    "start": {"data-seed": SEEDS[0]},
    "warm-up 0.2": {"warmup": 0.2},
    "batch 8": {"batch-size": 2 * BATCH, "steps": STEPS // 2},
    "batch 2": {"batch-size": BATCH // 2, "steps": 2 * STEPS},
    "rate 4e-3": {"learning-rate": 4e-3},
    "floor 0, rate 2e-3": {"final-rate": 0.0, "learning-rate": 2e-3},
}
SPLITS = ("order", "start")


@dataclass(frozen=True)
class Job:
    """One run: a mixer, a change, and a seed, which decides both the weights and the order unless the change says otherwise."""

    mixer: str
    change: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.mixer}-{self.change.replace(', ', '-').replace(' ', '-')}-s{self.seed}"

    def words(self, data: Path, out: Path) -> list[str]:
        """The command, without the program."""
        options: dict[str, float] = {"learning-rate": RATE, "steps": STEPS, "batch-size": BATCH, "seed": self.seed}
        options |= {"data-seed": self.seed} | CHANGES[self.change]
        steps = str(int(options["steps"]))
        text = {"data": "train", "validation-data": "valid"}
        return [
            *("train", "--output", str(out / self.name), "--cache", str(out / "cache"), "--mixer", self.mixer),
            *(word for name, value in SIZES.items() for word in (f"--{name}", str(value))),
            *(word for name, side in text.items() for word in (f"--{name}", str(find(data, side)))),
            *("--context", "16384", "--packing", "document", "--compile", "--log-every", "16"),
            *("--save-every", steps, "--evaluate-every", steps),
            *(word for name, value in options.items() for word in (f"--{name}", f"{value:g}")),
        ]


def find(data: Path, side: str) -> Path:
    """The file of one side, compressed or not."""
    plain = data / f"linux-c-long.{side}.jsonl"
    return plain if plain.exists() else plain.with_name(f"{plain.name}.xz")


def jobs() -> Iterator[Job]:
    """Changes in their order; of each, all seeds of both mixers."""
    for change in CHANGES:
        for seed in SEEDS:
            for mixer in MIXERS:
                if change not in SPLITS or seed != SEEDS[0]:  # there it is the run of the base
                    yield Job(mixer, change, seed)


def finished(out: Path, job: Job) -> float | None:
    """The last validation loss of a run that is done."""
    path = out / job.name / "record.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"status": "new"}
    if record["status"] != "complete":
        return None
    return [entry["eval_loss"] for entry in record["history"] if "eval_loss" in entry][-1]


def run(data: Path, out: Path, gpus: int, seconds: float) -> None:
    """Run what is not done, a job a GPU, until the time is over."""
    out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + seconds - 20  # to write checkpoints
    waiting = [job for job in jobs() if finished(out, job) is None]
    running: dict[int, tuple[Job, subprocess.Popen]] = {}
    while time.monotonic() < until and (waiting or running):
        for gpu in range(gpus):
            if gpu in running and running[gpu][1].poll() is not None:
                job, process = running.pop(gpu)
                print(f"{job.name}: exit {process.returncode}, loss {finished(out, job)}", flush=True)
            if gpu not in running and waiting and (len(running) == 0 or (out / "cache").exists()):
                running[gpu] = start(waiting.pop(0), data, out, gpu)
        time.sleep(0.5)
    for _, process in running.values():
        process.send_signal(signal.SIGTERM)
    for _, process in running.values():
        process.wait()


def start(job: Job, data: Path, out: Path, gpu: int) -> tuple[Job, subprocess.Popen]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    device = visible[gpu] if len(visible) > gpu and visible[0] else str(gpu)
    with (out / f"{job.name}.log").open("a") as log:
        command = [sys.executable, "-m", "loglinear", *job.words(data, out)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": device}
        return job, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def report(out: Path) -> Iterator[str]:
    """Mean and standard deviation over seeds of each change, and the mean of paired differences to the base."""
    for mixer in MIXERS:
        base = {seed: finished(out, Job(mixer, "base", seed)) for seed in SEEDS}
        for change in CHANGES:
            losses = {seed: finished(out, Job(mixer, change, seed)) for seed in SEEDS}
            losses |= {SEEDS[0]: base[SEEDS[0]]} if change in SPLITS else {}
            known = [loss for loss in losses.values() if loss is not None]
            if len(known) < 2:
                continue
            apart = [losses[seed] - base[seed] for seed in SEEDS if losses[seed] is not None and base[seed] is not None]
            gain = f", minus base {fmean(apart):+.4f}" if apart and change != "base" else ""
            yield f"{mixer}, {change}: {fmean(known):.4f}, spread {stdev(known):.4f}, {len(known)} seeds{gain}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("data", type=Path)
    runs.add_argument("out", type=Path)
    runs.add_argument("--seconds", type=float, default=600.0)
    runs.add_argument("--gpus", type=int, default=1)
    commands.add_parser("report").add_argument("out", type=Path)
    options = parser.parse_args()
    if options.command == "run":
        run(options.data, options.out, options.gpus, options.seconds)
    for line in report(options.out):
        print(line)


if __name__ == "__main__":
    main()
