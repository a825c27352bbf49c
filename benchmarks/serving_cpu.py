"""Tokens per second of 8 requests at once on the CPU: ``vllm serve`` with the plugin beside ``loglinear serve``.

    make .venv-vllm/.installed && .venv-vllm/bin/python benchmarks/serving_cpu.py     # some minutes

Both servers hold one model of random weights, have one thread of PyTorch, and are asked over loopback by OpenAI's client.
They are asked in turn, so that a disturbance meets both alike: the answers of all prompts at once, several times. A rate is
the median over the rounds, its spread the smallest and the largest. ``loglinear serve`` computes requests one after another.
First of all the answers of both servers are compared with those of ``generate``. Appends one JSON row per server to
``--output``; exits with status 1 when vLLM makes less than 3 times as many tokens a second.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch

sys.path.insert(0, str(Path(__file__).parent))
from loglinear import LogLinearConfig, LogLinearForCausalLM
from ops_cpu import machine

REQUESTS, PROMPT, ANSWER = 8, 100, 64
FIELDS: dict[str, Any] = {
    **{"mixer": "log_linear_mamba2", "vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 4},
    **{"mamba_state_size": 64, "max_position_embeddings": 4096, "initializer_range": 0.1},
}
MIN_RATIO = 3
ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    **{"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
}
COMMANDS = {  # the command vllm of vllm-cpu 0.32.0 asks for a package called vllm, and ends
    "vllm": ["-m", "vllm.entrypoints.openai.api_server", "--dtype", "float32", "--enforce-eager", "--model"],
    "loglinear": ["-m", "loglinear", "serve", "--device", "cpu"],
}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, FIELDS["vocab_size"], (REQUESTS, PROMPT), generator=generator).tolist()


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def save(folder: str) -> list[str]:
    """A model of random weights and a tokenizer of one word a token; the greedy answers of ``generate``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = LogLinearForCausalLM(LogLinearConfig(**FIELDS)).eval()
    model.generation_config.eos_token_id = None  # an answer has ANSWER tokens
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(FIELDS["vocab_size"])}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    answers = model.generate(torch.tensor(prompts()), max_new_tokens=ANSWER, do_sample=False)
    return [words(ids) for ids in answers[:, PROMPT:].tolist()]


@contextmanager
def server(kind: str, folder: str) -> Iterator[str]:
    """The address of a server on a free port, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, *COMMANDS[kind], folder, "--host", "127.0.0.1", "--port", port]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log)
        try:
            while True:
                try:
                    urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                except OSError:
                    if process.poll() is not None:
                        log.seek(0)
                        raise SystemExit(f"the server {kind} has ended:\n{log.read()}") from None
                    time.sleep(0.3)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait()


def ask(address: str, model: str) -> tuple[float, list[str]]:
    """Tokens per second of all answers together, and the answers."""
    import openai

    client = openai.OpenAI(base_url=address, api_key="none", timeout=600, max_retries=0)

    def answer(prompt: list[int]) -> str:
        asked = {"model": model, "prompt": words(prompt), "max_tokens": ANSWER, "temperature": 0}
        return client.completions.create(**asked).choices[0].text.strip()

    began = time.perf_counter()
    with ThreadPoolExecutor(REQUESTS) as pool:
        answers = list(pool.map(answer, prompts()))
    return REQUESTS * ANSWER / (time.perf_counter() - began), answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "serving_cpu.jsonl")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        want = save(folder)
        servers = {kind: running.enter_context(server(kind, folder)) for kind in COMMANDS}
        for kind, address in servers.items():
            if ask(address, folder)[1] != want:
                raise SystemExit(f"{kind} has other answers than generate; nothing timed")
        rates: dict[str, list[float]] = {kind: [] for kind in servers}
        for _ in range(arguments.rounds):
            for kind, address in servers.items():
                rates[kind].append(ask(address, folder)[0])
    middle = {kind: statistics.median(found) for kind, found in rates.items()}
    common = {"requests": REQUESTS, "prompt": PROMPT, "answer": ANSWER, "dtype": "float32", **FIELDS, **machine(1)}
    with arguments.output.open("a") as file:
        for kind, found in rates.items():
            row = {"server": kind, "command": " ".join(COMMANDS[kind]), "tokens_per_second": middle[kind]}
            row |= {"low": min(found), "high": max(found), "rounds": len(found), **common, **versions()}
            file.write(json.dumps(row) + "\n")
            print(f"{kind:10s} {middle[kind]:7.1f} tokens/s  ({min(found):.1f} … {max(found):.1f})")
    ratio = middle["vllm"] / middle["loglinear"]
    print(f"vLLM makes {ratio:.1f} times as many tokens a second")
    if ratio < MIN_RATIO:
        raise SystemExit(f"less than {MIN_RATIO} times")


def versions() -> dict[str, str]:
    import transformers
    import vllm

    return {"vllm": vllm.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    main()
