"""``loglinear generate``: stream the continuation of a prompt, and print how many bytes hold the past.

The cache is static, so on CUDA ``generate`` decodes in a CUDA graph (``models/decoding.py``).
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from loglinear.cli.checkpoint import Checkpoint


CACHES = ("past_key_values", "cache", "cache_params")  # where generate returns the cache, by model and version


@dataclass(frozen=True)
class GenerateArgs:
    """Continue a prompt. The text goes to the standard output, size of the state and time per token to the standard error."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Folder of a run or of one of its checkpoints."""
    prompt: str | None = None
    """Text to continue."""
    prompt_file: Path | None = None
    """File with the text to continue, instead of --prompt; - reads the standard input."""
    max_new_tokens: int = 200
    """Tokens to generate at most; the end-of-text token ends a text earlier."""
    context: int | None = None
    """Tokens to have room for: at least the prompt and the new tokens together; None: exactly these."""
    temperature: float = 0.8
    """Below 1 prefers likely tokens; 0 takes the likeliest (greedy)."""
    top_p: float = 0.95
    """Sample among the likeliest tokens that hold this share of the probability."""
    seed: int = 0
    """Of the sampling."""

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompt_file is None):
            raise ValueError("prompt and prompt_file: give exactly one")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1: got {self.max_new_tokens}")
        if self.context is not None and self.context < 1:
            raise ValueError(f"context must be at least 1: got {self.context}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0: got {self.temperature}")


def generate(args: GenerateArgs) -> str:
    """Stream the continuation, print the size of the state and the time per token, and return prompt and continuation."""
    from loglinear.cli.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(args.checkpoint)
    prompt = _prompt(args)
    print(prompt, end="", flush=True)
    continuation, state = continue_text(checkpoint, prompt, args, stream=True)
    print(f"\n{state}", file=sys.stderr)
    return prompt + continuation


def continue_text(checkpoint: Checkpoint, prompt: str, args: GenerateArgs, stream: bool) -> tuple[str, str]:
    """The continuation of ``prompt``, and a line with the bytes of the state and the time per token."""
    from transformers import StaticCache, TextStreamer, set_seed

    from loglinear.models import LogLinearForCausalLM
    from loglinear.training.config import Contradiction

    tokenizer, model = checkpoint.tokenizer, checkpoint.model
    foreign = not isinstance(model, LogLinearForCausalLM)  # its tokenizer may begin a text with a token of its own
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=foreign, return_token_type_ids=False)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise ValueError("prompt: needs at least one token")
    needed = length + args.max_new_tokens
    if args.context is not None and args.context < needed:
        raise ValueError(f"context must be at least {needed}, prompt and new tokens together: got {args.context}")
    if args.context is not None and foreign:
        raise Contradiction(
            f"context must be left out: a model of type {model.config.model_type!r} makes room as it goes"
        )
    set_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    clock = Clock()
    room = {} if foreign else {"cache": StaticCache(config=model.config, max_cache_len=args.context or needed)}
    output = model.generate(  # type: ignore[operator]
        **inputs.to(model.device),
        **(sampling if args.temperature > 0 else {"do_sample": False}),
        max_new_tokens=args.max_new_tokens,
        **room,
        return_dict_in_generate=True,
        stopping_criteria=[clock],
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
    )
    sequence = output.sequences[0]
    text = str(tokenizer.decode(sequence[length:], skip_special_tokens=True))
    cache = room.get("cache") or next(output[name] for name in CACHES if output.get(name) is not None)
    return text, f"{describe_state(cache, len(sequence) - 1)}{clock.per_token()}"


class Clock:
    """A stopping criterion that never stops. It notes the time of each token, which ``generate`` has read by the next token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids, scores, **kwargs):
        import torch

        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def per_token(self) -> str:
        """Median time between two tokens; the first two come from the prompt and, on CUDA, from recording the graph."""
        gaps = sorted(b - a for a, b in zip(self.times[2:], self.times[3:]))
        return f"; {1000 * gaps[len(gaps) // 2]:.2f} ms per token" if gaps else ""


def describe_state(cache, tokens: int) -> str:
    """Bytes of the cache by kind, room for more included: recurrent and log-linear states, and the KV cache of attention."""
    sizes: dict[str, list[int]] = {"recurrent state": [], "KV cache": []}
    for layer in cache.layers:
        for name, size in layer_nbytes(layer).items():
            if size:
                sizes[name].append(size)
    parts = [f"{name} {sum(found):,} bytes in {len(found)} layers" for name, found in sizes.items() if found]
    longest = cache.get_max_length() if hasattr(cache, "get_max_length") else 0
    room = f", room for {longest:,}" if longest > 0 else ""
    return f"after {tokens:,} tokens{room}: {', '.join(parts)}"


def layer_nbytes(layer) -> dict[str, int]:
    """Bytes of a layer of a cache by kind: of ours, of a lifted mixer, or of transformers."""
    from loglinear.models.cache import KVCacheLayer, RecurrentCacheLayer
    from loglinear.models.lifted.cache import LiftedCacheLayer

    if isinstance(layer, RecurrentCacheLayer):
        return {"recurrent state": layer.nbytes}
    if isinstance(layer, KVCacheLayer):
        return {"KV cache": layer.nbytes}
    states = [layer.states] if isinstance(layer, LiftedCacheLayer) else []
    held = {
        name: _tensors_nbytes(vars(layer).get(name)) for name in ("keys", "values", "conv_states", "recurrent_states")
    }
    recurrent = sum(state.nbytes for state in states) + held["conv_states"] + held["recurrent_states"]
    return {"recurrent state": recurrent, "KV cache": held["keys"] + held["values"]}


def _tensors_nbytes(held) -> int:
    """Bytes of a tensor, or of the tensors in a dictionary or list; 0 for anything else."""
    if isinstance(held, dict):
        held = list(held.values())
    if isinstance(held, (list, tuple)):
        return sum(map(_tensors_nbytes, held))
    return getattr(held, "nbytes", 0)


def _prompt(args: GenerateArgs) -> str:
    from loglinear.tasks.lm.text_files import decode

    if args.prompt_file is None:
        return args.prompt or ""
    read = sys.stdin.buffer.read() if str(args.prompt_file) == "-" else args.prompt_file.read_bytes()
    return decode(read, f"prompt_file: {args.prompt_file}")
