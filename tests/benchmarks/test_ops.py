"""benchmarks/ops.py on the CPU: every transition is checked before it is timed, and its rows and peers have their names."""

import dataclasses
import sys

import pytest
import torch

import ops
from peers import Shape
from verify import Failure, verify

TINY = Shape(1, 70, 2, 1, 8, 8, torch.float32)


@pytest.fixture
def parsed(monkeypatch):
    def parse(*words):
        monkeypatch.setattr(sys, "argv", ["ops.py", *words])
        return ops.arguments()

    return parse


def here(rule):
    """The op of a rule where there is no GPU."""
    return lambda **x: rule.op(**x, backend="torch")


@pytest.mark.parametrize("name", ops.RULES)
def test_the_check_compares_every_result(name):
    rule = ops.RULES[name]
    line = verify(here(rule), rule.inputs, TINY, device="cpu")
    names = ["o", "dq", "dk", "dv", "dg", *(["dbeta"] if "delta" in name else []), "dlevel_scales"]
    assert [part.split()[0] for part in line.partition(" errors ")[2].split(", ")] == names
    with pytest.raises(Failure, match="relative errors o 1"):
        verify(lambda **x: (2 * here(rule)(**x)[0], None), rule.inputs, TINY, device="cpu")


def test_rows_of_an_op(monkeypatch):
    monkeypatch.setattr(ops, "milliseconds", lambda call, budget: (call() is None, 1.0, 3.0))
    monkeypatch.setattr(ops, "captured", lambda call: call)
    monkeypatch.setattr(ops, "peak_bytes", lambda call: 5)
    rule = dataclasses.replace(ops.RULES["delta_rule"], op=here(ops.RULES["delta_rule"]))
    rows = ops.measure_ours(ops.ours(rule, TINY, "cpu"), 10, each_kernel=False)
    whats = ["forward", "forward+backward", "forward+backward, captured"]
    assert [(row["name"], row["what"], row["peak_bytes"]) for row in rows] == [
        ("loglinear", what, peak) for what, peak in zip(whats, (5, 5, None))
    ]
    T, H, levels = 70, 2, 8
    numbers = T * (8 + 8 + H * 8 + H * 8 + 2 * H + H * levels)  # q, k, v, o, g and beta, λ
    assert rows[1]["inputs_bytes"] == 4 * numbers

    def broken(shape):
        raise RuntimeError("refuses")

    (failed,) = ops.measure_peer("fla gla", broken, TINY, 10)
    assert (failed["what"], failed["reason"]) == ("failed", "RuntimeError: refuses")


def test_rows_of_several_calls(monkeypatch):
    """Calls that lose the past between them are found before they are timed."""
    monkeypatch.setattr(ops, "milliseconds", lambda call, budget: (call() is None, 1.0, 3.0))
    monkeypatch.setattr(ops, "peak_bytes", lambda call: 5)
    op = here(ops.RULES["delta_rule"])
    rule = dataclasses.replace(ops.RULES["delta_rule"], op=op)
    rows = ops.measure_calls(rule, TINY, 10, [1, 4], "cpu")
    assert [row["what"] for row in rows] == ["forward, states, 1 call", "forward, states, 4 calls"]
    forgetful = dataclasses.replace(rule, op=lambda initial_state=None, **x: op(**x))
    with pytest.raises(Failure, match="of 4 calls"):
        ops.measure_calls(forgetful, TINY, 10, [1, 4], "cpu")


def test_shapes_and_peers_of_a_transition(parsed):
    args = parsed("scalar_gate", "--T", "4096")
    assert ops.shape_of(args) == Shape(2, 4096, 48, 1, 128, 64)
    assert list(ops.peers_of(args)) == [
        *(
            "fla log_linear_attn",
            "fla simple_gla",
            "mamba2 ssd chunk 64",
            "mamba2 ssd chunk 128",
            "mamba2 ssd chunk 256",
        ),
        *("flash attention 2, 16x96", "cudnn attention, 16x96"),
    ]
    args = parsed("delta_rule", "--B", "1", "--H", "8", "--peers", "fla 0.2.2,flash", "--old-fla", "there")
    assert ops.shape_of(args) == Shape(1, 16384, 8, 8, 128, 128)
    found = ops.peers_of(args)
    assert list(found) == ["fla 0.2.2 gated_delta_rule", "flash attention 2, 16x128"]
    assert found["fla 0.2.2 gated_delta_rule"].keywords == {"folder": "there"}
    assert list(ops.peers_of(parsed("channel_delta_rule", "--peers", "kda"))) == ["fla kda"]
    with pytest.raises(SystemExit):
        parsed("channel_gate", "--sweep")
