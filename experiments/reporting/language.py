"""The section on language modelling: perplexity, speed and memory, and the loss by position, model beside linear twin."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean

import numpy as np

from loglinear.tasks.lm.config import names_of
from reporting.rows import LABELS, PAIRS, seeds_of
from reporting.statistics import Difference, check_same_sequences, edge_at, paired, sequence_losses
from reporting.text import MISSING, NOT_RUN, Section, below, difference, direction, picture, signed, table

FAR = 8192  # "past position 8K"
OWN = ("mixer", "seed", "num_hidden_layers")  # arguments in which the models of a comparison differ by intent
FILES = {"data": "hash", "validation_data": "validation_hash"}  # what is in them counts, not their names

CLAIM = (
    "The paper's claim: log-linear Mamba-2 and Gated DeltaNet reach a lower loss than their linear twins, and the loss by "
    "position falls further out, which says that the distant context is used."
)

Runs = dict[str, dict[int, dict]]


def section(rows: list[dict]) -> Section:
    """The whole section, "not run" where rows are missing."""
    runs = seeds_of(rows)
    made = Section("Language modelling", "language modelling", CLAIM)
    for linear, log_linear in PAIRS:
        by_seed = _validation_differences(runs, linear, log_linear)
        name = f"{LABELS[log_linear]}: validation loss, and so perplexity, below {LABELS[linear]}"
        made.verdicts.append(below(name, by_seed[0]))
        made.verdicts.append(below(f"{LABELS[log_linear]}: loss past position 8K below {LABELS[linear]}", by_seed[1]))
    if not runs:
        made.add(NOT_RUN)
        return made
    made.add(_setup(runs), _models(runs))
    lines = [*_costs(runs), *_seed_spread(runs)]
    if lines:
        made.add([f"- {line}" for line in lines])
    made.add("Difference of the loss, log-linear minus linear, in nats per token on the same validation sequences:")
    made.add(_differences(runs))
    for key, long in keys(runs):
        where = f"{key.replace('-', ' tokens, packing ')}"
        made.add(f"Loss by position ({where}; mean over seeds, nats per token):", _by_position(runs, key))
        made.add(picture("loss_by_position_long" if long else "loss_by_position", f"Loss by position, {where}"))
    further = [row for row in rows if row["name"] not in {r["name"] for group in runs.values() for r in group.values()}]
    if further:
        made.add("Further runs:", _further(further))
    return made


def keys(runs: Runs) -> list[tuple[str, bool]]:
    """The evaluations to show, one at the trained context and one beyond it, each with whether it is beyond.

    Of several packings: the one of the training at the trained context, the one with more sequences beyond it.
    """
    rows = [row for group in runs.values() for row in group.values()]
    arguments, found = rows[0]["arguments"], []
    done = {key: evaluation for row in rows for key, evaluation in row["evaluations"].items()}
    at = {k: e for k, e in done.items() if e["context"] == arguments["context"]}
    if at:
        preferred = f"{arguments['context']}-{arguments['packing']}"
        found.append((preferred if preferred in at else min(at), False))
    beyond = {k: e for k, e in done.items() if e["context"] > arguments["context"]}
    if beyond:
        found.append((max(sorted(beyond), key=lambda k: beyond[k]["predictions"]), True))
    return found


def differences_by_seed(runs: Runs, linear: str, log_linear: str, key: str, first: int) -> dict[int, Difference]:
    """Log-linear minus linear from position ``first`` on, for each seed that both have. Raises ValueError as below."""
    found = {}
    for seed, row in runs.get(log_linear, {}).items():
        twin = runs.get(linear, {}).get(seed)
        if twin is not None and key in row["evaluations"] and key in twin["evaluations"]:
            one, other = row["evaluations"][key], twin["evaluations"][key]
            check_same_sequences([one, other])
            found[seed] = paired(sequence_losses(one, first), sequence_losses(other, first))
    return found


def _validation_differences(runs: Runs, linear: str, log_linear: str) -> tuple[dict[int, Difference], ...]:
    """Over all positions and past 8K at the trained context, each by seed; empty where there is nothing to compare."""
    trained = [key for key, long in keys(runs) if not long] if runs else []
    if not trained:
        return {}, {}
    evaluations = [row["evaluations"].get(trained[0]) for group in runs.values() for row in group.values()]
    edge = edge_at(next(e for e in evaluations if e), FAR)
    everywhere = differences_by_seed(runs, linear, log_linear, trained[0], 0)
    return everywhere, {} if edge is None else differences_by_seed(runs, linear, log_linear, trained[0], edge)


def _setup(runs: Runs) -> str:
    """The arguments that all models share, and each argument in which they differ beside the mixer and the seed."""
    rows = [row for group in runs.values() for row in group.values()]
    first, shared = rows[0], rows[0]["arguments"]
    names = sorted({name for row in rows for name in row["arguments"]} - set(OWN) - set(FILES))
    differing = [name for name, of in FILES.items() if len({row["data"].get(of) for row in rows}) > 1]
    differing += [name for name in names if len({str(row["arguments"].get(name)) for row in rows}) > 1]
    per_step = first["tokens"] // shared["steps"]
    files = ", ".join(name.rpartition("/")[2] for name in names_of(shared["data"]))
    text = (
        f"Width {shared['hidden_size']}, {shared['steps']:,} steps of {per_step:,} "
        f"tokens in sequences of {shared['context']:,}, peak learning rate {shared['learning_rate']:g}, AdamW, on "
        f"`{files}` (hash {first['data']['hash'][:12]}); "
        f"{', '.join(sorted({row['gpu'] for row in rows}))}; torch {first['versions']['torch']}, "
        f"Triton {first['versions']['triton']}; commit {', '.join(sorted({row['commit'] for row in rows}))}."
    )
    if differing:
        text += f" The models differ in these arguments, too: {', '.join(differing)} (values in the rows)."
    return text


def _models(runs: Runs) -> list[str]:
    lines = []
    for mixer, group in runs.items():
        rows = list(group.values())
        tokens, low, high = (fmean(values) for values in zip(*(_speed(row) for row in rows)))
        lines.append(
            [
                LABELS[mixer],
                str(rows[0]["arguments"]["num_hidden_layers"]),
                f"{rows[0]['parameters'] / 1e6:.1f}M",
                f"{rows[0]['tokens'] / 1e6:.0f}M",
                ", ".join(f"{row['validation_perplexity']:.3f}" for row in rows),
                ", ".join(f"{row['validation_loss']:.4f} ± {_error(row)}" for row in rows),
                f"{tokens / 1e3:.0f}K ({low / 1e3:.0f}K to {high / 1e3:.0f}K)",
                f"{max(row['memory_gib'] for row in rows):.1f}",
            ]
        )
    speed = "tokens/s (20th to 80th percentile)"
    return table(
        ["model", "layers", "parameters", "tokens", "perplexity by seed", "loss by seed", speed, "peak GiB"], lines
    )


def _speed(row: dict) -> tuple[float, ...]:
    return row["tokens_per_second"], *row["tokens_per_second_20_80"]


def _error(row: dict) -> str:
    """Standard error over validation sequences; it says how far other text may be, not how far models are apart."""
    own = [e for e in row["evaluations"].values() if e["context"] == row["arguments"]["context"]]
    return f"{own[0]['standard_error']:.4f}" if own else MISSING


def _costs(runs: Runs) -> list[str]:
    lines = []
    for linear, log_linear in PAIRS:
        if linear in runs and log_linear in runs:
            one, other = (list(runs[mixer].values()) for mixer in (log_linear, linear))
            speed, memory, parameters = (
                fmean(row[name] for row in one) / fmean(row[name] for row in other)
                for name in ("tokens_per_second", "memory_gib", "parameters")
            )
            lines.append(
                f"{LABELS[log_linear]} trains at {100 * speed:.0f}% of the tokens/s of {LABELS[linear]}, with "
                f"{100 * memory:.0f}% of its peak memory and {signed(100 * (parameters - 1), 1)}% parameters."
            )
    return lines


def _seed_spread(runs: Runs) -> list[str]:
    """How far seeds of one model are apart: a difference between models that is smaller says little."""
    parts = []
    trained = [key for key, long in keys(runs) if not long]
    for mixer, group in runs.items():
        rows = [
            row["evaluations"][trained[0]] for row in group.values() if trained and trained[0] in row["evaluations"]
        ]
        if len(rows) > 1:
            check_same_sequences(rows)
            apart = max(abs(paired(*map(sequence_losses, two)).value) for two in combinations(rows, 2))
            parts.append(f"{LABELS[mixer]} {apart:.4f}")
    return [f"Seeds of one model differ by up to, in nats: {', '.join(parts)}."] if parts else []


def _differences(runs: Runs) -> list[str]:
    """A row for each pair, evaluation and range of positions: from the start, and the far part of it."""
    lines = []
    trained = next(iter(next(iter(runs.values())).values()))["arguments"]["context"]
    for linear, log_linear in PAIRS:
        for key, long in keys(runs):
            evaluation = next(
                (r["evaluations"][key] for r in runs.get(linear, {}).values() if key in r["evaluations"]), None
            )
            if evaluation is None:
                continue
            for first in (0, edge_at(evaluation, trained if long else FAR)):
                by_seed = {} if first is None else differences_by_seed(runs, linear, log_linear, key, first)
                if by_seed:
                    where = f"from {first:,} of {evaluation['context']:,}, {evaluation['sequences']} sequences"
                    cells = ", ".join(difference(d) for d in by_seed.values())
                    mean = signed(fmean(d.value for d in by_seed.values()))
                    names = f"{LABELS[log_linear]} − {LABELS[linear]}"
                    lines.append([names, where, direction(list(by_seed.values())), cells, mean])
    return table(["pair", "positions", "log-linear is", "by seed", "mean"], lines, words=3) if lines else [NOT_RUN]


def _by_position(runs: Runs, key: str, ranges: int = 8) -> list[str]:
    """Mean loss in ``ranges`` ranges of positions, a column for each model."""
    losses: dict[str, np.ndarray] = {}
    edges: list[int] = []
    for mixer, group in runs.items():
        found = [row["evaluations"][key]["per_sequence"] for row in group.values() if key in row["evaluations"]]
        if found:
            edges = found[0]["edges"]
            losses[mixer] = np.mean([np.mean(f["losses"], axis=0) for f in found], axis=0)
    step = max(1, (len(edges) - 1) // ranges)
    lines = []
    for start in range(0, len(edges) - 1, step):
        stop = min(start + step, len(edges) - 1)
        weights = np.diff(edges)[start:stop]
        cells = [f"{np.average(values[start:stop], weights=weights):.4f}" for values in losses.values()]
        lines.append([f"{edges[start]:,} to {edges[stop] - 1:,}", *cells])
    return table(["positions", *(LABELS[mixer] for mixer in losses)], lines)


def _further(rows: list[dict]) -> list[str]:
    lines = [
        [row["name"], f"{row['parameters'] / 1e6:.1f}M", f"{row['tokens'] / 1e6:.0f}M", f"{row['validation_loss']:.4f}"]
        for row in sorted(rows, key=lambda row: row["name"])
    ]
    return table(["run", "parameters", "tokens", "validation loss"], lines)
