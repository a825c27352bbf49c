"""The Trainer of transformers with our arguments: the choice of parameters that decay, and the content of a log line.

Between two logs nothing waits for the device. Batches are copied from pinned memory when their turn comes, so the host works
ahead. The Trainer's own work between the calls of the model costs no device time.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from loglinear.models import LogLinearForCausalLM
from loglinear.training.config import TrainConfig
from loglinear.training.progress import Meter


class LanguageModelTrainer(Trainer):
    """Weight decay on matrices only, the meter's readings in every training log, and evaluation without logits."""

    def __init__(self, *args, meter: Meter, **kwargs):
        super().__init__(*args, **kwargs)
        self.meter = meter
        self.add_callback(meter)
        self.add_callback(FollowArguments())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decay_parameter_names(model)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As the Trainer's. Where only the loss is asked for: the mean over this process's sequences, without logits."""
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self.without_fillers(inputs)
        if not isinstance(self.accelerator.unwrap_model(model), LogLinearForCausalLM):  # makes logits in any case
            return super().prediction_step(model, {**inputs, "use_cache": False}, True, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs, use_cache=False, skip_logits=True).loss
        return loss.detach(), None, None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's, which gives states to parameters by their order: those of another model would corrupt memory."""
        super()._load_optimizer_and_scheduler(checkpoint)
        optimizer: Any = self.optimizer
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if value.ndim and value.shape != parameter.shape:
                    raise ValueError(
                        f"{checkpoint}: {name} of its optimizer is of another model: needs shape {tuple(parameter.shape)}, "
                        f"got {tuple(value.shape)}"
                    )

    @property
    def share(self) -> tuple[int, int]:
        """Which of how many parts of the sequences this process has."""
        return self.args.process_index, self.args.world_size

    def last_rows(self) -> int | None:
        """Sequences of all processes in this batch, if it is the last one of an evaluation."""
        if not self.accelerator.gradient_state.end_of_dataloader:
            return None
        sequences: Any = self.eval_dataset
        whole = self.args.eval_batch_size * self.share[1]
        return len(sequences) % whole or whole

    def without_fillers(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch without sequences from the start of the data that fill up the last one where several processes evaluate.

        The Trainer weighs the mean of a batch by its rows, and drops fillers only after that. A process that has nothing but
        fillers keeps them: all must call the model, and what it gives is dropped.
        """
        (index, count), real = self.share, self.last_rows()
        if count == 1 or real is None:
            return inputs
        own = real - index * self.args.eval_batch_size
        return {name: value[:own] for name, value in inputs.items()} if own > 0 else inputs

    @cached_property
    def _operations_per_token(self) -> int:
        model: Any = self.model
        return 6 * model.num_parameters(exclude_embeddings=True)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The Trainer's estimate, without counting the parameters again for every batch."""
        return self._operations_per_token * inputs["input_ids"].numel()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self.meter.read(self.state.global_step)}
        super().log(logs, start_time)


class FollowArguments(TrainerCallback):
    """A checkpoint brings along the intervals and the learning rate of its time: those of today's arguments count."""

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs) -> None:
        state.compute_steps(args, state.max_steps)
        schedule: Any = lr_scheduler
        rates = [base * share(schedule.last_epoch) for base, share in zip(schedule.base_lrs, schedule.lr_lambdas)]
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
        schedule._last_lr = rates


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters with two axes or more that are not marked ``_no_weight_decay``."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and not getattr(parameter, "_no_weight_decay", False)
    ]


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The Trainer's arguments for a run. Creating them joins the process group of torchrun or accelerate launch."""
    optimizer = config.optimizer
    # Transformers renamed this during its version 5.
    known = {field.name for field in fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    options: dict[str, Any] = {
        checkpointing: config.activation_checkpointing,
        "max_steps": optimizer.steps,
        "per_device_train_batch_size": optimizer.batch_size,
        "per_device_eval_batch_size": optimizer.batch_size,
        "gradient_accumulation_steps": optimizer.accumulate,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": optimizer.final_rate},
        "warmup_steps": round(optimizer.warmup * optimizer.steps),
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.clip,
        "bf16": use_bfloat16(optimizer.precision),
        "seed": config.seed,
        "data_seed": config.seed if config.data_seed is None else config.data_seed,
        "logging_steps": config.log_every,
        "logging_nan_inf_filter": False,  # it would wait for the device at every step, to hide a loss that is NaN
        "save_steps": config.save_every,
        "eval_strategy": "steps" if config.data.has_validation else "no",
        "eval_steps": config.evaluate_every,
        "ddp_find_unused_parameters": False,
        "accelerator_config": {"non_blocking": torch.accelerator.is_available()},  # batches lie in pinned memory
        "prediction_loss_only": True,
        "disable_tqdm": True,
        "log_level": "error",  # its warnings concern a resumed model's tied weights and the like
        "report_to": "none",
        "use_cpu": not torch.accelerator.is_available(),
    }
    arguments = TrainingArguments(str(config.output), **options)
    if arguments.world_size == 1 and arguments.n_gpu > 1:
        # One process on many GPUs would be DataParallel: slow, and batches as many times larger than asked for.
        arguments._n_gpu = 1
    if arguments.device.type == "cpu":
        arguments._setup_devices = torch.device("cpu")  # transformers 5.17 cannot load an optimizer's state to "cpu:0"
    if config.fsdp and arguments.world_size < 2:
        raise ValueError(
            f"fsdp: needs two or more processes (torchrun or accelerate launch): got {arguments.world_size}; a run of "
            "several goes on in one without it"
        )
    return arguments


def use_bfloat16(precision: str) -> bool:
    """Whether to compute under bfloat16 autocast."""
    if precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return precision == "bfloat16"
