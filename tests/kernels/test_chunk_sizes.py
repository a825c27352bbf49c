"""The configurations of kernels: their chunks are parts of a state's chunk, whatever the dtype and the widths."""

from itertools import product

import pytest
import torch

from loglinear.kernels.tree.problem import kernel_chunks, packed_tables
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


@pytest.mark.parametrize("chunk", [48, 2 * CHUNK_SIZE])
def test_another_chunk_cannot_go_on_from_a_state(chunk):
    """Its tokens would be counted from elsewhere: the error was 30%."""
    bounds, before = torch.tensor([0, 300]), torch.tensor([1])
    assert packed_tables(bounds, 300, CHUNK_SIZE // 2, tree=False, first_chunks=before)[1][0, 4] == 2
    with pytest.raises(ValueError, match=rf"config.chunk must divide a state's chunk of 64 tokens .* got {chunk}"):
        packed_tables(bounds, 300, chunk, tree=False, first_chunks=before)
