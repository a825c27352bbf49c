"""The configurations of kernels: their chunks are parts of a state's chunk, whatever the dtype and the widths."""

from itertools import product

import pytest
import torch

from loglinear.kernels.tree.problem import kernel_chunks
from loglinear.kernels.tuning import delta_rule_config, scalar_gate_config
from loglinear.state import CHUNK_SIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_chunk_is_a_part_of_a_states_chunk(dtype):
    for K, V in product((8, 64, 128, 256), (16, 64, 128, 1024)):
        for config in (
            scalar_gate_config(dtype, K, V),
            scalar_gate_config(dtype, K, V, 1 << 16),
            delta_rule_config(dtype, K, V),
        ):
            assert kernel_chunks(config.chunk) * config.chunk == CHUNK_SIZE
