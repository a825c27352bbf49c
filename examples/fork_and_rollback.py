"""Decoding that forks and goes back: one prompt with several answers, a snapshot, and tokens that are taken back.

    python examples/fork_and_rollback.py

The model is small and untrained: the example is about the cache. Every result is compared with the same text read from its
beginning.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from loglinear import LogLinearConfig, LogLinearForCausalLM
from loglinear.models import cache_nbytes, restore_cache, snapshot_cache


def small_model() -> LogLinearForCausalLM:
    torch.manual_seed(0)
    config = LogLinearConfig(
        mixer="log_linear_mamba2",
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        max_position_embeddings=1024,
    )
    return LogLinearForCausalLM(config).eval()


def difference(logits: Tensor, model: LogLinearForCausalLM, text: Tensor) -> float:
    """Largest difference between the last logits of each row and the logits of ``text`` read from its beginning."""
    return (logits[:, -1] - model(text, use_cache=False).logits[:, -1]).abs().max().item()


@torch.no_grad()
def fork(model: LogLinearForCausalLM, prompt: Tensor, answers: Tensor) -> float:
    """Read the prompt once, copy its state for each of the ``answers [n, tokens]``, and continue all copies together."""
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    before = cache_nbytes(cache)
    cache.reorder_cache(torch.zeros(len(answers), dtype=torch.long))  # row 0, once for each answer
    logits = model(answers, past_key_values=cache).logits
    print(f"fork: {len(answers)} answers, state of {before:,} bytes -> {cache_nbytes(cache):,} bytes")
    return difference(logits, model, torch.cat([prompt.expand(len(answers), -1), answers], dim=1))


@torch.no_grad()
def return_to_snapshot(model: LogLinearForCausalLM, prompt: Tensor, answers: Tensor) -> float:
    """Try one answer after the other from the same point, however long each one is. The buffers stay where they are."""
    cache = StaticCache(config=model.config, max_cache_len=1024)
    model(prompt, past_key_values=cache)
    after_prompt, worst = snapshot_cache(cache), 0.0
    for answer in answers.split(1):
        restore_cache(cache, after_prompt)
        logits = model(answer, past_key_values=cache).logits
        worst = max(worst, difference(logits, model, torch.cat([prompt, answer], dim=1)))
    print(f"snapshot: {len(answers)} answers in turn from token {prompt.shape[1]}")
    return worst


@torch.no_grad()
def roll_back(model: LogLinearForCausalLM, prompt: Tensor, draft: Tensor, accepted: int) -> float:
    """Read a draft, keep its first ``accepted`` tokens and take back the rest, as speculative decoding does."""
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    cache.activate_past_recording()  # from here on the cache can take tokens back, 256 at most
    model(draft, past_key_values=cache)
    cache.crop(accepted - draft.shape[1])  # a negative number: so many tokens are taken back
    token = torch.tensor([[7]])
    logits = model(token, past_key_values=cache).logits
    print(f"rollback: {draft.shape[1] - accepted} of {draft.shape[1]} tokens taken back, {cache.get_seq_length()} left")
    return difference(logits, model, torch.cat([prompt, draft[:, :accepted], token], dim=1))


def main() -> dict[str, float]:
    """Run the three parts and print. Returns the largest difference of each."""
    model = small_model()
    prompt = torch.randint(0, 256, (1, 300))
    answers = torch.randint(0, 256, (3, 20))
    differences = {
        "fork": fork(model, prompt, answers),
        "snapshot": return_to_snapshot(model, prompt, answers),
        "rollback": roll_back(model, prompt, draft=torch.randint(0, 256, (1, 100)), accepted=37),
    }
    for name, value in differences.items():
        print(f"{name}: logits differ by {value:.0e} from the text read at once")
    return differences


if __name__ == "__main__":
    main()
