"""The layout is read once for all layers, and again whenever it may be another."""

import copy
import pickle

import pytest
import torch

import loglinear
from loglinear.models.lifted import plans as module
from loglinear.models.lifted.plans import Plans

pytestmark = pytest.mark.default_packages


@pytest.fixture
def reads(monkeypatch):
    """The layouts that were read."""
    read, plan_layout = [], module.plan_layout

    def plan(*args, **kwargs):
        read.append(plan_layout(*args, **kwargs))
        return read[-1]

    monkeypatch.setattr(module, "plan_layout", plan)
    return read


@torch.no_grad()
def test_one_reading_for_all_layers(make_family, ids, reads):
    model, tokens = make_family("mamba2"), ids(2, 20)
    loglinear.lift(model)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    first = model(tokens, attention_mask=mask, use_cache=False).logits
    assert len(reads) == 1
    mask[0, 3:5] = 0  # the same tensor with other values
    second = model(tokens, attention_mask=mask, use_cache=False).logits
    assert len(reads) == 2
    assert not torch.equal(first[0, 5:], second[0, 5:])
    row = model(tokens[:1, 5:], use_cache=False).logits
    torch.testing.assert_close(second[:1, 5:], row, rtol=1e-5, atol=1e-5)
    twin = copy.deepcopy(model)
    assert len({id(layer.mixer.plans) for layer in twin.backbone.layers}) == 1
    assert twin.backbone.layers[0].mixer.plans is not model.backbone.layers[0].mixer.plans


def test_every_argument_counts(reads):
    plans, mask = Plans(), torch.tensor([[0, 1, 1]])
    others = [{"seq_idx": torch.tensor([[0, 0, 1]])}, {"cu_seqlens": torch.tensor([0, 1, 3])}, {}]
    for given in ({"attention_mask": mask}, {"attention_mask": mask.clone()}, *others):
        assert plans(1, 3, **given) is plans(1, 3, **given)
    assert len(reads) == 5
    assert plans(1, 2, mask).real is None
    assert len(reads) == 6
    assert pickle.loads(pickle.dumps(plans))._last is None


def test_a_tensor_that_is_gone_and_one_that_counts_no_changes(reads):
    plans = Plans()
    for _ in range(3):
        plans(1, 3, torch.tensor([[0, 1, 1]]))  # each may have the address of the last
    assert len(reads) == 3
    with torch.inference_mode():
        mask = torch.tensor([[0, 1, 1]])
        plans(1, 3, mask)
        plans(1, 3, mask)
    assert len(reads) == 5
