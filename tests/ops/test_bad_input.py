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


def call(kind="scalar", **changed):
    op = loglinear.log_linear_delta_rule if kind == "delta" else loglinear.log_linear_attention
    return op(**{"level_scales": None, **X[kind], **changed})


def state(kind="scalar", **changed):
    """A state of the right kind with one tensor of another shape, dtype or device."""
    return {"kind": kind, "initial_state": dataclasses.replace(STATES[kind], **changed)}


def bounds(*ends, **kwargs):
    return PACKED | {"cu_seqlens": torch.tensor(ends, **kwargs)}


VALUES = {
    # ranks
    "q of rank 3": ({"q": Q[0]}, "q must have shape [B, T, G, K]", "got [70, 2, 3]"),
    "k of rank 3": ({"k": K[..., 0]}, "k must have shape [B, T, G, K]", "got [2, 70, 2]"),
    "v of rank 5": ({"v": V[None]}, "v must have shape [B, T, H, V]", "got [1, 2, 70, 4, 5]"),
    "g of rank 4": ({"g": G[..., None]}, "g must have shape [B, T, H, K] = [2, 70, 4, 3]", "got [2, 70, 4, 1]"),
    "λ of rank 3": ({"level_scales": LAMBDA[..., 0]}, "level_scales must have shape [B, T, H, L]", "got [2, 70, 4]"),
    "beta of rank 2": ({"kind": "delta", "beta": BETA[..., 0]}, "beta must have shape [B, T, H]", "got [2, 70]"),
    # sizes
    "k of another batch": ({"k": K[:1]}, "k must have shape", "[2, 70, 2, 3]", "got [1, 70, 2, 3]"),
    "k of another width": ({"k": K[..., :2]}, "k must have shape", "[2, 70, 2, 3]", "got [2, 70, 2, 2]"),
    "k of other groups": ({"k": K[:, :, :1]}, "k must have shape", "[2, 70, 2, 3]", "got [2, 70, 1, 3]"),
    "v of another length": ({"v": V[:, 1:]}, "v must have shape", "[2, 70, ?, ?]", "got [2, 69, 4, 5]"),
    "H no multiple of G": ({"v": V[:, :, :3]}, "v must have a multiple", "H=3", "G=2"),
    "no heads": ({"v": V[:, :, :0]}, "v must have a multiple", "H=0", "G=2"),
    "no groups": ({"q": Q[:, :, :0], "k": K[:, :, :0]}, "multiple of q's heads", "G=0"),
    "K = 0": ({"q": Q[..., :0], "k": K[..., :0]}, "q, k and v must have widths", "K=0"),
    "V = 0": ({"v": V[..., :0]}, "q, k and v must have widths", "V=0"),
    "L = 0": ({"level_scales": LAMBDA[..., :0]}, "level_scales must have at least one level", "L=0"),
    "g of other heads": ({"g": G[..., :2]}, "g must have shape", "[2, 70, 4]", "got [2, 70, 2]"),
    "λ of other heads": (
        {"level_scales": LAMBDA[:, :, :2]},
        "level_scales must have shape",
        "[2, 70, 4, ?]",
        "got [2, 70, 2, 9]",
    ),
    "beta of another length": (
        {"kind": "delta", "beta": BETA[:, :5]},
        "beta must have shape",
        "[2, 70, 4]",
        "got [2, 5, 4]",
    ),
    # values
    "positive g": ({"g": -G}, "g must be a log decay, at most 0", "got a maximum of"),
    "one positive g": (
        {"g": torch.where(torch.arange(T)[:, None] == 9, 0.5, G)},
        "g must be a log decay",
        "maximum of 0.5",
    ),
    "scale nan": ({"scale": float("nan")}, "scale must be finite", "got nan"),
    "scale inf": ({"scale": float("inf")}, "scale must be finite", "got inf"),
    # devices
    **{
        f"{name} elsewhere": (
            {"kind": "delta", name: X["delta"][name].to("meta")},
            f"{name} must be on the device of q (cpu)",
            "got meta",
        )
        for name in X["delta"]
        if name != "q"
    },
    "bounds elsewhere": (bounds(0, T, device="meta"), "cu_seqlens must be on the device of q", "got meta"),
    "state elsewhere": (
        {"initial_state": STATE.to("meta")},
        "initial_state must be on the device of q (cpu)",
        "got meta",
    ),
    "entries elsewhere": (
        state(entries=STATE.entries.to("meta")),
        "initial_state.entries must be on the device of q (cpu)",
        "got meta",
    ),
    # cu_seqlens
    "falling bounds": (bounds(0, 9, 5, T), "cu_seqlens must not decrease", "got [0, 9, 5, 70]"),
    "bounds from 1": (bounds(1, T), "cu_seqlens must run from 0 to T=70", "got 1 to 70"),
    "bounds end early": (bounds(0, T - 1), "cu_seqlens must run from 0 to T=70", "got 0 to 69"),
    "bounds end late": (bounds(0, T + 1), "cu_seqlens must run from 0 to T=70", "got 0 to 71"),
    "bounds of rank 2": (
        PACKED | {"cu_seqlens": torch.tensor([[0, T]])},
        "cu_seqlens must have shape [n + 1]",
        "got [1, 2]",
    ),
    "no bounds at all": (bounds(dtype=torch.int64), "cu_seqlens must have shape [n + 1]", "got [0]"),
    "bounds of a batch": ({"cu_seqlens": torch.tensor([0, T])}, "q must have a batch of 1", "got B=2"),
    "CPU bounds alone": (
        PACKED | {"cu_seqlens_cpu": torch.tensor([0, T])},
        "cu_seqlens_cpu needs cu_seqlens",
        "cu_seqlens=None",
    ),
    "CPU bounds of another size": (
        bounds(0, T) | {"cu_seqlens_cpu": torch.tensor([0, 5, T])},
        "cu_seqlens_cpu must be a CPU copy of cu_seqlens",
        "got shape [3]",
    ),
    # states
    "a state of more rows": (
        {"initial_state": STATE.reorder(torch.tensor([0, 1, 1]))},
        "initial_state must have one row per sequence (2)",
        "got 3",
    ),
    "a state of fewer rows than sequences": (
        bounds(0, 9, T) | {"initial_state": STATES["packed"]},
        "initial_state must have one row per sequence (2)",
        "got 1",
    ),
    "a state of the other op": (
        {"kind": "delta", "initial_state": STATE},
        "initial_state must come from the same op",
        "got a state of the scalar gate",
    ),
    "a delta rule's state for the scalar gate": (
        {"initial_state": DELTA},
        "initial_state must come from the same op",
        "got a state of the delta rule",
    ),
    "a position for each head": (
        state(position=STATE.position[:, None]),
        "initial_state.position must have shape [B]",
        "got [2, 1]",
    ),
    "a chunk of 48 tokens": (state(chunk_size=48), "initial_state.chunk_size must be a power of two", "got 48"),
    "another chunk size": (
        state(chunk_size=2 * C),
        "initial_state.open_k must have shape [B, G, C, K] = [2, 2, 128, 3]",
        "got [2, 2, 64, 3]",
    ),
    "entries of another width": (
        state(entries=STATE.entries[..., :4]),
        "initial_state.entries must have shape [B, H, M, K, V]",
        "got [2, 4, 1, 3, 4]",
    ),
    "entries without their slots": (
        state(entries=STATE.entries[:, :, :0], decay=STATE.decay[:, :, :0]),
        "initial_state.entries must have",
        "got",
    ),
    "a linear state of other heads": (
        state("linear", state=LINEAR.state[:, :2]),
        "initial_state.state must have shape [B, H, K, V]",
        "got [2, 2, 3, 5]",
    ),
    **{
        f"{name} of another shape": (
            state("delta", **{name: getattr(DELTA, name)[:, :, : C // 2 if "open" in name else 0]}),
            f"initial_state.{name} must have shape",
            "got [2, ",
        )
        for name in ("decay", "open_k", "open_v", "open_g", "open_beta")
    },
}
TYPES = {
    # types
    "q a list": ({"q": [1.0]}, "q must be a tensor [B, T, G, K]", "got list"),
    "v None": ({"v": None}, "v must be a tensor [B, T, H, V]", "got NoneType"),
    "g a float": ({"g": -0.5}, "g must be a tensor [B, T, H]", "got float"),
    "beta None": ({"kind": "delta", "beta": None}, "beta must be a tensor [B, T, H]", "got None"),
    "scale a tensor": ({"scale": torch.ones(())}, "scale must be a number or None", "got Tensor"),
    "scale a bool": ({"scale": True}, "scale must be a number or None", "got bool"),
    "q a list, normalised": (
        {"kind": "delta", "q": [1.0], "use_qk_l2norm_in_kernel": True},
        "q must be a floating-point tensor",
        "got list",
    ),
    # dtypes
    **{
        f"integer {name}": (
            {"kind": "delta", name: X["delta"][name].long()},
            f"{name} must be a floating-point tensor",
            "got torch.int64",
        )
        for name in X["delta"]
    },
    "boolean v": ({"v": V > 0}, "v must be a floating-point tensor", "got torch.bool"),
    "k of another dtype": ({"k": K.double()}, "k must have the dtype of q (torch.float32)", "torch.float64"),
    "v of another dtype": ({"v": V.half()}, "v must have the dtype of q (torch.float32)", "torch.float16"),
    # cu_seqlens
    "float bounds": (bounds(0.0, T), "cu_seqlens must be an int32 or int64", "got torch.float32"),
    "a list of bounds": (PACKED | {"cu_seqlens": [0, T]}, "cu_seqlens must be an int32 or int64", "got list"),
    # states
    "a state with the tree off": (
        {"kind": "linear", "initial_state": STATE},
        "initial_state must be a LinearState",
        "got LogLinearState",
    ),
    "a linear state with the tree on": (
        {"initial_state": LINEAR},
        "initial_state must be a LogLinearState",
        "got LinearState",
    ),
    "a tensor as state": ({"initial_state": STATE.entries}, "initial_state must be a LogLinearState", "got Tensor"),
    "a position of 32 bits": (
        state(position=STATE.position.int()),
        "initial_state.position must be int64",
        "got torch.int32",
    ),
    "entries of 8 bits": (
        state(entries=STATE.entries.to(torch.float8_e4m3fn)),
        "initial_state.entries must be a floating-point tensor (float64, float32, bfloat16, float16)",
        "got torch.float8_e4m3fn",
    ),
    "integer entries": (
        state(entries=STATE.entries.long()),
        "initial_state.entries must be a floating-point tensor",
        "got torch.int64",
    ),
}


@pytest.mark.parametrize("name", [*VALUES, *TYPES])
def test_refused(name):
    changed, *words = (VALUES | TYPES)[name]
    with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)) as raised:
        call(**changed)
    assert raised.type is (ValueError if name in VALUES else TypeError), raised.value
    for word in words:
        assert word in str(raised.value)


def test_the_table_starts_from_calls_that_work():
    for kind in X:
        call(kind)
        call(kind, initial_state=STATES[kind])
    call("packed", cu_seqlens=torch.tensor([0, 5, T]))
