"""Bad input raises ValueError or TypeError that names the argument, what came and what is needed."""

import dataclasses

import pytest
import torch
from calls import C, inputs, run

import loglinear

T = C + 6
X = {
    "scalar": inputs("scalar", T=T, dtype=torch.float32),
    "delta": inputs("delta", T=T, dtype=torch.float32),
    "linear": inputs("scalar", T=T, dtype=torch.float32, linear=True),
    "packed": inputs("scalar", B=1, T=T, dtype=torch.float32),
}
STATES = {kind: run(x)[1] for kind, x in X.items()}
STATE, LINEAR, DELTA = (STATES[kind] for kind in ("scalar", "linear", "delta"))
Q, K, V, G, LAMBDA, BETA = (X["delta"][name] for name in ("q", "k", "v", "g", "level_scales", "beta"))
PACKED = {"kind": "packed"}
EVERY = list(X["delta"].items())
OTHERS = EVERY[1:]  # all but q
F8 = STATE.entries.to(torch.float8_e4m3fn)
OPEN = ("open_k", "open_v", "open_g", "open_beta")
ROWS, FLOATING = "initial_state must have one row", "initial_state.entries must be a floating-point tensor"


def call(kind="scalar", **changed):
    op = loglinear.log_linear_delta_rule if kind == "delta" else loglinear.log_linear_attention
    return op(**{"level_scales": None, **X[kind], **changed})


def state(kind="scalar", **changed):
    """A state of the right kind with one tensor of another shape, dtype or device."""
    return going_on(dataclasses.replace(STATES[kind], **changed), kind)


def going_on(state, kind="scalar"):
    return {"kind": kind, "initial_state": state}


def bounds(*ends, **kwargs):
    return PACKED | {"cu_seqlens": torch.tensor(ends, **kwargs)}


VALUES = [
    ({"q": Q[0]}, "q must have shape [B, T, G, K]", "got [70, 2, 3]"),
    ({"k": K[..., 0]}, "k must have shape [B, T, G, K]", "got [2, 70, 2]"),
    ({"v": V[None]}, "v must have shape [B, T, H, V]", "got [1, 2, 70, 4, 5]"),
    ({"g": G[..., None]}, "g must have shape [B, T, H, K] = [2, 70, 4, 3]", "got [2, 70, 4, 1]"),
    ({"level_scales": LAMBDA[..., 0]}, "level_scales must have shape [B, T, H, L]", "got [2, 70, 4]"),
    ({"kind": "delta", "beta": BETA[..., 0]}, "beta must have shape [B, T, H]", "got [2, 70]"),
    ({"k": K[:1]}, "k must have shape", "[2, 70, 2, 3]", "got [1, 70, 2, 3]"),
    ({"k": K[..., :2]}, "k must have shape", "[2, 70, 2, 3]", "got [2, 70, 2, 2]"),
    ({"k": K[:, :, :1]}, "k must have shape", "[2, 70, 2, 3]", "got [2, 70, 1, 3]"),
    ({"v": V[:, 1:]}, "v must have shape", "[2, 70, ?, ?]", "got [2, 69, 4, 5]"),
    ({"v": V[:, :, :3]}, "v must have a multiple", "H=3", "G=2"),
    ({"v": V[:, :, :0]}, "v must have a multiple", "H=0", "G=2"),
    ({"q": Q[:, :, :0], "k": K[:, :, :0]}, "multiple of q's heads", "G=0"),
    ({"q": Q[..., :0], "k": K[..., :0]}, "q, k and v must have widths", "K=0"),
    ({"v": V[..., :0]}, "q, k and v must have widths", "V=0"),
    ({"level_scales": LAMBDA[..., :0]}, "level_scales must have at least one level", "L=0"),
    ({"g": G[..., :2]}, "g must have shape", "[2, 70, 4]", "got [2, 70, 2]"),
    ({"level_scales": LAMBDA[:, :, :2]}, "level_scales must have shape", "[2, 70, 4, ?]", "got [2, 70, 2, 9]"),
    ({"kind": "delta", "beta": BETA[:, :5]}, "beta must have shape", "[2, 70, 4]", "got [2, 5, 4]"),
    ({"g": -G}, "g must be a log decay, at most 0", "got a maximum of"),
    ({"g": torch.where(torch.arange(T)[:, None] == 9, 0.5, G)}, "g must be a log decay", "maximum of 0.5"),
    ({"scale": float("nan")}, "scale must be finite", "got nan"),
    ({"scale": float("inf")}, "scale must be finite", "got inf"),
    *(({"kind": "delta", x: y.to("meta")}, f"{x} must be on the device of q (cpu)", "got meta") for x, y in OTHERS),
    (bounds(0, T, device="meta"), "cu_seqlens must be on the device of q", "got meta"),
    ({"initial_state": STATE.to("meta")}, "initial_state must be on the device of q (cpu)", "got meta"),
    (state(entries=STATE.entries.to("meta")), "initial_state.entries must be on the device of q (cpu)", "got meta"),
    (bounds(0, 9, 5, T), "cu_seqlens must not decrease", "got [0, 9, 5, 70]"),
    (bounds(1, T), "cu_seqlens must run from 0 to T=70", "got 1 to 70"),
    (bounds(0, T - 1), "cu_seqlens must run from 0 to T=70", "got 0 to 69"),
    (bounds(0, T + 1), "cu_seqlens must run from 0 to T=70", "got 0 to 71"),
    (PACKED | {"cu_seqlens": torch.tensor([[0, T]])}, "cu_seqlens must have shape [n + 1]", "got [1, 2]"),
    (bounds(dtype=torch.int64), "cu_seqlens must have shape [n + 1]", "got [0]"),
    ({"cu_seqlens": torch.tensor([0, T])}, "q must have a batch of 1", "got B=2"),
    (PACKED | {"cu_seqlens_cpu": torch.tensor([0, T])}, "cu_seqlens_cpu needs cu_seqlens", "cu_seqlens=None"),
    (bounds(0, T) | {"cu_seqlens_cpu": torch.arange(3)}, "cu_seqlens_cpu must be a CPU copy of cu_seqlens", "got shape [3]"),
    (going_on(STATE.reorder(torch.tensor([0, 1, 1]))), f"{ROWS} per sequence (2)", "got 3"),
    (bounds(0, 9, T) | going_on(STATES["packed"], "packed"), f"{ROWS} per sequence (2)", "got 1"),
    (going_on(STATE, "delta"), "initial_state must come from the same op", "got a state of the scalar gate"),
    (going_on(DELTA), "initial_state must come from the same op", "got a state of the delta rule"),
    (state(position=STATE.position[:, None]), "initial_state.position must have shape [B]", "got [2, 1]"),
    (state(chunk_size=48), "initial_state.chunk_size must be a power of two", "got 48"),
    (state(chunk_size=2 * C), "initial_state.open_k must have shape [B, G, C, K] = [2, 2, 128, 3]", "got [2, 2, 64, 3]"),
    (state(entries=STATE.entries[..., :4]), "initial_state.entries must have shape [B, H, M, K, V]", "got [2, 4, 1, 3, 4]"),
    (state(entries=STATE.entries[:, :, :0], decay=STATE.decay[:, :, :0]), "initial_state.entries must have", "got"),
    (state("linear", state=LINEAR.state[:, :2]), "initial_state.state must have shape [B, H, K, V]", "got [2, 2, 3, 5]"),
    (state("delta", decay=DELTA.decay[:, :, :0]), "initial_state.decay must have shape", "got [2, "),
    *((state("delta", **{x: vars(DELTA)[x][:, :, :9]}), f"initial_state.{x} must have shape", "got [2, ") for x in OPEN),
]  # fmt: skip
TYPES = [
    ({"q": [1.0]}, "q must be a tensor [B, T, G, K]", "got list"),
    ({"v": None}, "v must be a tensor [B, T, H, V]", "got NoneType"),
    ({"g": -0.5}, "g must be a tensor [B, T, H]", "got float"),
    ({"kind": "delta", "beta": None}, "beta must be a tensor [B, T, H]", "got None"),
    ({"scale": torch.ones(())}, "scale must be a number or None", "got Tensor"),
    ({"scale": True}, "scale must be a number or None", "got bool"),
    ({"kind": "delta", "q": [1.0], "use_qk_l2norm_in_kernel": True}, "q must be a floating-point tensor", "got list"),
    *(({"kind": "delta", x: y.long()}, f"{x} must be a floating-point tensor", "got torch.int64") for x, y in EVERY),
    ({"v": V > 0}, "v must be a floating-point tensor", "got torch.bool"),
    ({"k": K.double()}, "k must have the dtype of q (torch.float32)", "torch.float64"),
    ({"v": V.half()}, "v must have the dtype of q (torch.float32)", "torch.float16"),
    (bounds(0.0, T), "cu_seqlens must be an int32 or int64", "got torch.float32"),
    (PACKED | {"cu_seqlens": [0, T]}, "cu_seqlens must be an int32 or int64", "got list"),
    ({"kind": "linear", "initial_state": STATE}, "initial_state must be a LinearState", "got LogLinearState"),
    ({"initial_state": LINEAR}, "initial_state must be a LogLinearState", "got LinearState"),
    ({"initial_state": STATE.entries}, "initial_state must be a LogLinearState", "got Tensor"),
    (state(position=STATE.position.int()), "initial_state.position must be int64", "got torch.int32"),
    (state(entries=F8), f"{FLOATING} (float64, float32, bfloat16, float16)", "got torch.float8_e4m3fn"),
    (state(entries=STATE.entries.long()), FLOATING, "got torch.int64"),
]


CASES = [(ValueError, *case) for case in VALUES] + [(TypeError, *case) for case in TYPES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[2]}, {case[-1]}")
def test_refused(case):
    error, changed, *words = case
    with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)) as raised:
        call(**changed)
    assert raised.type is error, raised.value
    for word in words:
        assert word in str(raised.value)


def test_the_table_starts_from_calls_that_work():
    for kind in X:
        call(kind)
        call(kind, initial_state=STATES[kind])
    call("packed", cu_seqlens=torch.tensor([0, 5, T]))
