"""Questions about long documents: the definition of a headword, or the value of a #define, 1K to 64K tokens after it was read.

    python experiments/documents.py fetch OUT                   the dictionary WordNet 3.0 (Debian's dict-wn) as OUT/*.jsonl
    python experiments/documents.py tune OUT/train.jsonl OUT/valid.jsonl CHECKPOINT ROWS --kind headword
    python experiments/documents.py tune train.jsonl valid.jsonl CHECKPOINT ROWS --kind define

A checkpoint is asked, tuned on questions about the training documents, and asked again about the others. The answer is exact if
each of its tokens is the likeliest; its perplexity stands beside, and both without the definition in sight. All checkpoints
with one tokenizer see the same questions. Each has a row in ROWS. The dictionary is fetched by its hash and never committed.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from debian import fetch, files
from loglinear.cli.checkpoint import open_checkpoint
from loglinear.tasks.lm.retrieval import DEFINITION, PADDING, Question, questions, retrieve, value_logits
from loglinear.training.finetune import rate

PACKAGE = "w/wordnet/dict-wn_3.0-37_all.deb"
SHA256 = "ed99e0bf162815dc1cc69de3727eedd7112ddd170badf83dbde26209e0724a8c"
PART, HELD_OUT = 1 << 18, 10  # characters of a document, and one document of so many is for the test
# A headword at the start of a line, and the first words of its first meaning below it.
HEADWORD = re.compile(
    r"^(?P<name>[A-Za-z][^\n]{3,40})\n    (?:n|v|adj|adv)(?: 1)?: (?P<value>[^\n;:\[{]{12,60}\w)(?=\W)", re.MULTILINE
)
KINDS = {"headword": HEADWORD, "define": DEFINITION}
TRAINED, TESTED = (1024, 2048, 4096, 8192, 16384), (1024, 4096, 16384, 65536)
BATCH_TOKENS, CLIP = 65_536, 1.0


def dictionary(package: bytes) -> str:
    """The text of the dictionary in a Debian package."""
    ((_, content),) = files(package, re.compile(r"\.dict\.dz$"))
    return gzip.decompress(content).decode()


def parts(text: str) -> Iterator[str]:
    """Documents of whole entries: each begins at a headword."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + PART) + 1 or len(text)
        while stop < len(text) and text[stop].isspace():  # inside of an entry
            stop = text.find("\n", stop) + 1 or len(text)
        yield text[start:stop]
        start = stop


def write(text: str, out: Path) -> None:
    documents = list(parts(text))
    for side, kept in (("train", 0), ("valid", 1)):
        some = [document for i, document in enumerate(documents) if (i % HELD_OUT == HELD_OUT - 1) == kept]
        lines = (json.dumps({"text": document}) + "\n" for document in some)
        (out / f"{side}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{side}: {len(some)} documents, {sum(map(len, some)):,} characters")


def texts(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def tune(model: PreTrainedModel, asked: list[Question], steps: int, peak: float, dtype: torch.dtype) -> list[float]:
    """Train ``model`` on the answers, a distance a step; returns the losses, each a mean over a tenth of the steps."""
    device = next(model.parameters()).device
    by_distance: dict[int, list[Question]] = {}
    for question in asked:
        by_distance.setdefault(question.distance, []).append(question)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.0)
    losses, rng = torch.zeros(steps, device=device), np.random.default_rng(0)
    model.train()
    for step in range(steps):
        some = by_distance[int(rng.choice(list(by_distance)))]
        length = -(-max(len(question.ids) for question in some) // PADDING) * PADDING
        batch = [some[i] for i in rng.choice(len(some), max(1, BATCH_TOKENS // length))]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits, targets, _ = value_logits(model, batch, length)
        loss = cross_entropy(logits, targets)
        optimizer.param_groups[0]["lr"] = peak * rate(step, steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses[step] = loss.detach()
    return [float(part.mean()) for part in losses.chunk(10)]


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: Path, options: argparse.Namespace
) -> list[dict]:
    """Exact shares and perplexities of the answers by distance, with and without the definition in sight."""
    pairs = questions(texts(path), tokenizer, options.distances, options.questions, 1, KINDS[options.kind])
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    found = retrieve(model, pairs, dtype)
    return [
        row | {"perplexity": math.exp(row["loss"]), "perplexity_without": math.exp(row["loss_without"])}
        for row in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    fetching = commands.add_parser("fetch")
    fetching.add_argument("out", type=Path)
    tuning = commands.add_parser("tune")
    for name in ("train", "valid", "checkpoint", "rows"):
        tuning.add_argument(name, type=Path)
    tuning.add_argument("--kind", choices=list(KINDS), default="headword")
    tuning.add_argument("--steps", type=int, default=800)
    tuning.add_argument("--rate", type=float, default=3e-4)
    tuning.add_argument("--questions", type=int, default=200, help="at each distance, in the test")
    tuning.add_argument("--trained", type=int, nargs="+", default=TRAINED, help="distances of the fine-tune")
    tuning.add_argument("--distances", type=int, nargs="+", default=TESTED, help="of the test")
    options = parser.parse_args()
    if options.command == "fetch":
        options.out.mkdir(parents=True, exist_ok=True)
        write(dictionary(fetch(PACKAGE, SHA256, options.out)), options.out)
        return
    checkpoint = open_checkpoint(options.checkpoint)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    count = 8 * options.questions
    made = questions(texts(options.train), tokenizer, options.trained, count, 0, KINDS[options.kind])
    asked = [with_definition for with_definition, _ in itertools.islice(made, count * len(options.trained))]
    before = answers(model, tokenizer, options.valid, options)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    losses = tune(model, asked, options.steps, options.rate, dtype)
    row = {"checkpoint": options.checkpoint.name, "kind": options.kind, "steps": options.steps, "losses": losses}
    row |= {"questions": len(asked), "before": before, "after": answers(model, tokenizer, options.valid, options)}
    with options.rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    for one in row["after"]:
        print(
            f"{row['checkpoint']}, {options.kind}, {one['distance']:,} tokens: exact {one['exact']:.3f} "
            f"(without {one['without']:.3f}), perplexity {one['perplexity']:.2f} ({one['perplexity_without']:.2f})"
        )


if __name__ == "__main__":
    main()
