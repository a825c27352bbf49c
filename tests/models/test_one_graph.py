"""The whole model where no value may be read: ``torch.compile`` in one graph, ``torch.export``, meta and fake tensors."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

B, T = 2, 70
BORDERS = [31, 40]

# Every description for the two kinds of layers, but the one that needs most: it is for all mixers.
BOTH = ["log_linear_mamba2", "attention"]
MOST = "mask and positions"
ALL = ["mamba2", "attention", "log_linear_gated_deltanet", "gated_deltanet", "log_linear_kda", "log_linear_retnet"]
ASKED_OF_ALL_PACKAGES = ("nothing", "offsets")


def cases(*kinds):
    quick = [pytest.param((BOTH, kind), id=kind) for kind in ASKED_OF_ALL_PACKAGES]
    others = [(BOTH, kind) for kind in kinds] + [(ALL, MOST)]
    return quick + [pytest.param(case, id=case[1], marks=pytest.mark.default_packages) for case in others]


@pytest.fixture(params=cases("mask", "seq_idx"))
def case(request, make_model, tokens):
    """A model, ids, and arguments that say which columns are tokens, and of which documents."""
    mixers, kind = request.param
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, :9] = 0
    mask[1, [20, 21, -2, -1]] = 0
    positions, seq_idx = torch.arange(T).repeat(B, 1), torch.zeros(B, T, dtype=torch.int32)
    for border in BORDERS:
        positions[0, border:] -= positions[0, border].item()
        seq_idx[1, border:] += 1
    described = {
        "nothing": {},
        "mask": {"attention_mask": mask},
        "positions": {"position_ids": positions},
        "seq_idx": {"seq_idx": seq_idx},
        "mask and positions": {"attention_mask": mask, "position_ids": positions},
        "offsets": {"cu_seqlens": torch.tensor([0, *BORDERS, T])},
    }[kind]
    return make_model(mixers), tokens(1 if kind == "offsets" else B, T), described


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at what it traces
@pytest.mark.parametrize("case", cases("mask"), indirect=True)
def test_compiled_whole(case):
    """One graph; logits of every token, the loss and all gradients are those of an eager call.

    To compile takes longest. seq_idx and positions become one description before any layer, and the last case has it. Training
    is another graph, without logits: compiled once, where nothing is described.
    """
    model, ids, described = case
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = list(model.parameters())

    def call(function):
        out = function(ids, labels=ids, skip_logits=False, **described)
        return [out.logits, out.loss, *torch.autograd.grad(out.loss, parameters)]

    for got, want in zip(call(compiled), call(model), strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()
    if described:
        return
    model.train()
    torch.testing.assert_close(compiled(ids, labels=ids).loss, model(ids, labels=ids).loss)


@torch.no_grad()
def test_exported(case, tokens):
    model, ids, described = case
    program = torch.export.export(model, (ids,), described)
    other = tokens(*ids.shape)
    got, want = program.module()(other, **described), model(other, use_cache=False, **described)
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-9)


def test_tensors_without_values(case):
    """Shapes and dtypes of logits, loss and gradients on the meta device and under FakeTensorMode."""
    model, ids, described = case
    want = model(ids, labels=ids, **described)
    on_meta = {name: x.to("meta") for name, x in {"input_ids": ids, "labels": ids, **described}.items()}
    got = copy.deepcopy(model).to("meta")(**on_meta)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(x) for name, x in {"input_ids": ids, "labels": ids, **described}.items()}
        faked = model(**fake)
        assert model(fake["input_ids"], **{n: fake[n] for n in described}).cache is None
    for out in (got, faked):
        assert (out.logits.shape, out.logits.dtype) == (want.logits.shape, want.logits.dtype)
        assert out.loss.shape == ()
    got.loss.backward()


def test_a_cache_needs_values(make_model, tokens):
    model = make_model("log_linear_mamba2").to("meta")
    with pytest.raises(ValueError, match="use_cache must be false or None for tensors without values"):
        model(tokens(1, 5).to("meta"), use_cache=True)
