"""A token that is not finite changes no bit before it, none of its neighbours, and is not forgotten after it."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import BFLOAT16, INTERPRETED, RULES, forward

import oracle
from loglinear import log_linear_attention, log_linear_delta_rule
from loglinear.kernels.pointwise import convolution

pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow) encountered:RuntimeWarning"
)  # of the interpreter
C = 16 if INTERPRETED else 64
HEAD = 1  # of two, on one q/k head
ARGUMENTS = (("scalar gate", "k"), ("scalar gate", "v"), ("scalar gate", "g"),
             ("delta rule", "k"), ("delta rule", "v"), ("delta rule", "g"), ("delta rule", "beta"),
             ("channel gate", "k"), ("channel gate", "v"), ("channel gate", "g"), ("channel gate", "q"))  # fmt: skip
IN_STEPS = ("scalar gate", "delta rule")
# The first, a middle and the last token of a chunk; the second chunk; the chunk that stays open. The middle one has them all.
POSITIONS = (5, C - 1, C + 2) if INTERPRETED else (0, 5, C - 1, C, 2 * C + 1)
BAD = (torch.inf,) if INTERPRETED else (torch.nan, torch.inf, -torch.inf)


def some(*faults):
    """All of them on a GPU, the first two in the interpreter."""
    return faults[:2] if INTERPRETED else faults


def make(rule, device, T, dtype=torch.float32, linear=False, **sizes):
    x = cases.make(device, RULES[rule], T=T, H=2, dtype=dtype, **sizes)
    return x | {"level_scales": x["v"].new_ones(()).expand(*x["v"].shape[:3], 1)} if linear else x


def spoilt(x, name, value, s):
    """x with one bad number in row 0; only a bad q or k belongs to both heads."""
    return oracle.spoilt(x, name, value, s, 0 if name in "qk" else HEAD, 3)


def compare(x, clean, name, value, s, end=None, cu_seqlens=None, run=lambda x, bounds: forward(x, cu_seqlens=bounds)):
    """``end``: of the token's sequence; no other token sees a bad q, and a row's first gate has no state to spoil."""
    end = s + 1 if name == "q" else end
    o = run(spoilt(x, name, value, s), cu_seqlens)
    told = (name, value, s)
    assert torch.equal(o[:, :s], clean[:, :s]), told
    assert torch.equal(o[1:], clean[1:]), told
    if end is not None:
        assert torch.equal(o[:, end:], clean[:, end:]), told
    if name not in "qk":
        assert torch.equal(o[:, :, 0], clean[:, :, 0]), told
    columns = slice(3, 4) if name == "v" else slice(None)
    spoilt_from = 1 if name == "g" and s == 0 else s
    assert not o[0, spoilt_from:end, HEAD, columns].isfinite().any(), told


@pytest.mark.parametrize(("rule", "name"), ARGUMENTS)
def test_nothing_before_or_beside_a_bad_token_changes(device, rule, name):
    x = make(rule, device, max(POSITIONS) + 4)
    clean = forward(x)
    for s in POSITIONS:
        for value in BAD[: 2 if name == "g" else 3] if s == 5 else (torch.nan,):  # of a gate -inf is a reset
            compare(x, clean, name, value, s)


@pytest.mark.parametrize(("rule", "name"), [ARGUMENTS[i] for i in (1, 3)] if INTERPRETED else ARGUMENTS)
def test_in_16_bits_and_beside_another_row_of_the_linear_models(device, rule, name):
    x = make(rule, device, C + 5, B=2, dtype=BFLOAT16, linear=True)
    clean = forward(x)
    for s, value in ((C - 3, torch.nan), (C + 1, torch.inf)):
        compare(x, clean, name, value, s)


@pytest.mark.parametrize("rule", RULES)
def test_groups_after_it_are_not_finite(device, rule):
    """More than a group of chunks: the tree hands on what its entries hold."""
    x = make(rule, device, 8 * C + 1 if INTERPRETED else 9 * C + 1)
    clean = forward(x)
    faults = ("k", 3 * C + 2), ("g", 2 * C), ("v", 7 * C + 9)
    for name, s in faults if not INTERPRETED else faults[:1] if "delta" in rule else faults[1:2]:
        compare(x, clean, name, torch.nan, s)


@pytest.mark.parametrize("rule", RULES)
def test_packed_sequences_do_not_notice(device, rule):
    bounds = [0, C + 3, C + 3, 3 * C]
    offsets = torch.tensor(bounds, device=device)
    x = make(rule, device, bounds[-1])
    clean = forward(x, cu_seqlens=offsets)
    for name, s in some(("k", C + 2), ("v", C + 3), ("v", C + 2), ("g", 2), ("g", 2 * C + 3)):
        end = next(bound for bound in bounds if bound > s)
        compare(x, clean, name, torch.nan, s, end, offsets)


@pytest.mark.parametrize("rule", RULES)
def test_widths_of_several_tiles(device, rule):
    sizes = {"K": 40, "V": 72} if INTERPRETED else {"K": 128 if rule == "channel gate" else 256, "V": 384}
    x = make(rule, device, C + 7, **sizes)
    clean = forward(x)
    for name in ("k", "v"):
        for column in (x[name].shape[3] - 1,) if INTERPRETED else (0, x[name].shape[3] - 1):
            bad = {n: tensor.clone() for n, tensor in x.items()}
            bad[name][0, 9, 0, column] = torch.inf
            o = forward(bad)
            assert torch.equal(o[:, :9], clean[:, :9]), (name, column)
            assert not o[0, 9:, 0, column if name == "v" else slice(None)].isfinite().any(), (name, column)


@pytest.mark.parametrize("rule", IN_STEPS)
@pytest.mark.parametrize("linear", [False, True])
def test_calls_that_go_on_from_a_state(on_the_kernels, device, rule, linear):
    op = log_linear_delta_rule if rule == "delta rule" else log_linear_attention
    lengths = (66, 10) if INTERPRETED else (70, 80)
    x = make(rule, device, sum(lengths))
    x |= {"level_scales": None} if linear else {}

    def run(x, _):
        state, outputs, start = None, [], 0
        for size in lengths:
            part = {n: None if y is None else y[:, start : start + size] for n, y in x.items()}
            o, state = op(**part, initial_state=state, output_final_state=True)
            outputs.append(o)
            start += size
        return torch.cat(outputs, 1)

    clean = run(x, None)
    for name, s in some(("k", 20), ("v", 66), ("g", 75), ("v", 140)):
        compare(x, clean, name, torch.nan, s, run=run)


def test_a_convolution_spoils_its_window_and_no_more(device):
    x, weight = torch.randn(2, 30, 70, device=device), torch.randn(70, 4, device=device)
    clean = convolution.forward(x, weight, None, None)
    for s in (0, 7, 29):
        bad = x.clone()
        bad[0, s, 5] = torch.nan
        wrong = convolution.forward(bad, weight, None, None) != clean  # NaN differs from all
        reached = torch.zeros_like(wrong)
        reached[0, s : s + 4, 5] = True
        assert torch.equal(wrong, reached), s
