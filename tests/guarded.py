"""Memory of the kernels for tests: full of NaN, inside guard bands."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from loglinear.kernels.tree import launching

GUARD = 128  # elements on either side of every allocation


@contextmanager
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All memory that the kernels get is full of NaN, inside guard bands that must still be whole at the end."""
    buffers = []

    def memory(shape, dtype, device):
        size = torch.Size(shape).numel()
        nan = (
            float("nan") if dtype.is_floating_point else 255
        )  # all bits of a replayed call's scratch: NaN in every dtype
        buffer = torch.full((size + 2 * GUARD,), nan, dtype=dtype, device=device)
        buffer[:GUARD] = buffer[GUARD + size :] = 7
        buffers.append((buffer, size))
        return buffer[GUARD : GUARD + size].view(shape)

    monkeypatch.setattr(launching, "memory", memory)
    yield
    for buffer, size in buffers:
        assert (buffer[:GUARD] == 7).all(), "a kernel wrote before its tensor"
        assert (buffer[GUARD + size :] == 7).all(), "a kernel wrote after its tensor"
