"""docs/performance.md and the chart of the README from committed rows alone: ``python experiments/performance_page.py``.

A test compares the committed page with what the committed rows give.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from reporting import comparisons as compare
from reporting.comparisons import Comparison
from reporting.front import draw_front
from reporting.rows import LABELS, PAIRS, read, seeds_of
from reporting.text import table

DOCS = Path(__file__).parents[1] / "docs"
OPS = {  # the transition and a model of it, by the name of its rows
    "scalar_gate": ("scalar gate", "Log-Linear Mamba-2"),
    "delta_rule": ("delta rule", "Log-Linear Gated DeltaNet"),
    "channel_gate": ("gate per channel", "Log-Linear GLA"),
    "channel_delta_rule": ("delta rule with a gate per channel", "Log-Linear KDA"),
}
NAMES = (*OPS, "training", "multi_gpu", "context_parallel", "decoding", "model_decoding")
NAMES += ("decoding_cpu", "ops_cpu", "lm")
TIMES, SMALLER = "times faster", "times smaller"
EVEN = 0.995  # below this, two digits show that it is slower

HEAD = """# Performance

Every number on this page is a committed row of `benchmarks/results` or `experiments/results`. A command wrote the row after
it had checked the result. The command `python experiments/performance_page.py` makes this page and its chart from the rows.

Each ratio has one direction. "2.00 times faster" means: the other takes twice the time. **A number below 1 means that ours is
slower** (or takes more memory), and it stands in bold type. Both numbers of a ratio were measured at one commit: where several
commits have both, the newest counts. Times are medians. "Captured" calls are repeated by a CUDA graph: the host's time is
not in them.

![Five measured comparisons](figures/front.svg)

B is the batch, H the number of value heads, K and V are the widths of keys and values. 1K is 1,024 tokens.
"""


def page(rows: dict[str, list[dict]]) -> str:
    """The text of docs/performance.md. ``rows``: those of each file of ``NAMES``."""
    ops = {name: f"Ops: {transition} ({model})" for name, (transition, model) in OPS.items()}
    training = [row for row in rows["training"] if "gpu" in row]
    gpus = compare.several_gpus(rows["multi_gpu"], rows["context_parallel"])
    cpu: dict[str, list[Comparison]] = {}
    for command, line in compare.cpu_growth(rows["decoding_cpu"], rows["ops_cpu"]):
        cpu.setdefault(command, []).append(line)
    groups = [
        *(
            (title, f"ops.py {name}", compare.ops(rows[name]) + compare.growth(rows[name], 1 << 14, 1 << 17))
            for name, title in ops.items()
        ),
        ("Training steps", "training.py", compare.training(training)),
        ("Several GPUs", "multi_gpu.py`, `torchrun --nproc-per-node 2 benchmarks/context_parallel.py", gpus),
        ("Decoding: one layer", "decoding.py", compare.decoding_ops(rows["decoding"])),
        ("Decoding: whole models", "model_decoding.py", compare.decoding_models(rows["model_decoding"])),
        ("CPU: decoding", "decoding_cpu.py", cpu.get("decoding_cpu", [])),
        ("CPU: ops", "ops_cpu.py", cpu.get("ops_cpu", [])),
    ]
    memory = [
        ("Memory: state of a whole model", "model_decoding.py", compare.decoding_models(rows["model_decoding"], True)),
        ("Memory: a training step", "training.py", compare.training(training, memory=True)),
        *(
            (f"Memory: {transition}", f"ops.py {name}", compare.ops(rows[name], memory=True))
            for name, (transition, _) in OPS.items()
        ),
    ]
    lines = [*HEAD.splitlines(), "", *slower(groups)]
    below = {title: failed(rows[name]) for name, title in ops.items()} | {"Training steps": longest(training)}
    for title, command, found in groups:
        lines += section(title, command, found, TIMES) + below.get(title, [])
    for title, command, found in memory:
        lines += section(title, command, found, SMALLER)
    return "\n".join([*lines, *forward_memory(rows["ops_cpu"]), *quality(rows["lm"])]).rstrip("\n") + "\n"


def section(title: str, command: str, found: Sequence[Comparison], ratio: str) -> list[str]:
    """A heading, the command and the machine, and a table; nothing without rows."""
    if not found:
        return []
    lines = [
        [c.what, c.ours, c.peer, c.theirs, times(c.ratio), c.shape, f"{c.row['commit'][:7]}, {c.row['date'][:10]}"]
        for c in found
    ]
    heads = ["measured", "ours", "beside", "theirs", ratio, "size", "commit, date"]
    about = f"`python benchmarks/{command}`; {compare.machines(c.row for c in found)}."
    return [f"## {title}", "", about, "", *table(heads, lines, words=7), ""]


def times(ratio: float) -> str:
    """Two digits behind the point, none above 10; bold below 1."""
    shown = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
    return f"**{shown}**" if float(shown) < 1 else shown


def slower(groups: Sequence[tuple[str, str, Sequence[Comparison]]]) -> list[str]:
    """The rows in which a peer is faster, the slowest first. A token of a long sequence beside a short one is no peer."""
    timed = [(title.partition(" (")[0], line) for title, _, found in groups for line in found]
    peers = [(title, c) for title, c in timed if not c.peer.startswith(("one token", "the same"))]
    behind = sorted(((title, c) for title, c in peers if c.ratio < EVEN), key=lambda item: item[1].ratio)
    linear = sum(compare.is_linear(c.peer) for _, c in behind)
    text = (
        f"In {len(behind)} of {len(peers)} comparisons of time with something else ours is slower. {linear} of them stand "
        "beside a linear model, which keeps one state and not a tree. The slowest come first:"
    )
    lines = [[title, c.what, c.peer, times(c.ratio)] for title, c in behind]
    rest = "[Results](results.md#what-was-required) has what was required of quality and is not met."
    return [
        "## Where it is slower",
        "",
        text,
        "",
        *table(["group", "measured", "beside", TIMES], lines, words=4),
        "",
        rest,
        "",
    ]


def failed(rows: Sequence[dict]) -> list[str]:
    """Peers that did not run, with what they said."""
    said = dict.fromkeys((compare.peer_name(row["name"]), row["reason"]) for row in rows if row["what"] == "failed")
    return [
        line for name, reason in said for line in (f"Not timed: the backward of {name}. It stops with: {reason}.", "")
    ]


def longest(rows: Sequence[dict]) -> list[str]:
    """The most tokens of one sequence in one step."""
    found = [row for row in rows if row["longest"]]
    if not found:
        return []
    row = max(found, key=lambda row: (row["T"], row["residual"] == "float32"))
    peak = f"{row['peak_bytes'] / 2**30:.1f} GiB"
    text = f"The longest sequence in one step on one GPU: {row['T']:,} tokens of Log-Linear Mamba-2 in {peak}"
    return [
        f"{text}, {row['tokens_per_s']:,.0f} tokens/s (activations checkpointed; commit {row['commit']}, {row['date']}).",
        "",
    ]


def forward_memory(rows: Sequence[dict]) -> list[str]:
    """Peak memory of a forward pass on the CPU."""
    found = [row for row in rows if row["what"] == "forward_peak_memory"]
    if not found:
        return []
    lines = [
        [row["op"].replace("_", " "), row["form"].replace("_", "-"), f"{row['shape']['T']:,}", f"{row['gib']:.1f} GiB",
         f"{row['commit']}, {row['date'][:10]}"]
        for row in found
    ]  # fmt: skip
    about = (
        f"`python benchmarks/ops_cpu.py`; {compare.machines(found)}. Peak memory of the process during a forward pass."
    )
    return [
        "## Memory: forward pass on the CPU",
        "",
        about,
        "",
        *table(["op", "form", "tokens", "peak", "commit, date"], lines, words=5),
        "",
    ]


def quality(rows: list[dict]) -> list[str]:
    """Perplexity of each model by seed, and how fast twins of one commit train."""
    runs = seeds_of(rows)
    if not runs:
        return []
    lines = []
    for mixer, group in runs.items():
        values = [row["validation_perplexity"] for row in group.values()]
        commits = ", ".join(dict.fromkeys(row["commit"] for row in group.values()))
        parameters = f"{next(iter(group.values()))['parameters'] / 1e6:.1f}M"
        lines.append(
            [LABELS[mixer], parameters, ", ".join(f"{value:.2f}" for value in values), f"{fmean(values):.2f}", commits]
        )
    first = next(iter(next(iter(runs.values())).values()))
    about = (
        f"`experiments/runs/lm.sh`; {first['gpu']}. Language models trained on {first['tokens'] / 1e6:.0f}M tokens of C at "
        f"a context of {first['arguments']['context']:,} tokens. Lower is better."
    )
    heads = ["model", "parameters", "perplexity by seed", "mean", "commits"]
    said = [sentence for pair in PAIRS for sentence in twins(runs, *pair)]
    text = ["## Quality", "", about, "", *table(heads, lines, words=5), "", *said, ""]
    return [
        *text,
        "[Results](results.md) has the errors of these numbers, recall, and what was required and is not met.",
        "",
    ]


def twins(runs: dict, linear: str, log_linear: str) -> list[str]:
    """How many seeds are ahead, and the ratio of training speed of runs of one seed and one commit."""
    both = [seed for seed in runs.get(log_linear, {}) if seed in runs.get(linear, {})]
    if not both:
        return []
    pairs = [(runs[log_linear][seed], runs[linear][seed]) for seed in both]
    ahead = sum(one["validation_perplexity"] < other["validation_perplexity"] for one, other in pairs)
    rates = [
        one["tokens_per_second"] / other["tokens_per_second"]
        for one, other in pairs
        if one["commit"] == other["commit"]
    ]
    spread = " to ".join(dict.fromkeys(times(rate) for rate in sorted(rates)[:: max(1, len(rates) - 1)]))
    speed = f"; it trains {spread} times as fast" if rates else ""
    return [
        f"- {LABELS[log_linear]} has the lower perplexity in {ahead} of {len(both)} seeds beside {LABELS[linear]}{speed}."
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--results", type=Path, help="folder of all rows; none: the committed ones")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of performance.md and figures/")
    options = parser.parse_args()
    rows = {name: read(name, options.results) for name in NAMES}
    (options.docs / "performance.md").write_text(page(rows), encoding="utf-8")
    print(options.docs / "performance.md")
    for path in draw_front(rows, options.docs / "figures" / "front"):
        print(path)


if __name__ == "__main__":
    main()
