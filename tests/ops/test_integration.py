"""Inside PyTorch: compile, opcheck, autocast, checkpointing, graphs used twice, strides, and work that grows with log T."""

from itertools import pairwise

import pytest
import torch
from calls import C, both_forms, both_rules, fields, inputs, meaning, output, run
from torch.utils._python_dispatch import TorchDispatchMode

from loglinear.ops.operators import differentiable_once
from loglinear.reference.layout import build_layout
from oracle import SAME_NUMBERS, error, gradients


@pytest.mark.filterwarnings("ignore::UserWarning")  # Dynamo's own, where the graph breaks
def test_compiled_with_states(compiled):
    """A state's slots depend on its positions, hence not one graph; the numbers are eager's."""
    x, new = inputs("scalar", T=C + 7), inputs("scalar", T=1, seed=1)
    function = compiled(run, fullgraph=False, backend="aot_eager")
    o, state = function(x)
    step, state = function(new, state)
    expected, eager = run(x)
    expected_step, eager = run(new, eager)
    assert error(o, expected) <= SAME_NUMBERS
    assert error(step, expected_step) <= SAME_NUMBERS
    assert max(map(error, meaning(state), meaning(eager))) <= SAME_NUMBERS


@both_rules
@both_forms
def test_gradients_of_gradients(gate, linear):
    """Two chunks, hence the tree and its in-place sums."""
    x = inputs(gate, B=1, T=C + 2, H=1, G=1, K=1, V=1, L=8, linear=linear, grad=True)
    assert torch.autograd.gradgradcheck(lambda *y: output(dict(zip(x, y))), tuple(x.values()), fast_mode=True)


def test_what_kernels_differentiate_refuses_a_second_derivative():
    """Also behind a sum, whose gradient depends on nothing: torch's own guard would leave the term out in silence."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @differentiable_once
        def backward(ctx, gradient):
            return 2 * ctx.saved_tensors[0] * gradient

    x = torch.tensor([3.0], requires_grad=True)
    for loss in (Square.apply(x).sum(), Square.apply(x).square().sum()):
        (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
        (once,) = torch.autograd.grad(loss, x, create_graph=True)
        assert not plain.requires_grad
        assert torch.equal(once, plain)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            (x + once).sum().backward()


@both_rules
@both_forms
def test_training_after_inference_mode(gate, linear):
    """Tables kept from a call in inference mode must serve a later one that is differentiated."""
    build_layout.cache_clear()
    x = inputs(gate, T=C + 11, linear=linear, grad=True)
    with torch.inference_mode():
        expected, _ = run(x)
    o, state = run(x)
    assert torch.equal(o, expected)
    assert sum(gradient.norm() for gradient in gradients([o, *fields(state).values()], x.values())) > 0


@both_rules
@both_forms
def test_strides_do_not_matter(gate, linear):
    """Heads-first storage, reversed storage, and one key for all rows and one gate for all heads (stride 0)."""
    x = inputs(gate, T=2 * C, linear=linear)
    x["k"] = x["k"][:1].expand(2, -1, -1, -1)
    x["g"] = x["g"][..., :1].expand(-1, -1, 4)
    layouts = {
        "heads first": {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in x.items()},
        "every other": {n: torch.stack([t, t + 1], 2).flatten(1, 2)[:, ::2] for n, t in x.items()},
        "expanded": x,
    }
    copies = {name: t.clone(memory_format=torch.contiguous_format).requires_grad_() for name, t in x.items()}
    expected = output(copies)
    for how, y in layouts.items():
        assert how == "every other" or not all(t.is_contiguous() for t in y.values())
        y = {name: t.detach().requires_grad_() for name, t in y.items()}
        o = output(y)
        assert error(o, expected) <= SAME_NUMBERS, how
        for name, *pair in zip(y, gradients(o, y.values()), gradients(expected, copies.values())):
            assert error(*pair) <= SAME_NUMBERS, (how, name)


@both_rules
def test_inputs_are_not_written_to(gate):
    x = inputs(gate, T=4 * C, grad=True)
    before = {name: t.detach().clone() for name, t in x.items()}
    gradients(output(x), x.values())
    assert all(t._version == 0 and torch.equal(t, before[name]) for name, t in x.items())


class Count(TorchDispatchMode):
    """Counts the operators that reach the backend."""

    operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        return func(*args, **(kwargs or {}))


def operators(gate, length, grad, **sequences):
    """How many reach the backend in a call, and in its backward pass where there is one."""
    build_layout.cache_clear()  # the tables of the partition count as well
    x = inputs(gate, B=1, T=length, H=1, G=1, K=1, V=1, L=16, grad=grad)
    with Count() as count:
        o, _ = run(x, **sequences)
        if grad:
            gradients(o, x.values())
    return count.operators


@both_rules
def test_loops_run_over_levels_only(gate):
    """Doubling T adds the operators of one level, always as many; a loop over chunks or tokens would double them."""
    counts = [operators(gate, C << k, grad=True) for k in range(2, 8)]
    steps = {later - earlier for earlier, later in pairwise(counts)}
    assert len(steps) == 1, counts
    assert steps.pop() < 300


@both_rules
def test_the_work_of_packed_sequences_does_not_grow_with_their_number(gate):
    few, many = (operators(gate, n * 70, grad=False, cu_seqlens=torch.arange(n + 1) * 70) for n in (3, 50))
    assert few == many
