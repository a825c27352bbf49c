"""DECAYS: gates, their sums inside a chunk, and the decay between two tokens of a chunk. Logs are float32 in base 2.

A gate is clamped at ``GATE_FLOOR``, where exp has underflowed to zero in float32, so that a hard reset (-inf)
acts as one and every sum of logs stays finite: a difference of two sums is never inf - inf. Differences are taken only
inside a chunk. Float32 inputs keep the sums as a pair (value, rounding error), so that they stay exact to 2^-30 after
a reset too; 16-bit inputs keep the value alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

GATE_FLOOR = tl.constexpr(-128.0)  # exp(-128) < 2^-149, the smallest float32
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def at_most_zero(x):
    """``min(x, 0)``; NaN where x is NaN."""
    return tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def gates_of(x, origin, h, valid, S: tl.constexpr):
    """Log2-decays ``[C]`` of tokens from ``origin`` on, clamped, 0 without a gate; NaN for NaN and for an infinite growth."""
    if S.EXACT:
        gate = tl.zeros([S.C], tl.float64)
    else:
        gate = tl.zeros([S.C], tl.float32)
    if x.g is not None:
        first = x.g + origin * x.stride_g + h
        raw = tl.load(first + tl.arange(0, S.C) * x.stride_g, mask=valid, other=0.0).to(gate.dtype)
        gate += log2_of_gate(raw)
    return gate


@triton.jit
def log2_of_gate(raw):
    """Natural log-decays as clamped logs in base 2; NaN for NaN and for an infinite growth."""
    return tl.where(raw < float("inf"), tl.maximum(raw, GATE_FLOOR), float("nan")) * LOG2_E


@triton.jit
def gate_sums(gate):
    """Cumulative log2-decay of a chunk ``[C]``: (value, rounding error, decay to the end, total)."""
    sums = tl.cumsum(gate, axis=0)
    total = tl.sum(gate, axis=0)
    high = sums.to(tl.float32)
    low = (sums - high.to(sums.dtype)).to(tl.float32)
    to_end = tl.exp2(at_most_zero((total - sums).to(tl.float32)))
    return high, low, to_end, total.to(tl.float32)


@triton.jit
def strengths_of(x, here, h, t, past_the_end=0.0):
    """β of the tokens at places ``t [...]`` of a chunk, float32."""
    first = x.beta + here.origin * x.stride_beta + h
    return tl.load(first + t * x.stride_beta, mask=t < here.size, other=past_the_end).to(tl.float32)


@triton.jit
def load_sum(sums, offsets, valid, plane, S: tl.constexpr):
    """Cumulative log-decay at ``offsets``, zero where not valid: (value, its rounding error or 0). Zero for decayed tokens."""
    if S.CHANNELS:
        high = tl.zeros_like(offsets).to(tl.float32)
        low = high
    else:
        high = tl.load(sums + offsets, mask=valid, other=0.0)
        low = tl.load(sums + plane + offsets, mask=valid, other=0.0) if S.EXACT else 0.0
    return high, low


@triton.jit
def decay_between(late_high, late_low, early_high, early_low, S: tl.constexpr):
    """exp2 of the log-decay from an earlier to a later token of a chunk. Capped at 1, for rows that are masked later."""
    difference = late_high - early_high
    if S.EXACT:
        difference += late_low - early_low
    return tl.exp2(at_most_zero(difference))


@triton.jit
def to_end(sums, size, plane, S: tl.constexpr, present=True):
    """Decay ``[C]`` from each token of a chunk of ``size`` tokens to its end, from the sums of a chunk that is present."""
    t = tl.arange(0, S.C)
    if S.CHANNELS:
        decay = tl.full([S.C], 1.0, tl.float32)
    else:
        high, low = load_sum(sums, t, t < size, plane, S)
        last_high, last_low = load_sum(sums, tl.minimum(size, S.C) - 1, present, plane, S)
        decay = decay_between(last_high, last_low, high, low, S)
    return decay


@triton.jit
def pairs(high, low, S: tl.constexpr):
    """Decay ``[C, C]`` from a token (column) to a later one (row) of a chunk, from its sums; 1 above the diagonal."""
    if S.EXACT:
        late_low, early_low = low[:, None], low[None, :]
    else:
        late_low, early_low = 0.0, 0.0
    return decay_between(high[:, None], late_low, high[None, :], early_low, S)
