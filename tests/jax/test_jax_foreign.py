"""``backend="torch"``: the PyTorch ops inside of a JAX program, outputs and gradients.

On a GPU that JAX sees, the calls run Triton's kernels. CI has none.
"""

import jax
import jax.numpy as jnp
import pytest
import torch
from jax_calls import op, to_jax, with_gradients

from loglinear import log_linear_attention, log_linear_delta_rule
from loglinear.jax import foreign, use_torch
from oracle import TOLERANCES, error, gradients, make_inputs, oracle

pytestmark = pytest.mark.default_packages
SMALL = {"B": 1, "H": 2, "G": 1, "K": 3, "V": 2, "L": 8}
GPU = jax.default_backend() == "gpu"
WIDEST = torch.float32 if GPU else torch.float64  # that the kernels take
gates = pytest.mark.parametrize("gate", ["scalar", "diagonal", "delta", "diagonal delta"])
on_cpu = pytest.mark.skipif(GPU, reason="needs JAX on a CPU")


@gates
def test_the_definition(gate):
    x = {name: y.to(WIDEST) for name, y in make_inputs(gate=gate, T=70, **SMALL | {"K": 16, "V": 16}).items()}
    wide = {name: y.double().requires_grad_() for name, y in x.items()}
    o, grads, _ = with_gradients(x, scale=-0.5, backend="torch")
    want = -0.5 * oracle(**wide)
    assert error(o, want) <= TOLERANCES[WIDEST]
    for name, wanted in zip(x, gradients(want, wide.values())):
        assert error(grads[name], wanted) <= TOLERANCES[WIDEST], name


@gates
@pytest.mark.parametrize("packed", [False, True])
def test_the_bits_of_the_pytorch_op(gate, packed):
    """From the second call of a kind on, kernels write into XLA's memory."""
    x = make_inputs(gate=gate, B=1, T=150, H=2, G=1, K=32, V=16, L=9, dtype=torch.bfloat16)
    arrays = {"cu_seqlens": jnp.asarray([0, 70, 150], jnp.int32)} if packed else {}
    y = {name: z.to("cuda" if GPU else "cpu").requires_grad_() for name, z in x.items()}
    torch_op = log_linear_delta_rule if "beta" in x else log_linear_attention
    want = torch_op(**{name: torch.tensor([0, 70, 150], device=y["v"].device) for name in arrays}, **{"g": None} | y)[0]
    for _ in range(3 if GPU else 1):
        o, grads, _ = with_gradients(x, arrays, backend="torch")
        assert torch.equal(o, want.detach().cpu().double())
        for name, wanted in zip(x, gradients(want, y.values())):
            assert torch.equal(grads[name], wanted.cpu().double()), name


def test_packed_documents_in_bfloat16_and_vmap():
    """The documents one by one give the same numbers."""
    x = to_jax(make_inputs(gate="scalar", T=70, **SMALL | {"B": 2}, dtype=torch.bfloat16))
    call = lambda *part: op({k: y[part] for k, y in x.items()}, backend="torch")[0]  # noqa: E731
    first, second, rest = slice(0, 1), slice(1, 2), slice(None)
    want = [call(first, slice(30)), call(first, slice(30, None)), call(second, rest)]
    o, _ = op(x, segment_ids=jnp.asarray([[4] * 30 + [2] * 40, [1] * 70]), backend="torch")
    assert o.dtype == jnp.bfloat16
    assert jnp.array_equal(o.reshape(1, 140, 2, 2), jnp.concatenate(want, 1))
    rows = jax.vmap(lambda x: op(jax.tree.map(lambda y: y[None], x), backend="torch")[0][0])(x)
    assert jnp.array_equal(rows, op(x, backend="torch")[0])


@on_cpu
def test_auto_takes_what_was_asked_for_on_a_gpu(monkeypatch):
    """XLA, with a word once, until ``use_torch``. Then what the kernels fit, where there is a GPU; here one is feigned."""
    x = to_jax(make_inputs(gate="scalar", T=5, **SMALL, dtype=torch.bfloat16))
    calls = []
    monkeypatch.setattr("loglinear.jax.ops.torch_call", lambda inputs, *_: calls.append(1) or inputs.v)
    monkeypatch.setattr("loglinear.jax.ops.forward", lambda inputs, *_: (inputs.v, None))
    monkeypatch.setattr(foreign._Choice, "said", set())
    with pytest.raises(RuntimeError, match="use_torch needs an NVIDIA GPU in JAX and in PyTorch: JAX has 'cpu'"):
        use_torch()
    monkeypatch.setattr(foreign._Choice, "asked", True)
    op(x)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    op(x, output_final_state=True)
    monkeypatch.setattr(foreign._Choice, "asked", False)
    with pytest.warns(UserWarning, match=r"loglinear.jax.use_torch\(\) takes Triton's kernels"):
        op(x)
    op(x)  # a warning would be an error here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    use_torch()
    op(x, backend="xla")
    assert not calls
    op(x)
    op(x, segment_ids=jnp.zeros((1, 5), jnp.int32))
    assert len(calls) == 2
    with pytest.warns(UserWarning, match="for float64 inputs"):
        op({name: y.astype(jnp.float64) for name, y in x.items()})
    with pytest.warns(UserWarning, match="for K=300 and V=2, where kernels take K up to 256 and V up to 1024"):
        op(x | {name: jnp.zeros((1, 5, 1, 300), jnp.bfloat16) for name in "qk"})
    assert len(calls) == 2


def test_states_are_refused_and_errors_come_back(monkeypatch):
    x = to_jax(make_inputs(gate="scalar", T=5))
    with pytest.raises(ValueError, match="backend must not be 'torch' for a call with states"):
        op(x, backend="torch", output_final_state=True)
    monkeypatch.setattr(foreign, "_compute", lambda *_: 1 / 0)
    with pytest.raises(Exception, match="ZeroDivisionError: division by zero"):
        op(x, backend="torch")[0].block_until_ready()
