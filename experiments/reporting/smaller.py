"""Sections of the page for experiments with one or two seeds, and for recipes: lines of Markdown from rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

import numpy as np

from lift import share
from reporting.rows import LABELS, PAIRS
from reporting.statistics import Difference, paired, sequence_losses
from reporting.text import difference, table

NEEDLES = {"number": "1 key", "multi-key": "4 keys", "multi-value": "4 values"}
EVALUATION = "16384-document"


def recipe_lines(text: Sequence[dict]) -> list[str]:
    """Validation loss of the linear models by recipe: seeds, mean, spread."""
    found: dict[tuple, list[float]] = {}
    for row in text:
        copy = row["copy"]
        if copy["mixer"] in [pair[0] for pair in PAIRS] and copy["part"] != "sweep" and "validation" in row:
            part = {"recipe: weights": "one order", "recipe: order": "one order"}.get(copy["part"], "")
            if not part:
                batch = 3600 // copy["steps"]
                found.setdefault((copy["mixer"], copy["rate"], batch, copy["floor"], copy["warmup"]), []).append(
                    row["validation"]
                )
    lines = [
        [LABELS[key[0]], f"{key[1]:g}", str(key[2]), f"{key[3]:g}", f"{key[4]:g}", str(len(losses)), f"{fmean(losses):.4f}",
         f"{stdev(losses):.4f}" if len(losses) > 1 else ""]
        for key, losses in sorted(found.items())
    ]  # fmt: skip
    if not lines:
        return []
    headers = ["model", "peak rate", "sequences a step", "end of the schedule", "warm-up", "seeds", "loss", "spread"]
    return [
        "## The recipe",
        "",
        "Linear models alone, 29M tokens each; the loss is that of the validation half that chooses, in nats, and the spread "
        "is the standard deviation over seeds. The end of the schedule is a part of the peak, the warm-up a part of the steps.",
        "",
        *table(headers, lines),
        "",
        *_weights_or_order(text),
    ]


def _weights_or_order(text: Sequence[dict]) -> list[str]:
    """The change of the loss by the weights' seed alone, and by the order alone."""
    found = {}
    for row in text:
        if row["copy"]["part"] in ("recipe", "recipe: weights", "recipe: order"):
            found.setdefault((row["copy"]["mixer"], row["copy"]["rate"]), {}).setdefault(
                row["copy"]["part"], row["validation"]
            )
    lines = []
    for (mixer, rate), parts in found.items():
        if len(parts) == 3:
            changes = [parts[f"recipe: {name}"] - parts["recipe"] for name in ("weights", "order")]
            lines.append(
                f"{LABELS[mixer]} at {rate:g}: other weights with the same order of the data change the loss by "
                f"{changes[0]:+.4f}, another order with the same weights by {changes[1]:+.4f}."
            )
    return [" ".join(lines), ""] if lines else []


def start_lines(text: Sequence[dict]) -> list[str]:
    """Validation loss of the log-linear models by where λ starts; differences to "one" are those of equal seeds."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in text:
        copy = row["copy"]
        if copy["part"] == "start" and "validation" in row:
            found.setdefault(copy["mixer"], {}).setdefault(copy["start"], {})[copy["seed"]] = row["validation"]
    lines = []
    for mixer, starts in found.items():
        ones = starts.get("one", {})
        for start, losses in sorted(starts.items()):
            seeds = sorted(losses.keys() & ones.keys()) if start != "one" else []
            shown = ["", ""]
            if len(seeds) > 1:
                apart = paired(*(np.array([by_seed[seed] for seed in seeds]) for by_seed in (losses, ones)))
                shown = [difference(apart), f"{sum(losses[seed] < ones[seed] for seed in seeds)} of {len(seeds)}"]
            spread = f"{stdev(losses.values()):.4f}" if len(losses) > 1 else ""
            lines.append([LABELS[mixer], start, str(len(losses)), f"{fmean(losses.values()):.4f}", spread, *shown])
    if not lines:
        return []
    return [
        "## Where λ starts, in language models",
        "",
        "Log-linear models on seeds of their own, at the rate of the first recipe. *one* and *paper* have a narrow projection, "
        "λ near 1 and ln 2. *noise* has one as wide as all others. Validation loss in nats, spread over seeds, and the "
        "difference to *one* on equal data.",
        "",
        *table(["model", "start", "seeds", "loss", "spread", "minus one", "ahead"], lines, words=2),
        "",
    ]


def lifted_lines(losses: Sequence[dict], needles: Sequence[dict]) -> list[str]:
    """Linear models that go on with and without levels, from the same weights, on the same tokens."""
    by_name = {(row["base"], row["kind"]): row["evaluations"][EVALUATION] for row in losses}
    tuned = {(row["base"], row["tune_seed"], row["kind"]): row for row in needles}
    lines = []
    for linear, _ in PAIRS:
        bases = sorted({base for base, kind in by_name if base.rpartition("-")[0] == linear})
        whole = [
            fmean(sequence_losses(by_name[base, "lifted"])) - fmean(sequence_losses(by_name[base, "plain"]))
            for base in bases
        ]
        if len(bases) < 2:
            continue
        apart = paired(np.array(whole), np.zeros(len(whole)))
        percent = Difference(100 * np.expm1(apart.value), 100 * apart.error)
        lines.append(["perplexity, 16K", LABELS[linear], f"{difference(percent, 2)}%", f"{len(bases)} models",
                      f"{sum(x < 0 for x in whole)}"])  # fmt: skip
        for kind, label in NEEDLES.items():
            keys = [key for key in tuned if key[2] == "plain" and key[0] in bases]
            points = [
                100 * (share(tuned[base, seed, "lifted"], kind) - share(tuned[base, seed, "plain"], kind))
                for base, seed, _ in keys
            ]
            if len(points) > 1:
                found = paired(np.array(points), np.zeros(len(points)))
                lines.append([f"needles, {label}, to 16K", LABELS[linear], f"{difference(found, 1)} points",
                              f"{len(points)} fine-tunes", f"{sum(x > 0 for x in points)}"])  # fmt: skip
    if not lines:
        return []
    return [
        "## Linear models that go on with levels",
        "",
        f"{max(row['parameters'] for row in losses) / 1e6:.0f}M parameters; the same weights go on for "
        f"{losses[0]['tokens'] / 1e6:.0f}M tokens, as they are and lifted (`loglinear lift`). Lifted minus plain, mean and "
        "standard error; *ahead* counts the runs in which the lifted model is better. Two models are few for an error.",
        "",
        *table(["where", "model", "lifted − plain", "of", "ahead"], lines, words=2),
        "",
        "![Lifted minus plain](figures/lift.svg)",
        "",
    ]


def document_lines(rows: Sequence[dict]) -> list[str]:
    """Exact answers and perplexities by distance after the fine-tune, one seed."""
    lines = []
    for row in rows:
        mixer = row["checkpoint"].rpartition("-")[0]
        lines += [
            [LABELS[mixer], f"{one['distance']:,}", f"{100 * one['exact']:.1f}%", f"{100 * one['without']:.1f}%",
             f"{one['perplexity']:.2f}", f"{one['perplexity_without']:.2f}"]
            for one in row["after"]
        ]  # fmt: skip
    if not lines:
        return []
    headers = ["model", "distance", "exact", "without the definition", "perplexity", "without it"]
    return [
        "## Questions on long files",
        "",
        f"The value of a `#define`, asked for after a distance in tokens, in C files that no model was trained on; one seed of "
        f"the small language models, after {rows[0]['steps']} steps on {rows[0]['questions']:,} such questions "
        "(`experiments/documents.py`). Perplexity is that of the answer.",
        "",
        *table(headers, lines),
        "",
    ]


def genome_lines(rows: Sequence[dict]) -> list[str]:
    """Held-out loss of each model by context, and on repeats; twins are compared sequence by sequence."""
    if not rows:
        return []
    by_mixer = {row["run"]["mixer"]: row for row in rows}
    contexts = [one["context"] for one in rows[0]["evaluations"]]
    lines = [
        [LABELS.get(mixer, "Long filters"), *(f"{one['loss']:.4f}" for one in row["evaluations"]), *_repeated(row)]
        for mixer, row in by_mixer.items()
    ]
    headers = ["model", *(f"loss, {context:,}" for context in contexts), "same strand", "other strand"]
    run = rows[0]["run"]
    sentences = list(_genome_pairs(by_mixer))
    return [
        "## A genome",
        "",
        f"Bacterial chromosomes, one nucleotide a token, {rows[0]['parameters'] / 1e6:.0f}M parameters, "
        f"{run['steps'] * run['batch'] * run['context'] / 1e6:.0f}M tokens in sequences of {run['context']:,}; *E. coli* held "
        "out; one seed (`experiments/genome.py`). Loss in nats by context; at the longest also where a run of 16 nucleotides "
        "returns and goes on as before, on the same strand or the other.",
        "",
        *table(headers, lines),
        "",
        *([" ".join(sentences), ""] if sentences else []),
    ]


def _repeated(row: dict) -> list[str]:
    """Mean loss of tokens that repeat, by strand, at the longest context."""
    shown = []
    for strand in ("same", "other"):
        some = [
            one
            for one in row["evaluations"][-1]["repeats"]
            if one["strand"] == strand and one.get("repeated_tokens", 0)
        ]
        weights = [one["repeated_tokens"] for one in some]
        shown.append(f"{np.average([one['repeated_loss'] for one in some], weights=weights):.4f}" if some else "")
    return shown


def _genome_pairs(by_mixer: dict[str, dict]) -> Iterable[str]:
    for linear, log_linear in PAIRS:
        if linear in by_mixer and log_linear in by_mixer:
            parts = []
            for one, other in zip(by_mixer[linear]["evaluations"], by_mixer[log_linear]["evaluations"]):
                found = paired(np.array(other["by_sequence"]), np.array(one["by_sequence"]))
                parts.append(f"{difference(found, 4)} at {one['context']:,}")
            yield f"{LABELS[log_linear]} minus {LABELS[linear]}, standard error over sequences: {', '.join(parts)} nats."
