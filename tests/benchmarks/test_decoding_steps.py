"""benchmarks/decoding.py on the CPU: every transition has a state for its step, and the bytes that a step must read."""

import dataclasses

import pytest
import torch

import decoding
from loglinear.state import CHUNK_SIZE

H, G, K, V = 2, 1, 8, 4


@pytest.mark.parametrize("name", decoding.RULES)
def test_a_step_takes_the_inputs_and_the_state(name, monkeypatch):
    empty = decoding.DecodingState.empty
    monkeypatch.setattr(
        decoding.DecodingState, "empty", lambda *sizes, **more: empty(*sizes, **more | {"device": "cpu"})
    )
    monkeypatch.setattr(decoding, "positions", lambda kind, batch, context: torch.full((batch,), context - 2))
    rule, context = (
        decoding.RULES[name],
        5 * CHUNK_SIZE + 12,
    )  # five closed chunks, entries 4 and 1, and ten open tokens
    shape = dataclasses.replace(rule.shape, B=2, H=H, G=G, K=K, V=V, dtype=torch.float32)
    x = rule.inputs(shape, "cpu") | {"level_scales": torch.rand(2, 1, H, 22)}
    state = decoding.random_state(x, shape, context, "full", torch.float32)
    o = rule.step.func(**x, state=state, advance=False, backend="torch")
    assert o.shape == (2, 1, H, V)
    assert o.isfinite().all()
    token = G * K + H * V  # k and v; a row of the inverse, and the gates of all channels
    token += (H * CHUNK_SIZE if "delta" in name else 0) + (H * K if "channel" in name else 0)
    assert decoding.live_bytes(state, state.position) == 2 * 4 * (2 * H * K * V + 10 * token)
