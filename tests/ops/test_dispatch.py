"""Which implementation takes a call: where a GPU runs plain PyTorch it says why, once, or raises if kernels were asked for."""

import dataclasses
import warnings
from types import SimpleNamespace

import pytest
import torch
from calls import C, inputs, output, run, tokens

import loglinear
from loglinear import DecodingState, LogLinearState, kernels
from loglinear.kernels import devices
from loglinear.kernels.tuning import scalar_gate_config
from loglinear.ops import convolution, cross_entropy, dispatch
from loglinear.ops.inputs import Inputs

KB = 1 << 10
GPUS = {"T4": 64 * KB, "V100": 96 * KB, "RTX 3090": 99 * KB, "RTX 4090": 99 * KB, "A100": 163 * KB, "H100": 227 * KB}


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """``gpu(name)``: a GPU with that one's shared memory; an H100 at first. Nothing has been said yet."""

    def choose(name):
        monkeypatch.setattr(devices, "shared_memory", lambda device: GPUS[name])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)

    monkeypatch.setattr(kernels, "installed", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    dispatch.said.clear()
    choose("H100")
    yield choose
    dispatch.said.clear()


def on_gpu(*shape, dtype=torch.bfloat16):
    """What a ``has_kernel`` looks at of a tensor on a GPU."""
    device = torch.device("cuda", 0)
    return SimpleNamespace(shape=shape, dtype=dtype, device=device, is_cuda=True, dim=lambda: len(shape))


def heads(K=64, V=64, T=100, **kind):
    return on_gpu(2, T, 4, K, **kind), on_gpu(2, T, 4, V, **kind)


def op(q, v, beta=None, backend="auto"):
    return dispatch.attention(Inputs(q, q, v, None, beta, None), backend)


def from_state(q, v, chunk_size, backend="auto"):
    held = LogLinearState(*[torch.zeros(1)] * 6, chunk_size=chunk_size)
    return dispatch.from_state(Inputs(q, q, v, None, None, v), held, backend)


BETA = object()
REASONS = {
    "float64": (lambda: op(*heads(dtype=torch.float64)), "log_linear_attention", "float64 inputs"),
    "float64, delta": (lambda: op(*heads(dtype=torch.float64), BETA), "log_linear_delta_rule", "float64 inputs"),
    "wide keys": (lambda: op(*heads(K=300)), "log_linear_attention", "heads of K=300 and V=64, where kernels take K up to 256"),
    "wide values": (lambda: op(*heads(V=2048)), "log_linear_attention", "V=2048, where kernels take K up to 256 and V up to 1"),
    "other chunks": (
        lambda: from_state(*heads(), 16),
        "a call with an initial_state",
        "a state of chunks of 16 tokens, where kernels go on from chunks of 64",
    ),
    "step, float64": (lambda: dispatch.step(*heads(dtype=torch.float64)), "a decoding step", "float64 inputs"),
    "step, wide keys": (lambda: dispatch.step(*heads(K=257)), "a decoding step", "heads of K=257"),
    "step, short chunks": (lambda: dispatch.step(*heads(), 8), "a decoding step", "a state of chunks of 8 tokens"),
    "step, long chunks": (lambda: dispatch.step(*heads(), 128), "a decoding step", "a state of chunks of 128 tokens"),
    "taps": (lambda: convolution.has_kernel(on_gpu(2, 9, 8), on_gpu(8, 9)), "the short convolution", "9 taps, where"),
    "loss": (lambda: cross_entropy.has_kernel(on_gpu(9, 8, dtype=torch.float64)), "linear_cross_entropy", "float64 inputs"),
}  # fmt: skip


@pytest.mark.parametrize("case", REASONS)
def test_a_fallback_is_said_once(case):
    ask, what, reason = REASONS[case]
    said = f"^{what} runs in plain PyTorch on the GPU, not in a kernel: .*{reason}"
    with pytest.warns(UserWarning, match=said) as found:
        assert not ask()
    assert len(found) == 1
    assert not ask()  # a second warning would be an error


ASKED = {
    "on the CPU": (
        lambda backend: op(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), backend=backend),
        "'triton' for log_linear_attention here: tensors on cpu, where kernels need CUDA",
    ),
    "float64": (lambda backend: op(*heads(dtype=torch.float64), backend=backend), "here: float64 inputs"),
    "wide keys": (lambda backend: op(*heads(K=300), BETA, backend=backend), "log_linear_delta_rule here: heads of K=300"),
    "other chunks": (lambda backend: from_state(*heads(T=1), 16, backend), "initial_state here: a state of chunks of 16"),
    "step": (lambda backend: dispatch.step(*heads(), 8, backend), "a decoding step here: a state of chunks of 8 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", ASKED)
def test_kernels_that_were_asked_for_or_an_error_that_says_why(case):
    ask, reason = ASKED[case]
    with pytest.raises(ValueError, match=f"^backend must not be .*{reason}"):
        ask("triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not ask("torch")


def test_backends_of_calls_that_kernels_take():
    given = [lambda backend: op(*heads(), BETA, backend), lambda backend: from_state(*heads(), C, backend)]
    for ask in (*given, lambda backend: dispatch.step(*heads(), 64, backend)):
        assert [ask(backend) for backend in ("auto", "triton", "torch")] == [True, True, False]
    assert [from_state(*heads(T=1), C, backend) for backend in ("auto", "triton")] == [False, True]


@pytest.mark.parametrize("rule", ["scalar", "delta"])
def test_backends_of_the_public_ops(rule):
    """On the CPU: plain PyTorch with or without being asked for, and the kernels are an error, in compiled code too."""
    x = inputs(rule, T=9)
    assert torch.equal(output(x, backend="torch"), output(x))
    steps = {"scalar": loglinear.log_linear_attention_step, "delta": loglinear.log_linear_delta_rule_step}
    held = DecodingState.empty(2, 4, 2, 3, 5, 100, torch.float64, delta_rule=rule == "delta")
    calls = [lambda **given: output(x, **given), lambda **given: run(x, **given)]
    calls.append(lambda **given: steps[rule](**tokens(x, 0, 1), state=held, **given))
    calls.append(torch.compile(lambda **given: output(x, **given), backend="eager"))
    for call in calls:
        with pytest.raises(Exception, match=r"backend must not be 'triton' .*: tensors on cpu, where kernels need"):
            call(backend="triton")
    with pytest.raises(ValueError, match=r"backend must be one of \['auto', 'triton', 'torch'\]: got 'cuda'"):
        output(x, backend="cuda")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(kernels, "installed", lambda: False)
    with pytest.warns(UserWarning, match="log_linear_attention runs in plain PyTorch .*: Triton is not installed"):
        assert not op(*heads())
    with pytest.warns(UserWarning, match="a decoding step runs in plain PyTorch .*: Triton is not installed"):
        assert not dispatch.step(*heads())


# (delta rule, K) that run on kernels; the others say what they need.
MOST = ((False, 64), (False, 256), (True, 64), (True, 128))
ALL = (*MOST, (True, 256))
RUN = {"T4": (), "V100": (), "RTX 3090": MOST, "RTX 4090": MOST, "A100": ALL, "H100": ALL}


@pytest.mark.parametrize("name", GPUS)
def test_which_gpus_run_what(name, gpu):
    """The table of docs/kernels.md."""
    gpu(name)
    if not RUN[name]:
        with pytest.warns(UserWarning, match=f"a decoding step .*: {name} has"):
            assert not dispatch.step(*heads())
    for delta, K in RUN["H100"]:
        given = (*heads(K=K), *([BETA] if delta else []))
        if (delta, K) in RUN[name]:
            assert op(*given)
            continue
        needed = 160 if delta and K > 128 else 99
        dispatch.said.clear()
        with pytest.warns(UserWarning, match=f"{name} has {GPUS[name] // KB} KB of shared memory, .* need {needed} KB"):
            assert not op(*given)


def test_what_runs_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op(*heads())
        assert op(*heads(), BETA)
        assert dispatch.step(*heads())
        assert from_state(*heads(), C)
        assert convolution.has_kernel(on_gpu(2, 9, 8), on_gpu(8, 4))
        assert not from_state(*heads(T=1), 16)  # a few tokens: no kernel is worth it
        assert not op(torch.zeros(1, 2, 3, 300), torch.zeros(1, 2, 3, 300))  # on the CPU


def test_less_memory_changes_no_number():
    """The same chunks and tiles, hence the same sums: a pipeline's depth is all that differs."""
    small, ample = (scalar_gate_config(torch.bfloat16, 128, 128, GPUS[name]) for name in ("RTX 3090", "H100"))
    one, other = map(dataclasses.asdict, (small, ample))
    fields = [field for field in one if one[field] != other[field]]
    assert "value" in fields
    for field in fields:
        one, other = getattr(small, field), getattr(ample, field)
        assert (one.block_v, one.block_k, one.warps) == (other.block_v, other.block_k, other.warps)
        assert one.stages < other.stages or field == "output"
