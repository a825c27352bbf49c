"""The two public ops called alike, by argument name: the delta rule when there is a beta. Kinds of calls, by name."""

import pytest
import torch

import loglinear
from loglinear import reference
from loglinear.reference.chunkwise import chunkwise
from oracle import error, gradients, make_inputs, per_value_head

C = 64  # the ops' chunk size: where their bits change
KINDS = {
    "scalar": {"gate": "scalar"},
    "delta": {"gate": "delta"},
    "channels": {"gate": "diagonal"},
    "channels, delta, resets": {"gate": "diagonal delta", "hard": True},
    "no gate": {"gate": "identity"},
    "scalar, resets": {"gate": "scalar", "hard": True},
    "delta, resets": {"gate": "delta", "hard": True},
    "too few levels": {"gate": "delta", "L": 3},
    "linear scalar": {"gate": "scalar", "linear": True},
    "linear delta": {"gate": "delta", "linear": True},
    "linear, resets": {"gate": "scalar", "linear": True, "hard": True},
}
both_rules = pytest.mark.parametrize("gate", ["scalar", "delta"])
both_forms = pytest.mark.parametrize("linear", [False, True], ids=["log-linear", "linear"])


def kinds(*names):
    """A test of each of these kinds; of all, if none is named."""
    return pytest.mark.parametrize("kind", [KINDS[name] for name in names or KINDS], ids=names or KINDS)


def inputs(gate, *, linear=False, hard=False, L=9, **kwargs):
    """``make_inputs``; ``linear`` switches the tree off, ``hard`` puts -inf and -1e30 among the gates."""
    grad = kwargs.pop("grad", False)
    x = make_inputs(gate=gate, L=L, **kwargs)
    if hard:
        T = x["g"].shape[1]
        x["g"][:, [t for t in (0, 5, C - 1, C, C + 1, 100, 130) if t < T]] = -torch.inf
        x["g"][:, 70:73] = -1e30
    if linear:
        del x["level_scales"]
    return {name: tensor.requires_grad_(grad) for name, tensor in x.items()}


def call(x, **kwargs):
    op = loglinear.log_linear_delta_rule if "beta" in x else loglinear.log_linear_attention
    return op(**{"g": None, "level_scales": None, **x}, **kwargs)


def run(x, state=None, **kwargs):
    """``(o, final_state)``."""
    return call(x, initial_state=state, output_final_state=True, **kwargs)


def output(x, **kwargs):
    """o, asked for alone."""
    o, state = call(x, **kwargs)
    assert state is None
    return o


def dense(q, k, v, level_scales=None, g=None, beta=None):
    """The dense reference (itself tested against the oracle), for lengths at which the oracle would take minutes."""
    heads = v.shape[2]
    q, k = per_value_head(q, heads).transpose(1, 2), per_value_head(k, heads).transpose(1, 2)
    g = torch.zeros_like(v[..., 0]) if g is None else g
    transition = reference.transition_of(g.transpose(1, 2), None if beta is None else beta.mT, k)
    scales = None if level_scales is None else level_scales.transpose(1, 2)
    return reference.dense(q, k, v.transpose(1, 2), transition, scales).transpose(1, 2)


def chunked(x, state=None, lengths=None, scale=1.0, **options):
    """``(o, final_state)`` by the reference's chunkwise form, in the dtype of x."""
    g = x["g"] if "g" in x else torch.zeros_like(x["v"][..., 0])
    given = scale * x["q"], x["k"], x["v"], g, x.get("level_scales"), x.get("beta")
    return chunkwise(*given, state, lengths, **options)


def together(each, axis):
    """Inputs of several calls as those of one."""
    return {name: torch.cat([x[name] for x in each], axis) for name in each[0]}


def tokens(x, left, right):
    return {name: tensor[:, left:right] for name, tensor in x.items()}


def rows(x, index):
    return {name: tensor[index] for name, tensor in x.items()}


def meaning(state):
    """What a state says, whatever the split between its matrices and their logs: a list of tensors to compare."""
    if isinstance(state, loglinear.LinearState):
        return [state.state]
    buckets = state.decay.exp()[..., None, None] * state.entries
    parts = [buckets, state.open_k, state.open_v, state.open_g.exp(), state.open_beta]
    return [part for part in parts if part is not None]


def fields(state):
    """Every tensor of a state by name."""
    return {name: value for name, value in vars(state).items() if isinstance(value, torch.Tensor)}


def assert_close(x, got, want, bar, y=None):
    """Outputs and the gradients of all inputs x (and those of y, if the other result has inputs of its own)."""
    assert got.shape == want.shape
    assert got.dtype == x["v"].dtype
    assert error(got, want) <= bar
    theirs = (x if y is None else y).values()
    for name, have, expected in zip(x, gradients(got, x.values()), gradients(want, theirs), strict=True):
        assert have.isfinite().all(), name
        assert have.dtype == x[name].dtype, name
        assert error(have, expected) <= bar, name
