"""The ops under ``torch.func``, on tensors without values, and in ``torch.export``: what eager calls give, or its shapes."""

import warnings

import pytest
import torch
from calls import C, both_forms, both_rules, fields, inputs, output, run
from test_step import empty, step, tokens
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap

import loglinear
from loglinear.layers import LogLinearGatedDeltaNet, LogLinearMamba2
from loglinear.ops import transforms
from loglinear.ops.attention import attention
from oracle import SAME_NUMBERS, error

N = 3


def several(gate, linear, dim=0, T=C + 9):
    """N different inputs, stacked along ``dim`` of each tensor, and as a list."""
    each = [inputs(gate, B=2, T=T, H=2, G=1, L=8, seed=seed, linear=linear) for seed in range(N)]
    return {name: torch.stack([x[name] for x in each], dim) for name in each[0]}, each


def loss(x):
    return output(x).square().sum()


def assert_same(got, want):
    assert max(error(*pair) for pair in zip(got, want, strict=True)) <= SAME_NUMBERS


@both_rules
@both_forms
def test_vmap_over_one_argument(gate, linear):
    """The others are the same for all."""
    many, each = several(gate, linear)
    for name in many:
        dims = {other: 0 if other == name else None for other in many}
        got = vmap(output, in_dims=(dims,))({**each[0], name: many[name]})
        assert_same(got, [output({**each[0], name: x[name]}) for x in each])


@both_rules
@both_forms
def test_gradients_through_a_vmap(gate, linear):
    many, each = several(gate, linear)
    leaves = {name: x.clone().requires_grad_() for name, x in many.items()}
    want = [grad(loss)(x) for x in each]
    by_autograd = torch.autograd.grad(vmap(loss)(leaves).sum(), list(leaves.values()))
    by_func = grad(lambda x: vmap(loss)(x).sum())(many)
    for name, gradient in zip(many, by_autograd):
        assert_same(gradient, [x[name] for x in want])
        assert_same(by_func[name], [x[name] for x in want])


@both_rules
def test_nested_vmaps(gate):
    many, each = several(gate, linear=False)
    twice = {name: torch.stack([x, 2 * x if name == "v" else x], 1) for name, x in many.items()}
    got = vmap(vmap(output))(twice)
    want = [torch.stack([o, 2 * o]) for o in map(output, each)]
    assert_same(got, want)
    for x in (twice, *each):
        del x["g"]  # no gradient of g is asked for where there is none
    gradients = vmap(vmap(grad(loss)))(twice)
    for name, gradient in gradients.items():
        assert_same(gradient[:, 0], [grad(loss)(x)[name] for x in each])


def test_vmap_with_unit_length_and_scale():
    many, each = several("delta", linear=False)

    def call(x):
        return output(x, use_qk_l2norm_in_kernel=True, scale=0.3)

    assert_same(vmap(call)(many), map(call, each))


@both_rules
def test_compiled_vmap(gate, compiled):
    many, each = several(gate, linear=False)
    assert_same(compiled(vmap(output), backend="aot_eager")(many), map(output, each))


@both_rules
def test_what_kernels_take_under_a_gradient(gate):
    """Without a vmap the CPU does not come this way: it differentiates plain PyTorch, and twice. Kernels are one function."""
    x = inputs(gate, T=C + 9)
    names = list(x)

    def by_operator(*values):
        y = dict(zip(names, values))
        order = [y.get(name) for name in ("q", "k", "v", "g", "beta", "level_scales")]
        return transforms.run(attention, *order, None, None, 1.0, 0, "", "auto").square().sum()

    numbers = tuple(range(len(names)))
    assert_same(grad(by_operator, argnums=numbers)(*x.values()), grad(loss)(x).values())
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad(lambda q: grad(by_operator)(q, *list(x.values())[1:]).sum())(x["q"])


@pytest.mark.parametrize("given", ["initial_state", "output_final_state", "cu_seqlens"])
def test_what_has_no_meaning_under_vmap(given):
    many, each = several("scalar", linear=False)
    values = {"initial_state": run(each[0])[1], "output_final_state": True, "cu_seqlens": torch.tensor([0, C + 9])}
    value = values[given]
    if given == "cu_seqlens":
        many = {name: x[:, :1] for name, x in many.items()}
    with pytest.raises(ValueError, match=f"{given} must not be given under torch.vmap"):
        vmap(lambda x: loglinear.log_linear_attention(**x, **{given: value})[0])(many)
    unused = {name: x[0] for name, x in many.items()}  # nothing of the op is vmapped
    o = vmap(lambda y: y + loglinear.log_linear_attention(**unused, **{given: value})[0].sum())(torch.zeros(N))
    assert o.isfinite().all()


@both_rules
def test_no_step_under_vmap(gate):
    many, each = several(gate, linear=False, T=1)
    with pytest.raises(ValueError, match=r"q must not come from torch\.vmap"):
        vmap(lambda x: step(x, empty(each[0])))(many)


def test_positive_gates_are_found_under_vmap():
    many, _ = several("scalar", linear=False)
    many["g"][1, 0, 3] = 0.5
    with pytest.raises(ValueError, match=r"g must be a log decay, at most 0: got a maximum of 0\.5"):
        vmap(output)(many)


@pytest.mark.parametrize(
    ("kind", "sizes"), [(LogLinearMamba2, {}), (LogLinearGatedDeltaNet, {"key_dim": 8, "value_dim": 16})]
)
def test_gradients_of_single_samples_of_a_mixer(kind, sizes):
    torch.manual_seed(0)
    mixer, hidden = kind(24, num_heads=2, num_levels=5, **sizes).double(), torch.randn(N, 70, 24, dtype=torch.float64)
    parameters = dict(mixer.named_parameters())

    def loss_of(parameters, row):
        return functional_call(mixer, parameters, row.unsqueeze(0))[0].square().sum()

    got = vmap(grad(loss_of), in_dims=(None, 0))({name: x.detach() for name, x in parameters.items()}, hidden)
    for i, row in enumerate(hidden):
        want = torch.autograd.grad(loss_of(parameters, row), list(parameters.values()))
        assert_same([got[name][i] for name in parameters], want)


# ------------------------------------------------------------------------------------------------ tensors without values


def assert_alike(got, want):
    """Shapes and dtypes of o and every tensor of the state."""
    (o, state), (wanted, expected) = got, want
    assert (o.shape, o.dtype) == (wanted.shape, wanted.dtype)
    assert type(state) is type(expected)
    if state is not None:
        kinds = [{name: (x.shape, x.dtype) for name, x in fields(held).items()} for held in (state, expected)]
        assert kinds[0] == kinds[1]


@both_rules
@both_forms
@pytest.mark.parametrize("T", [0, 1, C, 3 * C + 5])
@pytest.mark.parametrize("with_state", [False, True], ids=["o", "state"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_meta_and_fake_tensors_have_the_shapes(gate, linear, T, with_state, dtype):
    x = inputs(gate, T=T, linear=linear, dtype=dtype, grad=True)
    call = run if with_state else lambda y: (output(y), None)
    want = call(x)
    meta = call({name: y.detach().to("meta").requires_grad_() for name, y in x.items()})
    assert_alike(meta, want)
    with FakeTensorMode() as mode:
        fake = call({name: mode.from_tensor(y) for name, y in x.items()})
        assert_alike(fake, want)
    meta[0].sum().backward()
    assert_alike(call(x), want)  # nothing fake is left in a table of real calls


def test_a_state_must_have_values():
    """How many slots a result has depends on its positions."""
    x = inputs("scalar", T=C + 9)
    state = run(x)[1]
    on_meta = {name: y.to("meta") for name, y in x.items()}
    with pytest.raises(ValueError, match="initial_state must have values: got meta or fake tensors"):
        run(on_meta, state.to("meta"))
    with pytest.raises(ValueError, match="cu_seqlens must have values where lengths are needed"):
        run({name: y[:1] for name, y in on_meta.items()}, cu_seqlens=torch.tensor([0, C + 9], device="meta"))
    one = {name: y.to("meta") for name, y in tokens(x, 0, 1).items()}
    with pytest.raises(ValueError, match="q and state must have values: got meta or fake tensors"):
        step(one, empty(tokens(x, 0, 1), device="meta"))


def test_packed_rows_on_meta():
    x = inputs("scalar", B=1, T=C + 9)
    o = output({name: y.to("meta") for name, y in x.items()}, cu_seqlens=torch.tensor([0, 5, C + 9], device="meta"))
    assert o.shape == x["v"].shape


# ---------------------------------------------------------------------------------------------------------------- export


class Module(torch.nn.Module):
    """A call of inputs by name, as a module of their values."""

    def __init__(self, call, names):
        super().__init__()
        self.call, self.names = call, list(names)

    def forward(self, *values):
        return self.call(dict(zip(self.names, values)))


def with_state(x):
    o, state = run(x)
    return [o, *fields(state).values()]


@both_rules
@both_forms
@pytest.mark.parametrize("strict", [False, True])
def test_exported(gate, linear, strict):
    """For every length."""
    x = inputs(gate, T=C + 9, linear=linear)
    model = Module(output, x)
    length = torch.export.Dim("T", min=2, max=4096)
    program = torch.export.export(model, tuple(x.values()), dynamic_shapes=(({1: length},) * len(x),), strict=strict)
    for T in (C + 9, 2, 3 * C):
        new = inputs(gate, T=T, linear=linear, seed=T)
        assert_same([program.module()(*new.values())], [model(*new.values())])


@both_rules
@both_forms
def test_exported_with_a_state(gate, linear):
    """For the length it was exported with: the state's slots are a part of the graph."""
    x = inputs(gate, T=3 * C + 9, linear=linear)
    model = Module(with_state, x)
    program = torch.export.export(model, tuple(x.values()))
    new = inputs(gate, T=3 * C + 9, linear=linear, seed=1)
    got, (o, state) = program.module()(*new.values()), run(new)
    assert_same(got[:1], [o])
    assert torch.equal(got[1], state.position)
    if linear:
        assert_same(got[2:], [state.state])
        return
    entries, decay = got[2:4]
    assert_same([entries * decay.exp()[..., None, None]], [state.entries * state.decay.exp()[..., None, None]])
    assert_same(got[4:], list(fields(state).values())[3:])


# ------------------------------------------------------------------------------------------------------ heads before time


@both_rules
def test_heads_before_time_are_noticed_once(gate):
    x = {name: y.transpose(1, 2) for name, y in inputs(gate, T=20, H=4, G=4).items()}
    loglinear.ops.dispatch.said.clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        output(x)
        output({name: y[:, :, :19] for name, y in x.items()})
    op = "log_linear_delta_rule" if gate == "delta" else "log_linear_attention"
    assert [str(warning.message) for warning in found] == [
        f"q of {op} has shape [2, 4, 20, 3], fewer tokens (T=4) than heads (G=20): all inputs must be [B, T, heads, ...], "
        "time before heads"
    ]


def test_short_texts_of_ours_are_no_mistake():
    """Mixers with many heads, calls that go on from a state, steps, and texts of as many tokens as heads."""
    loglinear.ops.dispatch.said.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixer = LogLinearGatedDeltaNet(24, num_heads=8, key_dim=4, value_dim=4)
        _, state = mixer(torch.randn(1, 1, 24), output_state=True)
        mixer(torch.randn(1, 1, 24), state=state)
        x = inputs("scalar", T=8, H=8, G=8)
        _, state = run(tokens(x, 0, 8))
        run(tokens(x, 0, 1), state)
        step(tokens(x, 0, 1), empty(x))
        output(tokens(x, 0, 0))
