"""FSDP2: parameters, gradients and the optimizer's state in shards, one on each process.

A sharded run differs from one process only in the place of its tensors. Shards are gathered and gradients are reduced in the
parameters' own dtype, autocast works inside as it does on one process, and a checkpoint holds whole tensors in the same files.
A run may therefore go on with more processes, with fewer, or with one and no FSDP at all. Blocks are sharded one by one and
gathered when the pass reaches them. Embeddings, the last norm and the output layer (one matrix if tied) form the root's own
shard and stay whole from the beginning of a forward pass to the end of its backward pass.

Accelerate's own FSDP2 is not used: it leaves sharding out on CPUs without a word,
and under bfloat16 it rounds every parameter, the decays' among them, where autocast keeps them in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from loglinear.training.trainer import LanguageModelTrainer


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard every block of ``model`` and the rest of it over ``mesh``, in place. Names and marks of parameters stay.

    Every process must hold the same values. Blocks that are to be compiled are compiled first, in place.
    """
    marked = [name for name, parameter in model.named_parameters() if getattr(parameter, "_no_weight_decay", False)]
    decoder: Any = model.base_model
    for block in decoder.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if mesh.device_type == "cpu":
        for module in (*decoder.layers, model):
            module.set_force_sum_reduction_for_comms(True)  # asked for a mean, PyTorch 2.8's gloo gives the sum
    for name in marked:
        model.get_parameter(name)._no_weight_decay = True  # type: ignore[attr-defined]


@torch.no_grad()
def whole(state: Any, keep: bool = True) -> Any:
    """``state``, a tree of dictionaries and lists, with every sharded tensor as a whole one on the CPU.

    Every process must call this, and in the same order. Processes that do not ``keep`` the result get empty tensors in it. One
    tensor in two places, a tied weight, is one tensor in the result too.
    """
    gathered: dict[int, Tensor] = {}

    def gather(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        if id(value) not in gathered:
            tensor = value.full_tensor()
            gathered[id(value)] = tensor.cpu() if keep else tensor.new_empty(0)
        return gathered[id(value)]

    return tree_map(gather, state)


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of a whole tensor, if ``parameter`` is sharded and ``value`` of its shape."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


class ShardedTrainer(LanguageModelTrainer):
    """Trains under FSDP2, over all processes of torchrun or accelerate launch, on GPUs (NCCL) as on CPUs (gloo)."""

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Shard the model, which holds its checkpoint's values by now, and create the optimizer of the shards."""
        model: Any = self.model
        if not isinstance(model, FSDPModule):
            shard(model, init_device_mesh(self.args.device.type, (self.args.world_size,)))
            # Autocast and nothing else. The Trainer prepares the model once more, and accelerate would take it for a whole one.
            self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
            self.accelerator.prepare_model = lambda model, **_: model  # type: ignore[method-assign]
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.register_state_dict_post_hook(self._whole_state)
        optimizer.register_load_state_dict_pre_hook(_sharded_state)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's: a folder for ``from_pretrained``, with whole tensors."""
        model: Any = self.model
        state = whole(model.state_dict(keep_vars=True), self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.optimizer is not None and not self.args.should_save:
            self.optimizer.state_dict()  # the first process alone writes, and gathers from all
        super()._save_optimizer_and_scheduler(output_dir)

    def _clip_grad_norm(self, model: torch.nn.Module) -> Tensor:
        norm = super()._clip_grad_norm(model)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm  # stays on its device: the host must not wait

    def _whole_state(self, optimizer: torch.optim.Optimizer, state: dict) -> dict:
        return whole(state, self.args.should_save)


def _sharded_state(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """An optimizer's state of whole tensors in shards like those of the parameters, which are counted over all groups."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shards = {
        index: {name: shard_like(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": shards}
