"""The kernels around the attention op as operators of compiled mixers: the numbers of eager calls, one graph, no copies."""

from __future__ import annotations

import pytest
import torch
from cases import BFLOAT16, FLOAT32, INTERPRETED, relative
from functorch.compile import make_boxed_func
from test_pointwise import T, gate_inputs, mixer_results, mixers, norm_inputs, normal, part
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from loglinear.layers import linear
from loglinear.ops import pointwise

OPERATORS = {
    name: (name, f"{name}_backward")
    for name in ("discretise", "gates", "channel_gates", "sigmoid_gates", "level_scales", "gated_norm", "unit_length")
}
OWN = {
    "mamba2": {"discretise", "level_scales", "gated_norm"},
    "gated_deltanet": {"gates", "unit_length", "level_scales", "gated_norm"},
}
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at inputs


@pytest.fixture(autouse=True)
def compiled_code_calls_all(monkeypatch, compiled):
    monkeypatch.setattr(linear, "many", lambda input: False)  # a whole mixer is test_mixing.py's
    if INTERPRETED:
        monkeypatch.setattr(pointwise, "on_device", lambda x: True)


class Graphs:
    """A compiler that leaves every graph as it is, and notes the kernels and the copies in it."""

    def __init__(self) -> None:
        self.kernels: list[str] = []
        self.copies = 0

    def note(self, graph, inputs):
        called = (node.target for node in graph.graph.nodes if node.op == "call_function")
        targets = [str(target).split(".") for target in called if isinstance(target, torch._ops.OpOverload)]
        known = {name for names in OPERATORS.values() for name in names}
        self.kernels += [name for library, name, *_ in targets if library == "loglinear" and name in known]
        self.copies += sum(target[:2] == ["aten", "clone"] for target in targets)
        return make_boxed_func(graph)

    def compile(self, function, **options):
        backend = aot_autograd(fw_compiler=self.note, bw_compiler=self.note)
        return torch.compile(function, fullgraph=True, backend=backend, **options)


def agree(got, want, low=False):
    """In the interpreter what surrounds the kernels is the same code; in 16 bits two parts of x's gradient are
    rounded, not one.
    """
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        assert relative(x, y) <= (2**-9 if low else 0) + (0 if INTERPRETED else 1e-2 if low else FLOAT32)


@pytest.mark.parametrize(("name", "kind"), [("mamba2", "autocast"), ("gated_deltanet", "packed")])
def test_compiled_mixers(device, name, kind):
    mixer, low = mixers()[name].to(device), kind == "autocast"
    hidden = normal(device, *((2, T) if low else (1, 2 * T)), 24)
    cu_seqlens = None if low else torch.tensor([0, 1, 1, 8, 2 * T], device=device, dtype=torch.int32)
    rest = normal(device, *hidden.shape, seed=1), low, cu_seqlens
    graphs = Graphs()
    agree(mixer_results(graphs.compile(mixer), hidden, *rest), mixer_results(mixer, hidden, *rest), low)
    assert sorted(graphs.kernels) == sorted(x for kernel in OWN[name] for x in OPERATORS[kernel])
    assert graphs.copies == 0


class Checkpointed(nn.Module):
    """A mixer whose backward runs its forward again."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, hidden, cu_seqlens):
        return checkpoint(self.mixer, hidden, cu_seqlens=cu_seqlens, use_reentrant=False)


def test_checkpointing(device):
    name, graphs = "mamba2", Graphs()
    mixer, (hidden, gradient) = mixers()[name].to(device), normal(device, 2, 2, T, 24)
    got = mixer_results(graphs.compile(Checkpointed(mixer)), hidden, gradient, False, None)
    agree(got, mixer_results(mixer, hidden, gradient, False, None))
    for kernel in OWN[name]:
        assert [graphs.kernels.count(x) for x in OPERATORS[kernel]] == [2, 1]


def test_one_graph_for_every_length(device):
    """Of what has more than one result and keeps some of its inputs."""
    graphs = Graphs()

    def run(x, *others):
        v, g, x = pointwise.discretise(x, *others)
        return v * g.unsqueeze(-1) + x, *pointwise.units(v, x), pointwise.takes_heads(v, x)

    function = graphs.compile(run, dynamic=True)
    for i, length in enumerate((T, 2 * T)):
        inputs = {"x": normal(device, 2, length, 2, 6), "rate": normal(device, 2, length, 2)}
        inputs = [x.requires_grad_() for x in [*inputs.values(), *normal(device, 2, 2, seed=1)]]
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            *got, taken = function(*inputs)
        *want, _ = run(*inputs)
        gradients = [torch.autograd.grad(sum(y.square().sum() for y in out), inputs) for out in (got, want)]
        agree([*got, *gradients[0]], [*want, *gradients[1]])
        assert taken


@pytest.mark.parametrize("name", ["mamba2", "gated_deltanet"])
def test_no_gradients(device, name):
    mixer, graphs, hidden = mixers()[name].to(device), Graphs(), normal(device, 1, T, 24)
    with torch.no_grad():
        (out, _), (want, _) = graphs.compile(mixer)(hidden), mixer(hidden)
    assert relative(out, want) <= FLOAT32
    assert sorted(graphs.kernels) == sorted(OPERATORS[kernel][0] for kernel in OWN[name])


def low(x):
    return part(x.to(BFLOAT16))


def operator_inputs(device):
    """Of every operator, and gradients of its results: parts of projections, and parameters in float32."""
    x, rate, _, skipped, q, k = (normal(device, 2, T, 2, 6, seed=i) for i in range(6))
    gates, norm = gate_inputs(device, 2), norm_inputs(device, None, 12, 4)
    g = normal(device, 2, T, 2)
    parameters = gates["dt_bias"], gates["A_log"]
    mamba, delta = (gates["rate"], *parameters, low(x)), (low(gates["rate"]), *parameters, low(g))
    scales = low(normal(device, 2, T, 10)), normal(device, 2, 5), 0.5
    plain = norm["x"], norm["gate"], norm["weight"], None, None, 1e-3, False, True
    skip = low(norm["x"]), norm["gate"], norm["weight"], low(norm["skip"]), norm["skip_scale"], 1e-3, True, False
    channels = low(normal(device, 2, T, 12)), normal(device, 12), gates["A_log"], low(g)
    return {
        "discretise": [((g, low(skipped)), mamba)],
        "gates": [((g, g), delta)],
        "channel_gates": [((x, g), (*channels, bound)) for bound in (None, -5.0)],
        "sigmoid_gates": [((x,), (channels[0], 2, -1.0, 16.0))],
        "level_scales": [((normal(device, 2, T, 2, 5).to(BFLOAT16),), scales)],
        "gated_norm": [((norm["x"],), plain), ((low(norm["x"]),), skip)],
        "unit_length": [((low(rate), low(x)), (low(q), low(k)))],
    }


def test_operators_are_what_they_say(device):
    """Schemas without aliases or mutation, and sizes, strides and dtypes of the fake results."""
    for name, calls in operator_inputs(device).items():
        for gradients, inputs in calls:
            for operator, given in zip(OPERATORS[name], (inputs, (*gradients, *inputs)), strict=True):
                operator = getattr(torch.ops.loglinear, operator).default
                torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))
