"""The kernels around the attention op against the plain forms in float64: results and every gradient, and whole mixers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import BFLOAT16, FLOAT32, INTERPRETED, LOW_PRECISION_FACTOR, relative
from torch._subclasses import FakeTensorMode

from loglinear.kernels.pointwise import channel_gates, gated_norm, gates, level_scales, steps
from loglinear.layers import GatedRMSNorm, LogLinearGatedDeltaNet, LogLinearGLA, LogLinearKDA, LogLinearMamba2, linear
from loglinear.layers.level_scale import OFFSETS
from loglinear.ops import attention, dispatch, pointwise

T = 13 if INTERPRETED else 1500


@pytest.fixture(autouse=True)
def on_the_kernels(monkeypatch):
    """Small programs, several of them with several tiles each; the number of calls of each kernel's host function."""
    monkeypatch.setattr(gated_norm, "PROGRAMS", 3)
    monkeypatch.setattr(gated_norm, "PARTS_PROGRAMS", 3)
    monkeypatch.setattr(gated_norm, "PROGRAMS_FORWARD", 2)
    monkeypatch.setattr(level_scales, "PROGRAMS", 2)
    monkeypatch.setattr(linear, "many", lambda input: False)  # a whole mixer is test_mixing.py's
    if INTERPRETED:
        monkeypatch.setattr(gated_norm, "NUMBERS", 256)
        for module, tokens in ((gates, 8), (channel_gates, 8), (level_scales, 4)):
            monkeypatch.setattr(module, "TOKENS", tokens)
            monkeypatch.setattr(module, "COLUMNS", 16)
        monkeypatch.setattr(gates, "VALUE_TOKENS", 8)
        monkeypatch.setattr(pointwise, "on_device", lambda x: True)


def normal(device, *size, seed=0):
    return torch.randn(*size, generator=torch.Generator("cpu").manual_seed(seed)).to(device)


def part(x, extra=3):
    """x as a part of a wider projection, as in the mixers: rows do not touch each other, and NaN is between them."""
    flat = x.flatten(2)
    return F.pad(flat, (extra, 2 * extra), value=float("nan"))[..., extra : extra + flat.shape[2]].view(x.shape)


def column(x):
    """x as a column of a wider matrix: parameters need not be contiguous either."""
    return torch.stack([torch.full_like(x, float("nan")), x], -1)[..., 1]


def results(function, inputs, seed=7):
    """What the function gives, and the gradients of all inputs, for random gradients of each result."""
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    given = [y for y in function(**inputs) if y is not None]
    wanted = [normal("cpu", *y.shape, seed=seed + i).to(y) for i, y in enumerate(given)]
    return [*given, *torch.autograd.grad(given, list(inputs.values()), wanted)]


def compare(kernel, plain, inputs, low=()):
    """Against float64; inputs of 16 bits, named in ``low``, make the bar twice the error of the plain form."""
    wide = {name: x.double() for name, x in inputs.items()}
    got, want, usual = results(kernel, inputs), results(plain, wide), results(plain, inputs)
    for number, (x, y, z) in enumerate(zip(got, want, usual, strict=True)):
        assert x.shape == y.shape
        assert x.dtype == z.dtype
        assert x.isfinite().all()
        bar = LOW_PRECISION_FACTOR * relative(z, y) + 1e-6 if low else FLOAT32 / 10
        assert relative(x, y) <= bar, f"result {number}: {relative(x, y):.2e} > {bar:.2e}"


def lower(inputs, names):
    return {name: part(x.to(BFLOAT16)) if name in names else x for name, x in inputs.items()}


def plain_norm(gate_first, activation="silu"):
    def norm(x, gate, weight, skip=None, skip_scale=None):
        module = GatedRMSNorm(weight.shape[0], 1e-3, gate_first, activation=activation)
        del module.weight
        module.weight = weight
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pointwise, "has_kernels", lambda *tensors: False)
            return [module(x, gate, skip, skip_scale)]

    return norm


def norm_inputs(device, heads, width, parts=None):
    shape = (2, T, width) if heads is None else (2, T, heads, width)
    inputs = {name: part(normal(device, *shape, seed=i)) for i, name in enumerate(("x", "gate"))}
    inputs["weight"] = column(normal(device, width, seed=3))
    if parts is not None:
        inputs |= {"skip": part(normal(device, *shape, seed=4)), "skip_scale": column(normal(device, parts, seed=5))}
    return inputs


def kernel_norm(gate_first, activation="silu"):
    return lambda x, gate, weight, skip=None, skip_scale=None: [
        pointwise.gated_norm(x, gate, weight, 1e-3, gate_first, skip, skip_scale, activation == "silu")
    ]


@pytest.mark.parametrize(
    ("gate_first", "heads", "width", "parts", "low", "activation"),
    [
        (True, None, 30, 5, False, "silu"),
        (False, 3, 7, None, False, "silu"),
        (True, None, 128, 2, True, "silu"),
        (False, 2, 40, None, True, "sigmoid"),
        (True, 3, 7, None, False, "sigmoid"),
    ],
)
def test_gated_norm(device, gate_first, heads, width, parts, low, activation):
    inputs = norm_inputs(device, heads, width, parts)
    names = ("x", "gate", "skip") if low else ()
    compare(kernel_norm(gate_first, activation), plain_norm(gate_first, activation), lower(inputs, names), names)


def test_wide_rows_are_three_parts(device, monkeypatch):
    monkeypatch.setattr(gated_norm, "NUMBERS", 16)
    compare(kernel_norm(True), plain_norm(True), norm_inputs(device, None, 40, 5))


@pytest.mark.parametrize(("width", "low"), [(24, False), (40, True)])
def test_norm(device, width, low):
    def plain(x, weight):
        return [F.rms_norm(x.to(weight.dtype), (width,), weight, 1e-3).to(x.dtype)]

    inputs = {name: norm_inputs(device, None, width)[name] for name in ("x", "weight")}
    names = ("x",) if low else ()
    compare(lambda x, weight: [pointwise.gated_norm(x, None, weight, 1e-3, False)], plain, lower(inputs, names), names)


def step_of(rate, dt_bias):
    return F.softplus((rate if rate.dtype == torch.float64 else rate.float()) + dt_bias)


def plain_discretise(x, rate, dt_bias, A_log):
    step = step_of(rate, dt_bias)
    return (x * step.unsqueeze(-1)).to(x.dtype), -A_log.exp() * step, x * 1


def plain_gates(rate, strength, dt_bias, A_log):
    step = step_of(rate, dt_bias)
    return -A_log.exp() * step, torch.sigmoid(strength.to(step.dtype))


def gate_inputs(device, heads):
    inputs = {"rate": part(5 * normal(device, 2, T, heads)), "dt_bias": column(normal(device, heads, seed=1) - 4)}
    return inputs | {"A_log": column(normal(device, heads, seed=2))}


@pytest.mark.parametrize(("heads", "width", "low"), [(3, 20, False), (2, 32, True)])
def test_discretise(device, heads, width, low):
    names = ("rate", "x") if low else ()
    inputs = {"x": part(normal(device, 2, T, heads, width, seed=3))} | gate_inputs(device, heads)
    compare(pointwise.discretise, plain_discretise, lower(inputs, names), names)


@pytest.mark.parametrize(("heads", "low"), [(5, False), (3, True)])
def test_gates(device, heads, low):
    names = ("rate", "strength") if low else ()
    inputs = gate_inputs(device, heads) | {"strength": part(normal(device, 2, T, heads, seed=4))}

    def kernel(rate, strength, dt_bias, A_log):
        return pointwise.gates(rate, dt_bias, A_log, strength)

    compare(kernel, plain_gates, lower(inputs, names), names)


class Steps(torch.autograd.Function):
    """The steps' kernels as a mixer calls them: the gradient of the rate is written between columns of wider rows."""

    @staticmethod
    def forward(ctx, rate, dt_bias, A_log):
        g, step = steps.forward(rate, dt_bias, A_log)
        ctx.save_for_backward(rate, dt_bias, A_log, step)
        return g, step

    @staticmethod
    def backward(ctx, dg, dstep):
        rate, dt_bias, A_log, step = ctx.saved_tensors
        into = part(torch.empty_like(rate))
        return into, *steps.backward(part(dg), dstep, step, rate, dt_bias, A_log, into)


@pytest.mark.parametrize(("heads", "low"), [(5, False), (3, True)])
def test_steps(device, heads, low, monkeypatch):
    monkeypatch.setattr(steps, "NUMBERS", 64)
    inputs = gate_inputs(device, heads)

    def plain(rate, dt_bias, A_log):
        step = step_of(rate, dt_bias)
        return -A_log.exp() * step, step

    compare(
        lambda rate, dt_bias, A_log: Steps.apply(rate, dt_bias, A_log),
        plain,
        lower(inputs, {"rate"} if low else ()),
        {"rate"} if low else (),
    )


@pytest.mark.parametrize(
    ("heads", "width", "low", "bound"), [(3, 20, False, None), (2, 20, False, -5.0), (2, 32, True, -5.0)]
)
def test_channel_gates(device, heads, width, low, bound):
    """KDA's gates of both kinds; f is a part of a wider projection."""

    def plain(rate, strength, dt_bias, A_log):
        wide = torch.promote_types(rate.dtype, torch.float32)
        total = (rate.to(wide) + dt_bias).unflatten(-1, (heads, -1))
        A = A_log.exp()[:, None]
        g = -A * F.softplus(total) if bound is None else bound * torch.sigmoid(A * total)
        return g, torch.sigmoid(strength.to(wide))

    def kernel(rate, strength, dt_bias, A_log):
        return pointwise.channel_gates(rate, dt_bias, A_log, strength, bound)

    inputs = {
        "rate": part(2 * normal(device, 2, T, heads * width)),
        "strength": part(2 * normal(device, 2, T, heads, seed=1)),
        "dt_bias": column(normal(device, heads * width, seed=2)),
        "A_log": column(normal(device, heads, seed=3)),
    }
    names = {"rate", "strength"} if low else ()
    compare(kernel, plain, lower(inputs, names), names)


@pytest.mark.parametrize(("low", "bound"), [(False, None), (False, -0.1), (True, None)])
def test_sigmoid_gates(device, low, bound):
    """GLA's gates, with a least one or without."""

    def plain(rate):
        g = F.logsigmoid(rate.to(torch.promote_types(rate.dtype, torch.float32))) / 16
        return (g if bound is None else g.clamp_min(bound)).unflatten(-1, (3, -1)), None

    def kernel(rate):
        return pointwise.sigmoid_gates(rate, 3, bound, 16.0), None

    inputs = {"rate": part(3 * normal(device, 2, T, 60))}
    compare(kernel, plain, lower(inputs, {"rate"} if low else ()), {"rate"} if low else ())


def test_channel_gates_of_any_size(device):
    """From where their exponentials vanish to where they are all there is, and gradients that are finite there."""
    size = torch.tensor([-80, -30, -17, -7, -1, 0, 1e-3, 2, 19, 21, 80], device=device).requires_grad_()
    bias, A_log = torch.zeros(len(size), device=device), torch.tensor([0.05], device=device)
    wide, A = size.double(), A_log.double().exp()
    for bound, want in ((None, -A * F.softplus(wide)), (-5.0, -5 * torch.sigmoid(A * wide))):
        g, _ = pointwise.channel_gates(size[None, None], bias, A_log, size[None, None, :1], bound)
        # exp(x) on a GPU is 2^(x log2 e): x log2 e is rounded once, by at most 2^-24 of 116, here a relative error of 4.8e-6.
        torch.testing.assert_close(g.double().flatten(), want, rtol=6e-6, atol=1e-37)
        (got,), (right,) = (torch.autograd.grad(x.sum(), [size], retain_graph=True) for x in (g, want))
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(("low", "offset"), [(False, 0.0), (True, 0.0), (False, OFFSETS["one"])])
def test_level_scales(device, low, offset):
    inputs = {"dl": 3 * normal(device, 2, T, 35), "L": column(normal(device, 5, 7, seed=1))}

    def plain(dl, L):
        wide = dl if dl.dtype == torch.float64 else dl.float()
        return [F.softplus(L * wide.unflatten(-1, L.shape) + offset).to(dl.dtype)]

    compare(lambda dl, L: [pointwise.level_scales(dl, L, offset)], plain, lower(inputs, ("dl",) if low else ()), low)


def test_softplus_of_any_size(device):
    """Down to where e^x itself is lost, without the loss of a logarithm next to one."""
    dl = torch.linspace(-80, 80, 321, device=device).view(1, 1, -1)
    got = pointwise.level_scales(dl, torch.ones(1, 321, device=device), 0.0).double()
    want = F.softplus(dl.double(), threshold=1e3).view(got.shape)
    assert ((got - want).abs() / want).max() < 1e-5  # exp itself is off by 80 · 2^-24


@pytest.mark.parametrize(("width", "low"), [(5, False), (64, False), (96, True)])
def test_unit_length(device, width, low):
    inputs = {name: part(normal(device, 2, T, 3, width, seed=i)) for i, name in enumerate("qk")}

    def plain(q, k):
        return [attention.unit(q, "q"), attention.unit(k, "k")]

    inputs["q"][:, 3] = 1e-5  # where the epsilon matters
    compare(lambda q, k: pointwise.units(q, k), plain, lower(inputs, ("q", "k") if low else ()), low)


@pytest.mark.parametrize(("width", "low"), [(7, False), (130, True)])
def test_silu_product(device, width, low):
    inputs = {name: part(3 * normal(device, 2, T, width, seed=i)) for i, name in enumerate(("gate", "x"))}
    compare(
        lambda gate, x: [pointwise.SiluProduct.apply(gate, x)],
        lambda gate, x: [F.silu(gate) * x],
        lower(inputs, tuple(inputs) if low else ()),
        low,
    )


def test_an_input_is_rounded_once_for_two_projections(device):
    """The same bits as two of autocast's own casts, and of their gradients' sum."""
    x, low = normal(device, 2, T, 7).requires_grad_(), BFLOAT16
    gradients = [part(normal(device, 2, T, 7, seed=i).to(low)) for i in (1, 2)]
    want = torch.autograd.grad([x.to(low), x.to(low)], x, gradients)[0]
    with torch.autocast(device.type, low):
        both = pointwise.twice(x)
    assert all(torch.equal(y, x.to(low)) for y in both)
    assert both[0].data_ptr() == both[1].data_ptr()
    assert torch.equal(torch.autograd.grad(both, x, gradients)[0], want)
    assert pointwise.twice(x) == (x, x)


def mixers():
    torch.manual_seed(0)
    mamba = LogLinearMamba2(24, num_heads=4, head_dim=6, state_size=8, num_groups=2, num_levels=5)
    delta = LogLinearGatedDeltaNet(24, num_heads=4, key_dim=8, value_dim=6, num_key_heads=2, num_levels=5)
    kda = LogLinearKDA(24, num_heads=4, key_dim=8, value_dim=6, num_key_heads=2, num_levels=5, decay_bound=-5.0)
    gla = LogLinearGLA(24, num_heads=4, key_dim=8, value_dim=6, num_kv_heads=2, num_levels=5)
    made = {"mamba2": mamba, "gated_deltanet": delta, "kda": kda, "gla": gla}
    for name, parameter in (pair for mixer in made.values() for pair in mixer.named_parameters()):
        if name in ("D", "norm.weight", "level_scale.L"):  # from ones, of which a wrong one would do as well
            torch.nn.init.normal_(parameter, 1.0, 0.5)
    return made


def mixer_results(mixer, hidden, gradient, low, cu_seqlens):
    hidden = hidden.detach().requires_grad_()
    with torch.autocast(hidden.device.type, BFLOAT16, enabled=low):
        out, _ = mixer(hidden, cu_seqlens=cu_seqlens)
    grads = torch.autograd.grad(out, [hidden, *mixer.parameters()], gradient.to(out))
    return [out, *grads]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mamba2", "rows"), ("gated_deltanet", "packed"), ("kda", "rows"), ("gla", "rows"),
        *((name, "autocast") for name in ("mamba2", "gated_deltanet", "kda")),
    ],
)  # fmt: skip
def test_mixers(device, name, kind, monkeypatch):
    """A mixer on the kernels, and plain: the same in float32; under autocast the same dtypes, and near float64."""
    if kind == "packed":
        cu_seqlens = torch.tensor([0, 1, 1, 8, 2 * T], device=device, dtype=torch.int32)
        hidden = normal(device, 1, 2 * T, 24)
    else:
        cu_seqlens, hidden = None, normal(device, 2, T, 24)
    mixer, low = mixers()[name].to(device), kind == "autocast"
    gradient = normal(device, *hidden.shape, seed=1)
    used = []
    for function in ("discretise", "gates", "channel_gates", "sigmoid_gates", "level_scales", "gated_norm", "units"):
        kernel = getattr(pointwise, function)
        monkeypatch.setattr(
            pointwise,
            function,
            lambda *x, kernel=kernel, function=function, **y: used.append(function) or kernel(*x, **y),
        )
    got = mixer_results(mixer, hidden, gradient, low, cu_seqlens)
    own = {"mamba2": ["discretise"], "gated_deltanet": ["gates", "units"], "kda": ["channel_gates", "units"]}
    assert sorted(used) == sorted([*own.get(name, ["sigmoid_gates"]), "level_scales", "gated_norm"])
    monkeypatch.setattr(pointwise, "has_kernels", lambda *tensors: False)
    plain = mixer_results(mixer, hidden, gradient, low, cu_seqlens)
    assert len(used) < 5
    if not low:
        for x, y in zip(got, plain, strict=True):
            assert relative(x, y) <= FLOAT32
        return
    want = mixer_results(mixer.double(), hidden.double(), gradient.double(), False, cu_seqlens)
    for x, y, z in zip(got, plain, want, strict=True):
        assert x.dtype == y.dtype
        assert relative(x, z) <= 20 * torch.finfo(BFLOAT16).eps


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(device):
    """Layers of one model may lie on several (device_map="auto"); nobody makes theirs the current one."""
    inputs = norm_inputs(device, None, 30, 5)
    want = results(kernel_norm(True), inputs)
    got = results(kernel_norm(True), {name: x.to("cuda:1") for name, x in inputs.items()})
    assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(got, want, strict=True))


def test_nothing_at_all(device):
    """No tokens: no launch, and gradients of zero for what all tokens share."""
    for mixer in mixers().values():
        mixer = mixer.to(device)
        out, *grads = mixer_results(mixer, normal(device, 2, 0, 24), normal(device, 2, 0, 24), False, None)
        assert out.shape == (2, 0, 24)
        assert all((x == 0).all() for x in grads)


def test_the_same_bits_and_no_second_backward(device):
    inputs = norm_inputs(device, None, 30, 5)
    first, second = (results(kernel_norm(True), inputs) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    weight = inputs["weight"].requires_grad_()
    out = pointwise.gated_norm(inputs["x"], inputs["gate"], weight, 1e-3, False)
    for loss in (out.square().sum(), out.sum()):
        (once,) = torch.autograd.grad(loss, weight, create_graph=True)
        with pytest.raises(RuntimeError, match=r"once_differentiable|autograd"):
            (weight.sum() + once.sum()).backward()


def test_rows_that_are_too_wide_stay_plain(device):
    x = torch.zeros(1, 1, pointwise.MAX_WIDTH, device=device)
    assert pointwise.takes_rows(x)
    dispatch.said.clear()
    with pytest.warns(
        UserWarning, match="a norm runs in plain PyTorch on the GPU, not in a kernel: rows of 8,193 numbers"
    ):
        assert not pointwise.takes_rows(torch.zeros(1, 1, pointwise.MAX_WIDTH + 1, device=device))
    assert not pointwise.takes_rows(x, x.bfloat16())
    assert not pointwise.takes_rows(x[0])


def test_norms_that_plain_code_broadcasts_or_refuses(device):
    """Nothing is read past a gate of one column, or by a weight or parts of a skip that do not divide the rows."""
    x, weight, parts = (torch.zeros(size, device=device) for size in ((1, 2, 12), (12,), (4,)))
    assert pointwise.takes_norm(x, x, weight)
    assert pointwise.takes_norm(x, x.bfloat16(), weight, x, parts)
    assert not pointwise.takes_norm(x, x[..., :1], weight)
    assert not pointwise.takes_norm(x, x, weight[:6])
    assert not pointwise.takes_norm(x, x, weight, x, torch.zeros(5, device=device))
    assert not pointwise.takes_norm(x, x, weight, x)


def test_tensors_without_memory_stay_plain(monkeypatch):
    """Fake ones, as distributed ones, say that they are on the device."""
    with FakeTensorMode():
        x = torch.empty(1, 2, 8, device="cuda")
    assert x.is_cuda
    assert not pointwise.has_kernels(x)
    monkeypatch.setattr(pointwise, "ordinary", lambda x: True)
    assert pointwise.has_kernels(x)
