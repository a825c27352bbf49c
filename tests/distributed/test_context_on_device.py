"""The kernels under context parallelism on one GPU: a group of one rank whose span is several blocks exchanges with itself."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import loglinear
from loglinear.distributed import context_parallel_attention, context_parallel_delta_rule
from oracle import error, make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}  # as benchmarks/verify.py


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def results(op, x, cotangent, **options):
    x = {name: value.detach().requires_grad_() for name, value in x.items()}
    o = op(**x, **options)
    o = o[0] if isinstance(o, tuple) else o
    return [o, *torch.autograd.grad(o, list(x.values()), cotangent.to(o.dtype))]


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("gate", ["scalar", "delta"])
def test_blocks_of_the_kernels_are_the_whole(group, gate, dtype):
    x = make_inputs(T=64 * 13, H=4, G=2, K=40, V=24, L=12, gate=gate)  # blocks of 8, 4 and 1 chunks
    x |= {weak: x[weak] / 50 for weak in ("g", "beta") if weak in x}
    x = {name: value.to("cuda", dtype) for name, value in x.items()}
    cotangent = torch.randn(x["v"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).cuda()
    whole = (loglinear.log_linear_attention, loglinear.log_linear_delta_rule)[gate == "delta"]
    blocks = (context_parallel_attention, context_parallel_delta_rule)[gate == "delta"]
    exact = results(whole, {name: value.double() for name, value in x.items()}, cotangent)
    single = results(whole, x, cotangent)
    found = results(blocks, x, cotangent, group=group)
    for name, have, one, want in zip(("o", *x), found, single, exact):
        assert error(have, want) <= max(LIMIT[dtype], 2 * error(one, want)), name
