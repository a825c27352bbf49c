"""Projections are nn.Linear, whichever way their products are taken, and whatever stands in their place is called."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from loglinear.layers import LogLinearGatedDeltaNet, LogLinearMamba2, SoftmaxAttention, linear
from loglinear.layers.linear import aligned_product, project, projections


def test_the_padded_product_and_its_gradients_are_those_of_a_linear_layer():
    x, weight = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(21, 5, dtype=torch.float64)
    results = []
    for product in (aligned_product, F.linear):
        leaves = [y.clone().requires_grad_() for y in (x, weight)]
        out = product(*leaves)
        (out.square() * torch.arange(21)).sum().backward()
        results.append([out, *(y.grad for y in leaves)])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)
    assert results[0][0].stride(-2) == linear.MULTIPLE


def test_few_tokens_and_the_cpu_take_the_weight_as_it_is(monkeypatch):
    """A padded copy of the weight would double what a decoding step reads."""
    taken = []
    monkeypatch.setattr(
        linear, "aligned_product", lambda input, weight: taken.append(input.shape) or F.linear(input, weight)
    )
    layer = nn.Linear(3, 7, bias=False)
    many = torch.zeros(linear.FEW + 1, 3)
    project(many, layer)
    assert not taken
    cuda = type("OnCuda", (torch.Tensor,), {"is_cuda": True})
    project(many[:-1].as_subclass(cuda), layer)
    assert not taken
    project(many.as_subclass(cuda), layer)
    assert taken == [many.shape]


@pytest.fixture
def joined(monkeypatch):
    """Products are joined here too; the fixture counts them."""
    products = []
    monkeypatch.setattr(linear, "many", lambda input: True)
    monkeypatch.setattr(linear.F, "linear", lambda x, w, *b, f=F.linear: products.append(w.shape[0]) or f(x, w, *b))
    return products


def two_layers():
    torch.manual_seed(0)
    return [nn.Linear(5, width, bias=False).double() for width in (21, 7)], torch.randn(2, 3, 5, dtype=torch.float64)


def results(x, outputs, layers):
    loss = sum((out.square() * torch.arange(out.shape[-1])).sum() for out in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *(layer.weight for layer in layers)])]


def test_two_projections_are_one_product(joined):
    layers, x = two_layers()
    x.requires_grad_()
    got = results(x, projections(x, *layers), layers)
    assert joined == [64]
    for one, other in zip(got, results(x, [layer(x) for layer in layers], layers), strict=True):
        torch.testing.assert_close(one, other)
    assert got[1].storage_offset() % linear.START == 0


class Adapted(nn.Linear):
    """As adapters replace a layer: its weight is not all of it."""

    def forward(self, input):
        return super().forward(input) + 1


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("change", ["adapter", "bias", "hook", "patch", "dtype", "parametrization"])
def test_layers_that_do_more_than_their_weight_are_called(joined, change, number):
    layers, x = two_layers()
    if change == "adapter":
        adapted = Adapted(5, layers[number].out_features, bias=False).double()
        adapted.load_state_dict(layers[number].state_dict())
        layers[number] = adapted
    elif change == "bias":
        layers[number] = nn.Linear(5, layers[number].out_features).double()
    elif change == "hook":
        layers[number].register_forward_hook(lambda layer, inputs, output: output + 1)
    elif change == "patch":  # as accelerate puts its hooks before and behind a layer
        layers[number].forward = lambda input, forward=layers[number].forward: forward(input) + 1
    elif change == "dtype":
        layers[number].bfloat16()
        layers[number].register_forward_pre_hook(lambda layer, inputs: inputs[0].bfloat16())
    else:
        register_parametrization(layers[number], "weight", nn.Identity())
    want = [layer(x) for layer in layers]
    joined.clear()
    for got, other in zip(projections(x, *layers), want, strict=True):
        torch.testing.assert_close(got, other)
    assert len(joined) == 2
    torch.testing.assert_close(project(x, layers[number]), want[number])


def test_nothing_is_joined_without_gradients_or_on_the_cpu():
    layers, x = two_layers()
    cuda = x.repeat(100, 1, 1).as_subclass(type("OnCuda", (torch.Tensor,), {"is_cuda": True}))
    assert linear.joins(cuda, *layers)
    assert not linear.joins(cuda[:2], *layers)
    assert not linear.joins(x.repeat(100, 1, 1), *layers)
    with torch.no_grad():
        assert not linear.joins(cuda, *layers)


@pytest.mark.parametrize(
    ("kind", "sizes"), [(LogLinearMamba2, {}), (LogLinearGatedDeltaNet, {"key_dim": 8, "value_dim": 16})]
)
def test_mixers_compile_with_one_product(joined, kind, sizes):
    """Into one graph, to the numbers of the layers called one by one."""
    torch.manual_seed(0)
    mixer, hidden = kind(24, num_heads=2, num_levels=5, **sizes).double(), torch.randn(1, 70, 24, dtype=torch.float64)
    parameters = list(mixer.parameters())

    def run(function):
        out, _ = function(hidden)
        return [out, *torch.autograd.grad(out.square().sum(), parameters)]

    torch._dynamo.reset()
    got = run(torch.compile(mixer, backend="aot_eager", fullgraph=True))
    assert len(joined) == 2, "the input's and the output's"
    torch._dynamo.reset()
    linear.many = lambda input: False  # the fixture puts it back
    for one, other in zip(got, run(mixer), strict=True):
        torch.testing.assert_close(one, other)


SIZES = {"num_levels": 5, "num_heads": 2}
MIXERS = {
    "log_linear_mamba2": lambda: LogLinearMamba2(24, **SIZES),
    "mamba2": lambda: LogLinearMamba2(24, **SIZES, log_linear=False),
    "log_linear_gated_deltanet": lambda: LogLinearGatedDeltaNet(24, key_dim=8, value_dim=16, **SIZES),
    "gated_deltanet": lambda: LogLinearGatedDeltaNet(24, key_dim=8, value_dim=16, **SIZES, log_linear=False),
    "attention": lambda: SoftmaxAttention(24, num_heads=2, head_dim=12),
}
PROJECTIONS = {"log_linear_mamba2": 3, "mamba2": 2, "log_linear_gated_deltanet": 3, "gated_deltanet": 2, "attention": 4}


def names_of_projections(mixer):
    return [name for name, part in mixer.named_modules() if isinstance(part, nn.Linear)]


@pytest.mark.parametrize("name", MIXERS)
def test_projections_are_of_the_class_that_quantisers_replace(name):
    """``type(layer) is nn.Linear``: bitsandbytes takes no subclass. Every matrix is one of them, but the convolution's."""
    mixer = MIXERS[name]()
    names = names_of_projections(mixer)
    assert len(names) == PROJECTIONS[name]
    assert all(type(mixer.get_submodule(part)) is nn.Linear for part in names)
    matrices = {part.removesuffix(".weight") for part, x in mixer.named_parameters() if x.dim() > 1}
    assert matrices - set(names) <= {"conv", "level_scale.L"}


class StandIn(nn.Module):
    """As a quantised layer replaces a linear one: it has no weight of a matrix, and counts its calls."""

    def __init__(self, layer):
        super().__init__()
        self.calls, self.layer = 0, [layer]

    def forward(self, input):
        self.calls += 1
        return self.layer[0](input)


@pytest.mark.parametrize("tokens", ["few", "many"])
@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_what_replaces_a_projection_is_called(name, tokens, monkeypatch):
    """By whole calls, by calls that go on from a state, and by steps in place; as on the CPU or as with many on a GPU."""
    mixer, hidden = MIXERS[name]().double(), torch.randn(2, 80, 24, dtype=torch.float64)
    monkeypatch.setattr(linear, "many", lambda input: tokens == "many")

    def outputs():
        first, state = mixer(hidden[:, :70], output_state=True)
        more, after = mixer(hidden[:, 70:75], state=state, output_state=True)
        ready = after.for_decoding(100)
        steps = [mixer(hidden[:, t : t + 1], state=ready, output_state=True)[0] for t in range(75, 80)]
        return torch.cat([first, more, *steps], 1)

    want = outputs()
    stands = []
    for part in names_of_projections(mixer):
        stands.append(StandIn(mixer.get_submodule(part)))
        mixer.set_submodule(part, stands[-1])
    torch.testing.assert_close(outputs(), want)
    assert [stand.calls for stand in stands] == [7] * PROJECTIONS[name]
