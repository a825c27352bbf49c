"""Context parallelism in training: N consecutive processes share every sequence, and count as one process for the data.

A process reads whole sequences and keeps its span of them. The targets are already shifted, so the process before predicts the
first token of a span. All processes count targets together, so losses and gradients equal those of one process for every N: a
gradient that crosses to another span contains that span's share of the mean.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments, default_data_collator

from loglinear.distributed import context_span
from loglinear.state import CHUNK_SIZE
from loglinear.training.config import TrainConfig
from loglinear.training.trainer import LanguageModelTrainer


def join_context_group(config: TrainConfig, arguments: TrainingArguments) -> dist.ProcessGroup | None:
    """The processes that share a sequence with this one, in the order of their spans; None where there are no others.

    Every process must call this. Raises ValueError naming the argument that does not fit.
    """
    count, processes = config.context_parallel, arguments.world_size
    if count == 1:
        return None
    if processes % count:
        raise ValueError(
            f"context_parallel: needs a number of processes divisible by {count} (torchrun): got {processes}"
        )
    if config.data.context % (count * CHUNK_SIZE):
        raise ValueError(
            f"context: must be a multiple of {count * CHUNK_SIZE}, context_parallel={count} spans of whole chunks of "
            f"{CHUNK_SIZE} tokens: got {config.data.context}"
        )
    return dist.new_subgroups(count)[0]


def span_batch(sequences: list[dict[str, Tensor]], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """This process's span of some sequences: ``input_ids``, and as ``labels`` and ``shift_labels`` the token after each."""
    whole = default_data_collator(sequences)
    own = context_span(whole["input_ids"].shape[1], group)
    targets = F.pad(whole["labels"][:, 1:], (0, 1), value=-100)[:, own].contiguous()
    return {"input_ids": whole["input_ids"][:, own].contiguous(), "labels": targets, "shift_labels": targets}


class ContextTrainer(LanguageModelTrainer):
    """Trains on spans. ``context_group``: what ``join_context_group`` returned, and the model's mixers were given."""

    def __init__(self, *args, context_group: dist.ProcessGroup, **kwargs):
        kwargs["data_collator"] = lambda sequences: span_batch(sequences, context_group)
        super().__init__(*args, **kwargs)
        self.context_group = context_group

    def get_train_dataloader(self) -> DataLoader:
        return self._share(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        return self._share(super().get_eval_dataloader(eval_dataset))

    def _share(self, loader: DataLoader) -> DataLoader:
        """The same batches for all processes of a group: accelerate has dealt them out to every process."""
        dealt: Any = loader.batch_sampler
        assert isinstance(dealt, BatchSamplerShard), type(dealt)
        dealt.num_processes //= self.context_group.size()
        dealt.process_index //= self.context_group.size()
        if dealt.num_processes == 1:
            dealt.even_batches = False  # the last batch of an epoch stays as small as it is in one process
        return loader

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, Tensor | int | None]:
        """The batches of a step, and the number of their targets on all processes (versions of the Trainer count others)."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        count = sum((batch["labels"].ne(-100).sum() for batch in batches), torch.tensor(0)).to(self.args.device)
        dist.all_reduce(count)
        return batches, count

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The mean loss of whole sequences, on every process of the group."""
        inputs = self._prepare_inputs(self.without_fillers(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs, num_items_in_batch=1, use_cache=False, skip_logits=True).loss
        total = torch.stack([loss.double(), inputs["labels"].ne(-100).sum().double()])
        dist.all_reduce(total, group=self.context_group)
        return (total[0] / total[1]).to(loss.dtype), None, None

    def evaluation_loop(self, *args, **kwargs):
        self.gather_function = self._one_of_each_group
        return super().evaluation_loop(*args, **kwargs)

    def _one_of_each_group(self, losses: Tensor) -> Tensor:
        """``gather_for_metrics`` of one process of each group: a loss for every sequence, none of the last batch's fillers."""
        every = self.accelerator.gather(losses).view(-1, self.context_group.size(), len(losses))[:, 0].flatten()
        return every[: self.last_rows()]

    @property
    def share(self) -> tuple[int, int]:
        size = self.context_group.size()
        return self.args.process_index // size, self.args.world_size // size
