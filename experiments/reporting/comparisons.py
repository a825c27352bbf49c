"""Comparisons out of rows of benchmarks: what of ours was timed beside what else, and how many times faster it was.

A comparison never mixes commits: of several commits that have both rows, the newest counts. A ratio has one direction, theirs
over ours, in time as in memory: above 1 ours is faster or smaller, below 1 it is slower or larger.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from loglinear.layers.table import LIFTED
from loglinear.tasks.style import in_bytes, name_of, tokens
from reporting.training import SHOWN

OURS = "loglinear"
SOFTMAX = "attention"
LINEAR_NAMES = ("Mamba-2", "Gated DeltaNet")
TWINS = {log_linear: linear for linear, log_linear in LIFTED.items()}
PEERS = {  # names in rows
    "fla log_linear_attn": "flash-linear-attention's log-linear op",
    "fla log_linear_attn, one token": "flash-linear-attention's log-linear op (eager: it cannot be captured)",
    "mamba2 ssd chunk 128": "Mamba-2's SSD, a linear model",
    "mamba2 ssd chunk 64": "Mamba-2's SSD in chunks of 64, a linear model",
    "mamba2 selective_state_update": "Mamba-2's own step, a linear model",
    "fla gated_delta_rule": "flash-linear-attention 0.6.0's gated delta rule, linear",
    "fla 0.2.2 gated_delta_rule": "flash-linear-attention 0.2.2's gated delta rule, linear",
    "fla gla": "flash-linear-attention's GLA, linear",
    "fla kda": "flash-linear-attention's KDA, linear",
    "sdpa kv cache 48/8x64, flash": "FlashAttention-2 over a KV cache of 8 heads of 64",
    "sdpa kv cache 48/8x64, cudnn": "cuDNN attention over a KV cache of 8 heads of 64",
    "attention without mask": "Transformer without mask",
}
DECODED = (1 << 10, 1 << 14, 1 << 20)  # contexts of whole models in the tables; the figure has more


@dataclass(frozen=True)
class Comparison:
    """A line of a table: our number beside theirs, as they are written, and theirs over ours."""

    what: str
    ours: str
    peer: str
    theirs: str
    ratio: float
    shape: str
    row: dict  # ours, for commit, date, machine and versions


def peer_name(name: str) -> str:
    """``flash attention 2, 16x96`` as FlashAttention-2, 16 heads of 96."""
    library, _, heads = name.partition(" attention")
    if heads and "x" in heads and library in ("flash", "cudnn"):
        count, width = heads.rpartition(" ")[2].split("x")
        return f"{'FlashAttention-2' if library == 'flash' else 'cuDNN attention'}, {count} heads of {width}"
    return PEERS.get(name, name_of(name))


def is_linear(peer: str) -> bool:
    """Whether a name of ``peer_name`` or ``SHOWN`` is that of a linear model."""
    return "linear model" in peer or peer.endswith(("linear", "the linear form")) or peer.split(",")[0] in LINEAR_NAMES


def newest_pairs(
    rows: Sequence[dict], kind: Sequence[str], name: str, ours: Sequence[str]
) -> Iterator[tuple[dict, dict]]:
    """(our row, their row) of each ``kind`` of measurement and each peer, of the newest commit that has both.

    ``ours`` are values of column ``name``; rows of other values are peers. Rows are in the order in which they were written.
    """
    found: dict[tuple, tuple[dict, dict]] = {}
    for commit in dict.fromkeys(row["commit"] for row in rows):
        own = {(*_key(row, kind), row[name]): row for row in rows if row["commit"] == commit}
        for (*key, who), row in own.items():
            for mine in ours:
                if who not in ours and (*key, mine) in own:
                    found[(*key, mine, who)] = own[(*key, mine)], row
    yield from found.values()


def _key(row: dict, kind: Sequence[str]) -> tuple:
    return tuple(row.get(field) for field in kind)


SHAPE = ("B", "T", "H", "G", "K", "V", "dtype")


def op_shape(row: dict) -> str:
    return f"B={row['B']}, H={row['H']}, K={row['K']}, V={row['V']}, {row['dtype']}"


def ops(rows: Sequence[dict], memory: bool = False) -> list[Comparison]:
    """The op beside its peers, forward and with its backward: milliseconds, or peak memory."""
    column = "peak_bytes" if memory else "ms"
    timed = [row for row in rows if row.get(column)]
    found = []
    for ours, theirs in newest_pairs(timed, (*SHAPE, "what"), "name", [OURS]):
        what = f"{tokens(ours['T'])} tokens, {ours['what'].replace('+', ' + ')}"
        found.append(
            (ours["what"], ours["T"], _compared(what, ours, theirs, column, peer_name(theirs["name"]), op_shape(ours)))
        )
    return [line for *_, line in sorted(found, key=lambda item: (item[0] == "forward", item[1]))]


def _compared(what: str, ours: dict, theirs: dict, column: str, peer: str, shape: str) -> Comparison:
    write = in_bytes if column.endswith("bytes") else milliseconds
    return Comparison(
        what, write(ours[column]), peer, write(theirs[column]), theirs[column] / ours[column], shape, ours
    )


def milliseconds(value: float) -> str:
    return f"{1e3 * value:.1f} µs" if value < 0.1 else f"{value:#.3g} ms" if value < 100 else f"{value:,.0f} ms"


def growth(rows: Sequence[dict], short: int, long: int) -> list[Comparison]:
    """A token of a long sequence beside one of a short sequence, of the newest commit that timed both at one shape."""
    found: dict[tuple, Comparison] = {}
    both = ("H", "G", "K", "V", "B", "dtype", "commit", "what")
    timed = {
        (*_key(r, both), r["T"]): r for r in rows if r.get("ms") and r["name"] == OURS and "captured" not in r["what"]
    }
    for (*key, length), row in timed.items():
        near = timed.get((*key, short))
        if length == long and near:
            one, other = (1e3 * r["ms"] / r["B"] / r["T"] for r in (row, near))
            what = f"one token of {tokens(long)}, {row['what'].replace('+', ' + ')}"
            numbers = f"{1e3 * one:.1f} ns", f"one token of {tokens(short)}", f"{1e3 * other:.1f} ns"
            found[(*key[:6], key[7])] = Comparison(what, *numbers, other / one, op_shape(row), row)
    return list(found.values())


def training(rows: Sequence[dict], memory: bool = False) -> list[Comparison]:
    """Steps of each log-linear model beside its linear twins and softmax attention: tokens per second, or peak memory."""
    kind = ("longest", "T", "tokens", "residual", "offload", "compiled", "checkpointing")
    found = []
    for ours, theirs in newest_pairs(rows, kind, "model", list(TWINS)):
        base = theirs["model"].split(",")[0]
        if base not in (TWINS[ours["model"]], "transformer"):
            continue
        what = f"{SHOWN[ours['model']]}, {tokens(ours['T'])} tokens" + ", checkpointed" * ours["checkpointing"]
        what += f", {ours['residual']} stream" * (ours["residual"] != "float32")
        shape = f"{ours['parameters'] / 1e6:.0f}M, {tokens(ours['B'] * ours['T'])} tokens a step"
        peer = SHOWN[theirs["model"]]
        if memory:
            line = _compared(what, ours, theirs, "peak_bytes", peer, shape)
        else:
            one, other = (row["tokens_per_s"] for row in (ours, theirs))
            line = Comparison(what, f"{one:,.0f} tokens/s", peer, f"{other:,.0f} tokens/s", one / other, shape, ours)
        found.append(((ours["model"], ours["T"], peer), line))
    order = list(SHOWN.values())
    return [
        line for key, line in sorted(found, key=lambda f: (list(TWINS).index(f[0][0]), f[0][1], order.index(f[0][2])))
    ]


def several_gpus(multi: Sequence[dict], context: Sequence[dict]) -> list[Comparison]:
    """Two GPUs beside one: FSDP2 with twice the tokens, and one sequence cut in two."""
    lines = []
    for row in (row for row in multi if row["gpus"] > 1):
        one = next(r for r in multi if r["gpus"] == 1 and r["commit"] == row["commit"])
        rates = [f"{r['tokens_per_second']:,.0f} tokens/s" for r in (row, one)]
        shape = f"{row['parameters'] / 1e6:.0f}M, {tokens(row['T'])} tokens a GPU, eager"
        what = f"training step, FSDP2 on {row['gpus']} GPUs"
        lines.append(
            Comparison(
                what, rates[0], "one GPU", rates[1], row["tokens_per_second"] / one["tokens_per_second"], shape, row
            )
        )
    for row in (row for row in context if row["gpus"] > 1):
        one = next(r for r in context if r["gpus"] == 1 and (r["op"], r["commit"]) == (row["op"], row["commit"]))
        step = row["op"] == "training step"
        shape = "825M, checkpointed, eager" if step else f"H={row['H']}, K={row['K']}, V={row['V']}, {row['dtype']}"
        op = row["op"] if step else f"{row['op']}, forward + backward"
        what = f"{op}, one sequence of {tokens(row['T'])} on {row['gpus']} GPUs"
        lines.append(_compared(what, row, one, "ms", "one GPU", shape))
    return lines


def decoding_ops(rows: Sequence[dict]) -> list[Comparison]:
    """One step of one layer, entries in bfloat16, rows at mixed positions, beside its peers."""
    ours = [row for row in rows if row["op"].startswith(OURS)]
    timed = [
        {**row, "name": OURS if row in ours else row["op"]}
        for row in rows
        if row.get("ms") and (row not in ours or (row["entries"], row["positions"]) == ("bfloat16", "mixed"))
    ]
    return [
        _compared(
            f"batch of {one['B']}, context of {tokens(one['context'])}",
            one, other, "ms", peer_name(other["name"]), "48 heads, K=128, V=64, bfloat16 entries",
        )
        for one, other in newest_pairs(timed, ("rule", "B", "context"), "name", [OURS])
    ]  # fmt: skip


def decoding_models(rows: Sequence[dict], memory: bool = False) -> list[Comparison]:
    """A token of a whole model, or the bytes that its state takes, beside its linear twin and softmax attention."""
    kind = ("B", "hidden_size", "layers", "vocab_size", "dtype", "entries", "context")
    column = "state_bytes" if memory else "ms"
    lines = []
    for one, other in newest_pairs([row for row in rows if "ms" in row], kind, "model", list(TWINS)):
        if one["context"] not in DECODED or other["model"] not in (TWINS[one["model"]], SOFTMAX):
            continue
        what = f"{name_of(one['model'])}, context of {tokens(one['context'])}"
        shape = f"{one['layers']} layers of width {one['hidden_size']:,}, B={one['B']}, {one['dtype']}"
        lines.append(
            (
                one["model"],
                other["model"] != SOFTMAX,
                one["context"],
                _compared(what, one, other, column, name_of(other["model"]), shape),
            )
        )
    return [line for *_, line in sorted(lines, key=lambda line: (list(TWINS).index(line[0]), *line[1:3]))]


def cpu_growth(decoding: Sequence[dict], ops_rows: Sequence[dict]) -> Iterator[tuple[str, Comparison]]:
    """(command, comparison) on the CPU: a step at 131K beside 1K, and a token of 32K beside 2K."""
    steps = {(row["op"], row["positions"], row["context"]): row for row in decoding}
    for (op, positions, context), row in steps.items():
        if context == 1 << 17:
            near = steps[op, positions, 1 << 10]
            s, where = row["shape"], "rows at their most" if positions == "full" else "rows anywhere"
            shape = f"H={s['H']}, K={s['K']}, V={s['V']}, {row['dtype']}, {row['threads']} thread"
            what = f"{op.replace('_', ' ')}, one step at 128K, {where}"
            yield "decoding_cpu", _compared(what, row, near, "ms", "the same at 1K", shape)
    timed = {(r["op"], r["form"], r["shape"]["T"]): r for r in ops_rows if r["what"] == "forward_backward"}
    for (op, form, length), row in timed.items():
        if form == "log_linear" and length in (1 << 11, 1 << 15):
            s = row["shape"]
            shape = f"H={s['H']}, K={s['K']}, V={s['V']}, {row['dtype']}, {row['threads']} threads"
            others = [("the linear form", timed[op, "linear", length])]
            others += [("the same at 2K", timed[op, form, 1 << 11])] if length == 1 << 15 else []
            for peer, other in others:
                numbers = [r["median_us_per_token"] for r in (row, other)]
                what = f"{op.replace('_', ' ')}, one token of {tokens(length)}, forward + backward"
                ours, theirs = (f"{number:.1f} µs" for number in numbers)
                yield "ops_cpu", Comparison(what, ours, peer, theirs, numbers[1] / numbers[0], shape, row)


def machines(rows: Iterable[dict]) -> str:
    """GPU or CPU and versions of the rows, each kind once."""
    found = dict.fromkeys(
        ", ".join(
            [
                row.get("gpu") or row["cpu"],
                f"torch {row['torch']}",
                *([f"Triton {row['triton']}"] if "triton" in row else []),
            ]
        )
        for row in rows
    )
    return "; ".join(found)
