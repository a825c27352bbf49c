"""Language models with and without levels, eight seeds each, as stacks: do the levels lower the loss of text, and by how much?

    python experiments/text_stacks.py DATA OUT [--seconds 400] [--known experiments/results/text_stacks.jsonl]

DATA holds train.npy and valid.npy, uint16 token ids, and the offsets of their documents (``text_tokens.py``). The plan was
written before its first row. Models of about a million parameters read 29M tokens of C files in sequences of 8,192. Three rates
and two seeds of their own choose a model's rate, on the first half of the validation files. Eight fresh seeds at that rate
are what is reported, on the other half: by position, at the trained length and at four times it. A seed decides the weights
and the order of the data, so models of one seed are pairs. Levels that no training sequence has are read in two ways: as they
are, and as the last trained one. Then recipes of the linear models, with as many tokens each: what their seeds differ by, and
what other rates, schedules and batches do. Eight seeds more have the recipe that was chosen so. Then where λ starts, on seeds
of their own. Recipes and starts have the validation loss alone. Rows go to OUT/text_stacks.jsonl, one for each copy.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear.fenwick import num_levels
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.tasks.mqar.run import read_rows
from stack_needles import Needles, Tune, tokenizer, tune_and_test
from stack_training import Steps
from stacked import Stack, hidden_states

WORDS, WIDTH, LAYERS, HEADS, KEYS, VALUES = 2048, 128, 4, 4, 32, 64
CONTEXT, FAR, BATCH, STEPS, SWEEP_STEPS = 8192, 32768, 4, 900, 200
RATES, SWEEP_SEEDS, FRESH_SEEDS = (2e-3, 4e-3, 8e-3), (100, 101), tuple(range(8))
RANGES = 16  # of positions
WARMUP, FLOOR, DECAY = 0.05, 0.0, 0.1
PAIRS = ("mamba2", "gated_deltanet")
# Chosen after ten recipes of Mamba-2: the rate with the smallest spread of seeds, at a lower loss than that of the sweep.
SECOND_RATE, SECOND_SEEDS = 1.6e-2, tuple(range(8, 16))
REPORTED = ("fresh", "second")  # parts


@dataclass(frozen=True)
class Copy:
    """One training. seed: of the weights; order: of the data."""

    mixer: str
    start: str
    rate: float
    seed: int
    order: int
    steps: int = STEPS
    warmup: float = WARMUP
    floor: float = FLOOR
    part: str = "fresh"

    @property
    def batch(self) -> int:
        """Sequences a step: but for sweeps, all trainings read as many."""
        return BATCH if self.part == "sweep" else BATCH * STEPS // self.steps

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to ``floor`` of the peak."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return self.rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.rate * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done)))

    def model(self) -> LogLinearForCausalLM:
        torch.manual_seed(self.seed)
        config = LogLinearConfig(
            mixer=self.mixer,
            vocab_size=WORDS,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            intermediate_size=0,
            max_position_embeddings=FAR,
            mamba_num_heads=HEADS,
            mamba_head_dim=VALUES,
            mamba_state_size=KEYS,
            delta_num_heads=HEADS,
            delta_key_dim=KEYS,
            delta_value_dim=VALUES,
            initializer_range=WIDTH**-0.5,
            level_scale_start="one" if self.start == "one" else "paper",
            level_scale_std=None if self.start == "noise" else 0.006,
            tie_word_embeddings=True,
            use_cache=False,
        )
        model = LogLinearForCausalLM(config)
        with torch.no_grad():
            for block in model.model.layers:
                block.mixer.out_proj.weight.mul_((2 * LAYERS) ** -0.5)
        return model


def arms(pairs: Sequence[str]) -> list[tuple[str, str]]:
    """(mixer, start of λ) in the order in which they run."""
    return [arm for one in pairs for arm in ((one, ""), (f"log_linear_{one}", "one"))]


def sweep(mixer: str, start: str) -> list[Copy]:
    return [Copy(mixer, start, rate, s, s, SWEEP_STEPS, part="sweep") for rate in RATES for s in SWEEP_SEEDS]


def recipes(mixer: str, rate: float) -> list[list[Copy]]:
    """Stacks of a linear model: half the batch and twice the steps; then other rates, weights, orders and schedules."""
    base = Copy(mixer, "", rate, 200, 200, part="recipe")
    seeds = [replace(base, seed=200 + i, order=200 + i) for i in range(4)]
    twice, four = ([replace(one, rate=many * rate) for one in seeds] for many in (2, 4))
    half = [replace(one, steps=2 * STEPS, part="recipe: batch 2") for one in seeds]
    others = [
        *seeds[:1],
        replace(base, seed=201, part="recipe: weights"),
        replace(base, order=201, part="recipe: order"),
        *twice[:3],
        *four[:2],
        replace(twice[0], floor=0.1, part="recipe: floor 0.1"),
        replace(twice[0], warmup=0.2, part="recipe: warm-up 0.2"),
    ]
    return [half, others]


def starts(mixer: str, rate: float) -> list[list[Copy]]:
    """Stacks of a log-linear model: λ from "paper" and from "noise", which share an offset, and from "one"."""
    base = Copy(f"log_linear_{mixer}", "one", rate, 300, 300, part="start")
    seeds = [replace(base, seed=300 + i, order=300 + i) for i in range(4)]
    return [[replace(one, start=start) for start in ("paper", "noise") for one in seeds], seeds]


def stacks(rows: dict[Copy, dict], pairs: Sequence[str] = PAIRS) -> Iterator[list[Copy]]:
    """The first stack of these pairs without rows, in the order of the plan."""
    for mixer, start in arms(pairs):
        if any(copy not in rows for copy in sweep(mixer, start)):
            yield sweep(mixer, start)
            return
        found = [Copy(mixer, start, best_rate(mixer, start, rows), seed, seed) for seed in FRESH_SEEDS]
        if any(copy not in rows for copy in found):
            yield found
            return
    second = [[Copy(*arm, SECOND_RATE, seed, seed, part="second") for seed in SECOND_SEEDS] for arm in arms(pairs)]
    later = [
        stack
        for mixer in pairs
        for stack in (
            *recipes(mixer, best_rate(mixer, "", rows)),
            *starts(mixer, best_rate(f"log_linear_{mixer}", "one", rows)),
        )
    ]
    yield from (stack for stack in (*second, *later) if any(copy not in rows for copy in stack))


def best_rate(mixer: str, start: str, rows: dict[Copy, dict]) -> float:
    """The rate of the plan with the least mean validation loss over sweep seeds."""

    def loss(rate: float) -> float:
        return fmean(rows[copy]["validation"] for copy in sweep(mixer, start) if copy.rate == rate)

    return min(RATES, key=loss)


class Text:
    """Token ids on the device, and places where a sequence fits into a document."""

    def __init__(self, data: Path, side: str, device: str) -> None:
        ids = np.load(data / f"{side}.npy")
        self.ids = torch.from_numpy(ids.astype(np.int16)).to(device)  # below 2,048
        self.offsets = np.load(data / f"{side}_offsets.npy")

    def starts(self, copy: Copy) -> np.ndarray:
        """``[steps, batch]``: where the training sequences of a copy begin, by its order alone."""
        room = np.maximum(np.diff(self.offsets) - CONTEXT - 1, 0)
        rng = np.random.default_rng(copy.order)
        documents = rng.choice(len(room), size=(copy.steps, copy.batch), p=room / room.sum())
        return self.offsets[documents] + (rng.random(documents.shape) * room[documents]).astype(np.int64)

    def whole(self, length: int, half: int) -> Tensor:
        """int64 ``[n, length + 1]``: sequences one behind the other in each second document."""
        spans = list(zip(self.offsets[:-1], self.offsets[1:]))[half::2]
        first = [place for start, stop in spans for place in range(start, stop - length, length)]
        return torch.stack([self.ids[place : place + length + 1].long() for place in first])


def token_losses(h: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """float32 ``[S, B, T]`` of hidden states and the tokens that come next."""
    logits = (h.flatten(1, 2).to(torch.bfloat16) @ table.to(torch.bfloat16).mT).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def mean_losses(h: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    return token_losses(h, table, targets).mean((1, 2))


class Training:
    """A stack of language models; a step finds its sequences by its number."""

    def __init__(self, copies: list[Copy], text: Text, device: str, compiled: bool) -> None:
        rates = torch.tensor(
            [[copy.rate_at(step) for copy in copies] for step in range(copies[0].steps)], device=device
        )
        low = torch.bfloat16 if device == "cuda" else torch.float32
        self.stack, self.text = Stack([copy.model() for copy in copies], rates, DECAY, low, compiled), text
        self.losses = self.stack.wrap(mean_losses)
        starts = np.stack([text.starts(copy) for copy in copies], 1)
        self.starts = torch.from_numpy(starts).to(device)
        self.range = torch.arange(CONTEXT + 1, device=device)

    def step(self, place: Tensor) -> Tensor:
        first = self.starts.index_select(0, place)[0]
        ids = self.text.ids[(first.unsqueeze(-1) + self.range).flatten()].long().view(*first.shape, -1)
        found = self.losses(self.stack.hidden(ids[..., :-1]), self.stack.table, ids[..., 1:])
        self.stack.update(found, place)
        return found.detach()


@torch.no_grad()
def evaluate(stack: Stack, sequences: Tensor, levels: int | None) -> Tensor:
    """float64 ``[S, RANGES]``: mean losses by range of positions. levels: how many λ are read."""
    shape = replace(stack.shape, levels=levels)
    sums = torch.zeros(stack.copies, RANGES, dtype=torch.float64, device=sequences.device)
    for ids in sequences:
        row = ids.expand(stack.copies, 1, -1)
        h = hidden_states(stack.weights, row[..., :-1], shape)
        sums += token_losses(h, stack.table, row[..., 1:]).double().view(stack.copies, RANGES, -1).mean(-1)
    return sums / len(sequences)


def train(copies: list[Copy], text: Text, device: str, compiled: bool, unfinished: Path) -> tuple[Stack, list[float]]:
    """The trained stack and the final loss of each copy. unfinished: a file for ``Steps.through``."""
    stream = torch.cuda.Stream() if device == "cuda" else None
    with torch.cuda.stream(stream):
        training = Training(copies, text, device, compiled)
        losses = Steps(training.step, training.stack, stream).through(copies[0].steps, unfinished)
        return training.stack, losses[-50:].mean(0).tolist()


def tested(copies: list[Copy], stack: Stack, valid: Text) -> list[dict]:
    """Of each copy the losses on held-out files."""
    part, trained = copies[0].part, num_levels(CONTEXT)
    found = {"validation": evaluate(stack, valid.whole(CONTEXT, 0)[: 48 if part == "sweep" else None], trained)}
    if part in REPORTED:
        found["test"] = evaluate(stack, valid.whole(CONTEXT, 1), trained)
        found["far"] = evaluate(stack, valid.whole(FAR, 1), trained)
        if stack.shape.offset is not None:
            found["far_as_they_are"] = evaluate(stack, valid.whole(FAR, 1), None)
    rows: list[dict] = [{name: x[i].tolist() for name, x in found.items()} for i in range(len(copies))]
    common = {"parameters": stack.parameters, "torch": torch.__version__, "stacked": len(copies)}
    return [{**row, "validation": fmean(row["validation"]), **common} for row in rows]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=400.0, help="no stack begins that may not end in them")
    parser.add_argument("--known", type=Path, nargs="*", default=[], help="files with rows of earlier calls")
    parser.add_argument("--pairs", nargs="+", default=PAIRS, choices=PAIRS)
    parser.add_argument("--mixers", nargs="+", help="only stacks of these")
    parser.add_argument("--parts", nargs="+", help="only stacks of these parts of the plan")
    parser.add_argument("--needles", action="store_true", help="tune each reported stack on needles, and test it")
    parser.add_argument("--tune-steps", type=int, default=Tune.steps)
    parser.add_argument("--tune-rate", type=float, default=Tune.rate)
    parser.add_argument("--tune-lengths", type=int, nargs="+", default=Tune.lengths)
    parser.add_argument(
        "--export", type=Path, help="write the first model of each reported stack as a checkpoint there"
    )
    parser.add_argument("--copies", type=int, help="at once, for less memory; none: all of a stack")
    parser.add_argument("--stacks", type=int, default=1000, help="no more than so many")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    until = time.monotonic() + options.seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (options.out / "unfinished").mkdir(parents=True, exist_ok=True)
    path, needle_path = options.out / "text_stacks.jsonl", options.out / "text_needles.jsonl"
    found = [row for file in (*options.known, path, needle_path) for row in read_rows(file)]
    rows = {Copy(**row["copy"]): row for row in found if "validation" in row}
    tuned = {Copy(**row["copy"]) for row in found if "needles" in row}
    needles = Needles(options.data, Tune(options.tune_steps, options.tune_rate, tuple(options.tune_lengths)))
    tuning = needles.begin() if options.needles else None
    text, valid = Text(options.data, "train", device), Text(options.data, "valid", device)
    speed = 0.0  # seconds a sequence
    for _ in range(options.stacks):
        whole = {c: row for c, row in rows.items() if not tuning or c.part not in REPORTED or c in tuned}
        copies = next((one for one in stacks(whole, options.pairs) if asked(one[0], options)), None)
        if copies is None:
            break
        copies = [copy for copy in copies if copy not in whole][: options.copies]
        sequences = sum(copy.steps * copy.batch for copy in copies)
        if time.monotonic() + speed * sequences > until:
            break
        began = time.monotonic()
        state = options.out / "unfinished" / f"{'-'.join(map(str, asdict(copies[0]).values()))}.pt".replace(" ", "")
        stack, final = train(copies, text, device, device == "cuda", state)
        torch.cuda.empty_cache()  # of its graph
        if any(copy not in rows for copy in copies):
            made = tested(copies, stack, valid)
            more: dict[str, object] = {"device": torch.cuda.get_device_name() if device == "cuda" else "CPU"}
            more["seconds"] = round(time.monotonic() - began, 1)
            new = [
                {"copy": asdict(c), **row, "final_loss": final[i], **more}
                for i, (c, row) in enumerate(zip(copies, made))
            ]
            rows.update(zip(copies, new))
            save(new, path)
            for copy, row in zip(copies, new):
                print(f"{copy}: {row['seconds']} s, validation {row['validation']:.4f}", flush=True)
            speed = (time.monotonic() - began) / sequences
        if options.export and copies[0].part in REPORTED:
            folder = options.export / f"{copies[0].mixer}-s{copies[0].seed}"
            if not folder.exists():
                export(copies[0], stack, 0, options.data, folder)
        if tuning and copies[0].part in REPORTED:
            half = state.with_suffix(".tune.pt")
            stream = torch.cuda.Stream() if device == "cuda" else None
            with torch.cuda.stream(stream):
                exact = tune_and_test(stack, needles, tuning.result(), stream, CONTEXT, half)
            save([{"copy": asdict(copy), **row} for copy, row in zip(copies, exact)], needle_path)
            tuned.update(copies)
            half.unlink(missing_ok=True)
            print(f"{copies[0].mixer} {copies[0].start} needles: {exact[0]}", flush=True)
        state.unlink(missing_ok=True)


def asked(copy: Copy, options: argparse.Namespace) -> bool:
    """Whether stacks of this copy are among those that the options ask for."""
    mixers, parts = options.mixers or [copy.mixer], options.parts or [copy.part]
    return copy.mixer in mixers and copy.part in parts


def export(copy: Copy, stack: Stack, place: int, data: Path, folder: Path) -> None:
    """Write one model of a stack with its tokenizer, whole or not at all."""
    model = copy.model()
    model.load_state_dict({name: w[place].detach().cpu() for name, w in stack.weights.items()}, strict=False)
    model.tie_weights()
    half = folder.with_name(f"{folder.name}.half")
    model.save_pretrained(half)
    tokenizer(data).save_pretrained(half)
    half.rename(folder)


def save(rows: list[dict], path: Path) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
