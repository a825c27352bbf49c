"""Fine-tuning on needles: a short loop in one process, equal for all models with the same settings.

Every forward pass holds samples of one length, and all passes hold about the same number of tokens. Short samples therefore
come in larger batches. The loss covers the answers alone. The content of pass number n depends on the seed and on n, not on
the model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from loglinear.tasks.niah.config import TuneConfig
from loglinear.tasks.niah.data import Samples, training_batch
from loglinear.tasks.niah.evaluate import answer_logits
from loglinear.training.trainer import decay_parameter_names


def finetune(
    model: PreTrainedModel,
    samples: Samples,
    tune: TuneConfig,
    dtype: torch.dtype = torch.float32,
    on_log: Callable[[dict], None] | None = None,
) -> list[dict]:
    """Train ``model`` in place and return the log: step, mean loss and share of exact answers since the last entry.

    Under autocast if ``dtype`` is not float32. Raises ValueError if a sample does not fit into the shortest context.
    """
    device = next(model.parameters()).device
    training_batch(samples, TuneConfig(contexts=(min(tune.contexts),), batch_tokens=1), 0)  # too short fails now
    model.train()
    if tune.activation_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(_groups(model, tune.weight_decay), lr=tune.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, tune.steps))
    log: list[dict] = []
    sums = torch.zeros(2, device=device)  # loss and exact answers: read for the log only, so that the host runs ahead
    count, tokens, start = 0, 0, time.perf_counter()
    for step in range(1, tune.steps + 1):
        for part in range(tune.accumulate):
            batch = training_batch(samples, tune, (step - 1) * tune.accumulate + part)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits, targets = answer_logits(model, batch)
            # Answers of fewer tokens begin later; what stands before them is part of the question.
            first = torch.tensor([sample.answer_start for sample in batch], device=device) - len(batch[0].ids)
            columns = torch.arange(-targets.shape[1], 0, device=device)
            targets = targets.masked_fill(columns < first[:, None], -100)
            loss = cross_entropy(logits.transpose(1, 2), targets)
            (loss / tune.accumulate).backward()
            right = (logits.argmax(-1) == targets) | (targets == -100)
            sums += torch.stack([loss.detach(), right.all(1).sum()])
            count += len(batch)
            tokens += len(batch) * len(batch[0].ids)
        torch.nn.utils.clip_grad_norm_(model.parameters(), tune.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % tune.log_every == 0 or step == tune.steps:
            passes = (step - (log[-1]["step"] if log else 0)) * tune.accumulate
            losses, exact = sums.tolist()
            seconds = time.perf_counter() - start
            entry = {"step": step, "loss": losses / passes, "exact": exact / count}
            log.append(entry | {"tokens_per_second": round(tokens / seconds, 1)})
            count, tokens, start = 0, 0, time.perf_counter()
            sums.zero_()
            if on_log is not None:
                on_log(log[-1])
    if tune.activation_checkpointing:
        model.gradient_checkpointing_disable()
    model.eval()
    return log


def rate(step: int, steps: int) -> float:
    """The learning rate of step number ``step`` (from 0) over its peak: a linear rise over a tenth, a cosine to a tenth."""
    warmup = math.ceil(steps / 10)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2


def _groups(model: PreTrainedModel, weight_decay: float) -> list[dict]:
    decayed = set(decay_parameter_names(model))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in named if name in decayed], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in named if name not in decayed], "weight_decay": 0.0},
    ]
