"""``linear_cross_entropy`` where it is plain torch; its kernel is tested in tests/kernels/on_device."""

import pytest
import torch
import torch.nn.functional as F

from loglinear.ops.cross_entropy import linear_cross_entropy


def make():
    hidden, weight = torch.randn(2, 9, 5).double(), torch.randn(7, 5).double()
    targets = torch.randint(7, (2, 9))
    targets[0, :4] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equals_the_loss_of_a_linear_layer(reduction):
    hidden, weight, targets = make()
    want = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), targets.flatten(), reduction=reduction)
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    for x, y in zip(*(torch.autograd.grad(value, [hidden, weight]) for value in (loss, want)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def test_low_precision_has_a_float32_loss():
    hidden, weight, targets = make()
    low = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_cross_entropy(hidden.float(), weight.float(), targets)
        assert linear_cross_entropy(hidden, weight, targets).dtype == torch.float64
    assert low.dtype == torch.float32
    assert torch.equal(low, cast)


def test_no_target_at_all():
    hidden, weight, targets = make()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    assert loss.isnan()
    assert all((x == 0).all() for x in torch.autograd.grad(loss, [hidden, weight]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(2, 9, 5).long()}, TypeError, "hidden must be float64, .*: got torch.int64"),
        ({"weight": torch.zeros(7, 5)}, TypeError, r"weight must have the dtype of hidden .*float64"),
        ({"weight": torch.zeros(7, 4)}, ValueError, r"weight must have shape \[vocab, D\] with D = 5.*: got \[7, 4\]"),
        ({"targets": torch.zeros(2, 9)}, TypeError, "targets must be int64: got torch.float32"),
        ({"targets": torch.zeros(9).long()}, ValueError, r"targets must have shape \[2, 9\]: got \[9\]"),
        ({"targets": torch.zeros(2, 9, device="meta").long()}, ValueError, r"targets must be on the device of hidden \(cpu\)"),
        ({"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum': got 'none'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    hidden, weight, targets = make()
    with pytest.raises(error, match=message):
        linear_cross_entropy(**({"hidden": hidden, "weight": weight, "targets": targets} | change))
