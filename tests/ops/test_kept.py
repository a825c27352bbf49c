"""What a forward pass keeps is handed to its backward, and nothing is kept where no gradient will be asked for."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from loglinear.kernels.decay.span import choice
from loglinear.ops import attention as op
from loglinear.ops import dispatch
from loglinear.ops.inputs import Call, Inputs
from loglinear.transition import DELTA_RULE

# The layout by its name: sizes of what is kept of 70 chunks of one sequence in bfloat16, of 20 of three packed ones, of a
# float32 sequence, and of 20 chunks with a gate per channel. A new layout gets a new KEPT, and its sizes stand here.
LAYOUTS = {
    "kept as of 2026-12-01": [
        "4x1x4480 70x4 70x4x64x64 70x4x64x128 70x4x64x128 9x4x64x128 2x4x64x128 36x4x64x128 8x4x64x128 4x4x64x128",
        "4x1x1280 23x4 23x4x64x64 23x4x64x128 23x4x64x128 5x4x64x128 20x4x64x128 12x4x64x128",
        "4x2x4480 140x4 140x4x32x32 140x4x32x128 140x4x64x128 18x4x64x128 3x4x64x128 72x4x64x128 12x4x64x128 4x4x64x128",
        "4x0x1280 20x4x64 20x4x64x64 20x4x64x128 20x4x64x128 3x4x64x128 12x4x64x128 4x4x64x128 "
        "1280x4x1x64 1280x4x64 1280x4x64 20x4x64x64 1280x4x64 20x4x64x64",
    ]
}


def test_another_layout_has_another_name():
    """Graphs on disk know the sizes of what is kept by ``KEPT`` alone. Logs are float32, maps have the dtype of v."""
    kernels = op.kernels_of(DELTA_RULE)
    found = []
    low = torch.bfloat16
    for T, dtype, sequences, channels in (
        (4480, low, 0, 0),
        (1280, low, 3, 0),
        (4480, torch.float32, 0, 0),
        (1280, low, 0, 1),
    ):
        q, scales = (torch.empty(1, T, 4, width, device="meta", dtype=dtype) for width in (64, 16))
        bounds = torch.empty(sequences + 1, device="meta", dtype=torch.int32) if sequences else None
        kept = kernels.kept_shapes(q, q, scales, bounds, channels=bool(channels))
        others = [kind for _, kind in kept[2:]]
        assert others == [torch.float32 if channels and i in (6, 11) else dtype for i in range(len(others))]
        found.append(" ".join("x".join(map(str, shape)) for shape, _ in kept))
    assert found == LAYOUTS[op.KEPT], "kept_shapes changed: raise KEPT in ops/attention.py, and its layout here"


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize(
    ("gate", "beta", "K"),
    [(3, 0, 128), (3, 3, 64), (4, 3, 64), (4, 0, 64)],
    ids=["scalar", "delta", "channels", "channels alone"],
)
def test_sizes_may_be_symbolic(monkeypatch, gate, beta, K, packed):
    """On a Hopper GPU, for the compiler: the sizes of all results are what they are where they are numbers."""
    monkeypatch.setattr(choice, "why_not_here", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    B, T, H, G = 1 if packed else 2, 600, 4, 4 if beta else 1
    shapes = (B, T, G, K), (B, T, G, K), (B, T, H, 64), (B, T, H, K)[:gate], (B, T, H)[:beta], (B, T, H, 11)
    inputs = [torch.zeros(x, dtype=torch.bfloat16) if x else None for x in shapes]
    inputs.append(torch.tensor([0, 500, T]) if packed else None)

    def sizes(mode, symbolic):
        def on_gpu(x):
            every = StatelessSymbolicContext([DimDynamic.DYNAMIC] * x.dim()) if symbolic else None
            x = mode.from_tensor(x, symbolic_context=every)
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0")

        with mode:
            given = [None if x is None else on_gpu(x) for x in inputs]
            results = torch.ops.loglinear.attention(*given, None, 1.0, 0, op.KEPT, "triton")
        return [(tuple(map(int, x.shape)), x.dtype) for x in results]

    wanted = sizes(FakeTensorMode(), symbolic=False)
    assert len(wanted) > 1 or (gate == 4 and (packed or not beta))  # too much memory for maps; nothing to keep
    assert sizes(FakeTensorMode(shape_env=ShapeEnv()), symbolic=True) == wanted


@pytest.fixture
def calls(monkeypatch):
    """Kernels that return sums and say how they were called."""
    seen = []

    def forward(q, k, v, g, *rest, keep=False):
        seen.append("keeping" if keep else "forward")
        return (v * 1, q + 1, k + 2) if keep else (v * 1,)

    def kept_shapes(q, v, level_scales, cu_seqlens, channels):
        return [(q.shape, q.dtype)] * 2

    def backward(do, *inputs, kept=(), **continued):
        seen.append([x.clone() for x in kept])
        return [None if x is None else do.sum() * torch.ones_like(x) for x in inputs[: 6 if len(inputs) == 8 else 5]]

    module = SimpleNamespace(forward=forward, kept_shapes=kept_shapes, backward=backward)
    monkeypatch.setattr(op, "kernels_of", lambda transition: module)
    return seen


def inputs(delta: bool, grad: bool = True) -> list:
    def normal(*size):
        return torch.randn(1, 3, *size, requires_grad=grad)

    return [normal(1, 4), normal(1, 4), normal(2, 4), normal(2), normal(2) if delta else None, normal(2, 5), 1.0, None]


def attend(*x):
    return op.attend(Call(Inputs(*x[:6]), x[6], cu_seqlens=x[7]))[0]


@pytest.fixture(params=["eager", "compiled"])
def run(request, monkeypatch, compiled):
    """The op as eager code calls it, and as compiled code does, in one graph."""
    monkeypatch.setattr(dispatch, "attention", lambda inputs, backend: True)
    return attend if request.param == "eager" else compiled(attend, backend="aot_eager")


@pytest.mark.parametrize("delta", [False, True])
def test_kept_tensors_reach_the_backward(calls, run, delta):
    x = inputs(delta)
    run(*x).sum().backward()
    assert calls[0] == "keeping"
    assert torch.equal(calls[1][0], x[0] + 1)
    assert torch.equal(calls[1][1], x[1] + 2)
    assert all(y is None or y.grad.shape == y.shape for y in x[:6])


def test_a_graph_that_is_retained_keeps_them(calls, run):
    x = inputs(delta=True)
    o = run(*x).sum()
    first, second = (torch.autograd.grad(o, x[:6], retain_graph=True) for _ in range(2))
    assert len(calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(calls[1], calls[2]))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_they_are_gone_after_the_backward(calls, run, monkeypatch):
    module, made = op.kernels_of(DELTA_RULE), []
    keeping = module.forward

    def forward(*x, **options):
        results = keeping(*x, **options)
        made.extend(weakref.ref(y) for y in results[1:])
        return results

    monkeypatch.setattr(module, "forward", forward)
    o = run(*inputs(delta=True)).sum()
    o.backward()
    gc.collect()
    assert [y() for y in made] == [None, None]


@pytest.mark.parametrize("what", ["no_grad", "no input needs one", "gate per channel"])
def test_without_a_gradient_nothing_is_kept(calls, run, what):
    x = inputs(delta=what != "gate per channel", grad=what != "no input needs one")
    if what == "gate per channel":
        x[3] = torch.randn(1, 3, 2, 4, requires_grad=True)
    if what == "no_grad":
        with torch.no_grad():
            run(*x)
    else:
        o = run(*x)
        if what == "gate per channel":
            o.sum().backward()
            assert calls.pop() == []
    assert calls == ["forward"]


def test_a_graph_says_which_code_laid_out_what_it_keeps(calls, compiled, monkeypatch):
    """PyTorch files compiled graphs on disk by their text; an earlier version's would ask for tensors that are not there."""
    monkeypatch.setattr(dispatch, "attention", lambda inputs, backend: True)
    seen = []

    def backend(graph, _):
        seen.append(graph.code)
        return graph.forward

    compiled(attend, backend=backend)(*inputs(delta=True))
    (code,) = seen
    assert repr(op.KEPT) in code
