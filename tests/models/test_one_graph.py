"""The whole model where no value may be read: ``torch.compile`` in one graph, ``torch.export``, meta and fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

B, T = 2, 70
BORDERS = [31, 40]


@pytest.fixture(params=["nothing", "mask", "positions", "seq_idx", "mask and positions", "offsets"])
def described(request):
    """Arguments that say which columns are tokens, and of which documents."""
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, :9] = 0
    mask[1, [20, 21, -2, -1]] = 0
    positions, seq_idx = torch.arange(T).repeat(B, 1), torch.zeros(B, T, dtype=torch.int32)
    for border in BORDERS:
        positions[0, border:] -= positions[0, border].item()
        seq_idx[1, border:] += 1
    return {
        "nothing": {},
        "mask": {"attention_mask": mask},
        "positions": {"position_ids": positions},
        "seq_idx": {"seq_idx": seq_idx},
        "mask and positions": {"attention_mask": mask, "position_ids": positions},
        "offsets": {"cu_seqlens": torch.tensor([0, *BORDERS, T])},
    }[request.param]


def ids_for(described, tokens):
    return tokens(1 if "cu_seqlens" in described else B, T)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at what it traces
def test_compiled_whole(make_model, tokens, mixer, described):
    """One graph; logits of every token, the loss and all gradients are those of an eager call."""
    model, ids = make_model(mixer, num_hidden_layers=3 if isinstance(mixer, list) else 1), ids_for(described, tokens)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = list(model.parameters())

    def call(function):
        out = function(ids, labels=ids, skip_logits=False, **described)
        return [out.logits, out.loss, *torch.autograd.grad(out.loss, parameters)]

    for got, want in zip(call(compiled), call(model), strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()
    model.train()
    torch.testing.assert_close(compiled(ids, labels=ids, **described).loss, model(ids, labels=ids, **described).loss)


@torch.no_grad()
def test_exported(make_model, tokens, mixer, described):
    model, ids = make_model(mixer, num_hidden_layers=3 if isinstance(mixer, list) else 1), ids_for(described, tokens)
    program = torch.export.export(model, (ids,), described)
    other = tokens(*ids.shape)
    got, want = program.module()(other, **described), model(other, use_cache=False, **described)
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-9)


def test_tensors_without_values(make_model, tokens, mixer, described):
    """Shapes and dtypes of logits, loss and gradients on the meta device and under FakeTensorMode."""
    model, ids = make_model(mixer), ids_for(described, tokens)
    want = model(ids, labels=ids, **described)
    on_meta = {name: x.to("meta") for name, x in {"input_ids": ids, "labels": ids, **described}.items()}
    got = make_model(mixer).to("meta")(**on_meta)
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
