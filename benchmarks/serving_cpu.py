"""Tokens per second of 8 requests at once on the CPU: ``vllm serve`` with the plugin beside ``loglinear serve``.

    .venv-vllm/bin/python benchmarks/serving_cpu.py --output benchmarks/results/serving_cpu.jsonl

Both servers have one thread and the same model, and are asked in turn through OpenAI's client: prompts of 100 tokens, answers
of 64. ``loglinear serve`` computes requests one after another. Needs vLLM and the serve extra (the environment of
``make test-vllm``, and typer).
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import openai
import torch

from loglinear import LogLinearConfig, LogLinearForCausalLM

REQUESTS, PROMPT, ANSWER, ROUNDS = 8, 100, 64, 3
FIELDS = dict(vocab_size=2048, hidden_size=256, num_hidden_layers=4, mamba_state_size=64, max_position_embeddings=4096)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def save_model(folder: str) -> None:
    """A model of random weights, and a tokenizer of one word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = LogLinearForCausalLM(LogLinearConfig(**FIELDS))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(FIELDS["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def start(folder: str, kind: str) -> tuple[subprocess.Popen, str]:
    """A server on a free port, and its address, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    vllm = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    commands = {
        "vllm": [*vllm, "--model", folder, "--dtype", "float32", "--enforce-eager", "--port", port],
        "loglinear": [sys.executable, "-m", "loglinear", "serve", folder, "--device", "cpu", "--port", port],
    }
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = subprocess.Popen(commands[kind], env={**os.environ, **ENVIRONMENT}, **quiet)
    while True:
        if server.poll() is not None:
            raise RuntimeError(f"{kind} has ended with {server.returncode}")
        try:
            urlopen(f"http://127.0.0.1:{port}/health")
            return server, f"http://127.0.0.1:{port}/v1"
        except OSError:
            time.sleep(0.3)


def ask(address: str, model: str) -> float:
    """Tokens per second of all answers together."""
    client = openai.OpenAI(base_url=address, api_key="none", timeout=600)

    def answer(i: int) -> int:
        prompt = " ".join(f"w{(7 * i + 13 * t) % FIELDS['vocab_size']}" for t in range(PROMPT))
        text = client.completions.create(model=model, prompt=prompt, max_tokens=ANSWER, temperature=0).choices[0].text
        return len(text.split())

    began = time.perf_counter()
    with ThreadPoolExecutor(REQUESTS) as pool:
        counts = list(pool.map(answer, range(REQUESTS)))
    assert counts == [ANSWER] * REQUESTS, counts
    return sum(counts) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="file to write one row a server to, as JSON lines")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        servers = {kind: start(folder, kind) for kind in ("vllm", "loglinear")}
        try:
            rates = {kind: [] for kind in servers}
            for _ in range(ROUNDS + 1):
                for kind, (_, address) in servers.items():
                    rates[kind].append(ask(address, folder))
        finally:
            for server, _ in servers.values():
                server.terminate()
    rows = [
        {"server": kind, "requests": REQUESTS, "tokens_per_second": round(statistics.median(found[1:]), 1), **FIELDS}
        for kind, found in rates.items()  # the first round warms up
    ]
    print(*map(json.dumps, rows), sep="\n")
    print(f"vllm / loglinear: {rows[0]['tokens_per_second'] / rows[1]['tokens_per_second']:.1f}")
    if arguments.output:
        arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
