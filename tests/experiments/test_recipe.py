"""The recipe's queue: its jobs are options that the command takes, and its report is of pairs of seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loglinear.cli.errors import parse
from loglinear.cli.train import TrainArgs
from recipe import CHANGES, MIXERS, SEEDS, Job, jobs, report

pytestmark = pytest.mark.default_packages


def test_jobs_are_commands_and_no_two_are_one_run(tmp_path):
    found = list(jobs())
    assert len({job.name for job in found}) == len(found) == len(MIXERS) * (len(CHANGES) * len(SEEDS) - 2)
    commands = [parse(TrainArgs, job.words(tmp_path, tmp_path)[1:], "loglinear train") for job in found]
    assert len({json.dumps(command.arguments(), sort_keys=True) for command in commands}) == len(found)
    assert {command.optimizer.steps * command.optimizer.batch_size for command in commands} == {768 * 4}
    order = [command for command, job in zip(commands, found) if job.change == "order" and job.mixer == MIXERS[0]]
    assert [(command.seed, command.data_seed) for command in order] == [(SEEDS[0], seed) for seed in SEEDS[1:]]


def test_the_report_has_the_spread_and_the_difference_of_pairs(tmp_path: Path):
    for change, losses in (("base", (1.0, 1.2, 1.4)), ("floor 0", (0.9, 1.1, 1.3))):
        for seed, loss in zip(SEEDS, losses):
            folder = tmp_path / Job("mamba2", change, seed).name
            folder.mkdir()
            history = [{"loss": 2.0}, {"eval_loss": 3.0}, {"eval_loss": loss}]
            (folder / "record.json").write_text(json.dumps({"status": "complete", "history": history}))
    unfinished = tmp_path / Job("mamba2", "rate 2e-3", SEEDS[0]).name
    unfinished.mkdir()
    (unfinished / "record.json").write_text(json.dumps({"status": "running"}))
    assert list(report(tmp_path)) == [
        "mamba2, base: 1.2000, spread 0.2000, 3 seeds",
        "mamba2, floor 0: 1.1000, spread 0.2000, 3 seeds, minus base -0.1000",
    ]
