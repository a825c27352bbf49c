"""The stages, composed, are the definition and its gradients in float64, packed or not. Each kernel against its own stage:
tests/kernels/on_device/test_stages.py."""

from itertools import accumulate, pairwise

import pytest
import torch
from forms import FORMS

from loglinear.reference.stages import channel, decay, delta_grads
from oracle import TOLERANCES, error, make_inputs

STAGES = {"identity": decay, "scalar": decay, "delta": delta_grads, "diagonal": channel, "diagonal delta": delta_grads}
CASES = {  # tokens of each row, packed or not, and the chunk size: up to three tiers, and paths of three entries of groups
    "empty": ((0, 0), 4),
    "one token": ((1, 1), 4),
    "a chunk and a token": ((5, 5), 4),
    "two tiers": ((37, 37), 2),
    "three tiers": ((131,), 1),
    "packed": ((0, 18, 1, 0, 131, 0), 2),
}


@pytest.mark.parametrize("gate", STAGES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("hard", [False, True], ids=["gates", "resets"])
def test_the_stages_are_the_definition(gate, case, hard):
    lengths, chunk = CASES[case]
    packed = len(set(lengths)) > 1
    x = make_inputs(B=1 if packed else len(lengths), T=sum(lengths) if packed else lengths[0], L=7, gate=gate)
    if hard and "g" in x:
        x["g"][:, [t for t in (0, 5, 8, 9) if t < x["g"].shape[1]]] = -torch.inf
        x["g"][:, 20:22] = -1e30
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    bounds = [0, *accumulate(lengths)] if packed else [0, lengths[0]]
    parts = [{n: y[:, a:b] for n, y in x.items()} for a, b in pairwise(bounds)]
    o = torch.cat([FORMS["dense"](**part, scale=0.7) for part in parts], 1)
    do = torch.randn_like(o)
    wanted = torch.autograd.grad(o, list(x.values()), do, allow_unused=True, materialize_grads=True)
    names = ("q", "k", "v", "g", *(["beta"] if "beta" in x else []), "level_scales")
    given = [x[name].detach() if name in x else None for name in names]
    options = {"lengths": lengths if packed else None, "chunk_size": chunk}
    made = STAGES[gate].trace(*given, do, scale=0.7, **options)[2]
    assert error(made["o"], o) <= TOLERANCES[torch.float64]
    for name, want in zip(x, wanted):
        assert error(made[f"d{name}"], want) <= TOLERANCES[torch.float64], name
