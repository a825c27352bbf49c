"""Checks FSDP2 training on several GPUs against one, then times a training step of a large model on one and on several.

    python benchmarks/multi_gpu.py                       # two GPUs; starts torchrun itself; under three minutes
    python benchmarks/multi_gpu.py --gpus 4 --compile
    python benchmarks/multi_gpu.py --device cpu --hidden-size 64 --layers 2 --vocab-size 512 --T 256 --steps 3    # a rehearsal

First `loglinear train` runs on one GPU, on all with --fsdp, and a third time from the checkpoints of the second: on one GPU,
then on all again. Each takes the same sequences per step, in bfloat16. Losses must agree as closely as those of one GPU alone
that takes the same steps in smaller portions, for that is what rounding changes; the limit is three times this, plus 1e-3.

Only then are rows written. A step is forward, backward, clipping and AdamW under autocast, with one batch of random tokens per
GPU, the same number on one GPU as on several; its time is that of the slowest process, the median over --steps of them, its
spread the 20th and 80th percentile. One GPU trains the plain model, without FSDP2.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).parent))
from loglinear.cli import main as loglinear
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.training import checkpoints
from loglinear.training.model import compile_blocks
from loglinear.training.sharding import shard
from measure import RESULTS, append, environment
from ops_cpu import machine
from training_models import update

NAME = "multi_gpu"
SEQUENCES = 16  # of a step of the check
STEPS = 30
SAVE = 10
MODEL = "--hidden-size 256 --num-hidden-layers 4 --context 1024 --vocab-size 1024"
REHEARSAL = (
    "--hidden-size 32 --num-hidden-layers 1 --mamba-head-dim 8 --mamba-state-size 8 --context 64 --vocab-size 300"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, help="processes, one for each GPU")
    parser.add_argument("--hidden-size", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=21)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--T", type=int, default=16_384, help="tokens of a sequence")
    parser.add_argument("--B", type=int, default=1, help="sequences per GPU")
    parser.add_argument("--steps", type=int, default=15, help="steps timed, after three that are not")
    parser.add_argument("--compile", action="store_true", help="compile the blocks and the loss")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--commit", help="hash to record where the checkout has no .git")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # what a process that this script starts has to do
    args = parser.parse_args()
    if args.gpus < 2 or SEQUENCES % args.gpus:
        parser.error(f"--gpus must be at least 2 and divide {SEQUENCES}: got {args.gpus}")
    if args.work is None and args.device == "cuda" and torch.cuda.device_count() < args.gpus:
        parser.error(f"--gpus {args.gpus} needs as many GPUs: got {torch.cuda.device_count()}")
    return args


def start(args: argparse.Namespace, folder: Path, processes: int, runs: list[list[str]]) -> list[float]:
    """Train ``runs`` in a group of processes, on as many GPUs; or, if there are none, time steps and return the times.

    Not both in one process: `loglinear train` ends the group that it used.
    """
    todo, times = folder / "todo.json", folder / "times.json"
    todo.write_text(json.dumps({"times": str(times), "runs": runs}))
    times.write_text("[]")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), *sys.argv, "--work", str(todo)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(args.gpus)))).split(",")
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ",".join(visible[:processes])}
    if subprocess.run(command, env=variables).returncode:
        raise SystemExit("a process failed; nothing recorded")
    return json.loads(times.read_text())


def work(args: argparse.Namespace) -> None:
    """The work of a process of a group: training runs that keep all their checkpoints, or a timing."""
    todo = json.loads(args.work.read_text())
    checkpoints.KEPT = STEPS
    for options in todo["runs"]:
        if loglinear(["train", *options]):
            raise SystemExit("loglinear train failed")
    if not todo["runs"]:
        times = step_times(args)
        if int(os.environ.get("RANK", 0)) == 0:
            Path(todo["times"]).write_text(json.dumps(times), encoding="utf-8")
    if distributed.is_initialized():
        distributed.destroy_process_group()


def step_times(args: argparse.Namespace) -> list[float]:
    """Milliseconds of each step, of the slowest process, and the largest memory of any in GiB at the end of the list."""
    processes, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    device = torch.device(args.device, rank if args.device == "cuda" else None)
    if args.device == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    with device:
        model = LogLinearForCausalLM(model_config(args)).train()
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    if args.compile:
        compile_blocks(model)
    if processes > 1:
        shard(model, init_device_mesh(args.device, (processes,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    torch.manual_seed(rank)
    tokens = torch.randint(args.vocab_size, (args.B, args.T), device=device)
    times = []
    for step in range(args.steps + 3):
        begin = time.perf_counter()
        with torch.autocast(args.device, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        update(model, optimizer)
        if args.device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
        if rank == 0:
            print(f"{processes} GPU(s), step {step}: loss {loss.item():.4f}, {times[-1]:.1f} ms", flush=True)
    memory = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else 0.0
    measured = torch.tensor([*times[3:], memory], device=device)
    if processes > 1:
        distributed.all_reduce(measured, distributed.ReduceOp.MAX)
    return measured.tolist()


def model_config(args: argparse.Namespace) -> LogLinearConfig:
    return LogLinearConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        vocab_size=args.vocab_size,
        max_position_embeddings=args.T,
    )


def losses(run: Path) -> list[float]:
    return [log["loss"] for log in json.loads((run / "record.json").read_text())["history"] if "loss" in log]


def interrupted_copy(run: Path, step: int, copy: Path) -> Path:
    """The run as it was when its checkpoint ``step`` was the last."""
    shutil.copytree(run, copy)
    for checkpoint in checkpoints.complete_checkpoints(copy):
        if checkpoints.checkpoint_step(checkpoint) > step:
            shutil.rmtree(checkpoint)
    record = json.loads((copy / "record.json").read_text())
    (copy / "record.json").write_text(json.dumps({**record, "status": "running"}))
    return copy


def check(args: argparse.Namespace, folder: Path) -> None:
    """Train on one GPU, on all, and from the one to the other; exits if the losses disagree."""
    texts = folder / "texts"
    texts.mkdir()
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[: 150 if args.device == "cuda" else 10]:
        shutil.copy(source, texts / f"{source.stem}.txt")
    size = (MODEL if args.device == "cuda" else REHEARSAL).split()
    common = ["--data", str(texts), "--cache", str(folder / "cache"), *size, "--precision", "bfloat16"]
    common += ["--steps", str(STEPS), "--save-every", str(SAVE), "--log-every", "1"]

    def options(run: Path, processes: int, portions: int = 1) -> list[str]:
        share = ["--batch-size", str(SEQUENCES // processes // portions), "--accumulate", str(portions)]
        return [*common, *share, "--output", str(run), *(["--fsdp"] if processes > 1 else [])]

    one, portions, several = (folder / name for name in ("one", "portions", "several"))
    start(args, folder, 1, [options(one, 1), options(portions, 1, 2)])
    start(args, folder, args.gpus, [options(several, args.gpus)])
    forth = interrupted_copy(several, SAVE, folder / "forth")
    start(args, folder, 1, [options(forth, 1)])
    back = interrupted_copy(forth, 2 * SAVE, folder / "back")
    start(args, folder, args.gpus, [options(back, args.gpus)])

    expected, falls = losses(one), losses(one)[0] - losses(one)[-1]
    gaps = {
        run.name: max(abs(loss - other) for loss, other in zip(losses(run), expected, strict=True))
        for run in (portions, several, forth, back)
    }
    print(
        f"one GPU: loss {expected[0]:.4f} -> {expected[-1]:.4f} in {STEPS} steps; largest differences from it: {gaps}"
    )
    if falls < 0.1 or max(gaps.values()) > 3 * gaps["portions"] + 1e-3:
        raise SystemExit("the loss does not fall, or the runs disagree: nothing recorded")
    LogLinearForCausalLM.from_pretrained(back)


def main() -> None:
    args = arguments()
    if args.work is not None:
        work(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        check(args, Path(folder))
        times = {gpus: start(args, Path(folder), gpus, []) for gpus in (1, args.gpus)}
    common = machine(torch.get_num_threads()) if args.device == "cpu" else environment()
    common["commit"] = args.commit or common["commit"]
    with torch.device("meta"):
        common["parameters"] = LogLinearForCausalLM(model_config(args)).num_parameters()
    sizes = {name: getattr(args, name) for name in ("hidden_size", "layers", "vocab_size", "B", "T", "steps")}
    sizes |= {"dtype": "bfloat16 autocast", "compile": args.compile, "checkpointing": args.checkpointing}
    rows = []
    for gpus, (*steps, memory) in times.items():
        low, *_, high = statistics.quantiles(steps, n=5)
        row = {"op": "training step", "model": "log_linear_mamba2", "gpus": gpus, "fsdp2": gpus > 1, **sizes}
        row |= {"ms": statistics.median(steps), "ms_low": low, "ms_high": high, "peak_gib": round(memory, 2)}
        row["tokens_per_second"] = round(1e3 * gpus * args.B * args.T / row["ms"], 1)
        row["speedup"] = round(row["tokens_per_second"] / (rows[0] if rows else row)["tokens_per_second"], 3)
        rows.append({**common, **row})
        print(
            f"{gpus} GPU(s): {row['ms']:.1f} ms ({low:.1f} … {high:.1f}), {row['tokens_per_second']:,.0f} tokens/s, ",
            end="",
        )
        print(f"{row['speedup']:.2f} x one, {memory:.1f} GiB")
    print(f"rows: {append(NAME, rows, args.results)}")


if __name__ == "__main__":
    main()
