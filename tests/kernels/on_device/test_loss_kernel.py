"""The loss of an output layer by its kernel against plain torch in float64: the loss and both gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import FLOAT32, INTERPRETED, relative

from loglinear.kernels.pointwise import cross_entropy as kernels
from loglinear.ops import cross_entropy

WIDTH = 24
BLOCKS = {name: getattr(kernels, name) for name in ("LOGITS_BYTES", "ROWS", "TILE")}
COUNT = 40 if INTERPRETED else 300  # more than one block


@pytest.fixture(autouse=True)
def on_the_kernel(monkeypatch):
    """Blocks of 32 tokens, and tiles that no vocabulary here is a multiple of."""
    monkeypatch.setattr(kernels, "LOGITS_BYTES", 1)
    monkeypatch.setattr(kernels, "ROWS", 32)
    monkeypatch.setattr(kernels, "TILE", 64)
    if INTERPRETED:
        monkeypatch.setattr(cross_entropy, "has_kernel", lambda hidden: hidden.dtype != torch.float64)


def make(device, count, vocab, dtype=torch.float32):
    """hidden, weight and targets of which a fifth is ignored; logits of about 5, so that a softmax has a peak."""
    hidden, weight = torch.randn(count, WIDTH, device=device), torch.randn(vocab, WIDTH, device=device)
    targets = torch.randint(vocab, (count,), device=device)
    targets[torch.rand(count, device=device) < 0.2] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def results(function, hidden, weight, targets, **options):
    loss = function(hidden, weight, targets, **options)
    return [loss, *torch.autograd.grad(loss * 0.7, [hidden, weight])]


def plain(hidden, weight, targets, **options):
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, **options)


def exact(hidden, weight, targets, **options):
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    return results(plain, *wide, targets, **options)


CASES = [  # tokens, vocabulary, options, factor of the hidden states, bar
    (1, 1, {"reduction": "sum"}, 1, FLOAT32),
    (31, 63, {"reduction": "mean"}, 1, FLOAT32),
    (33, 65, {"reduction": "sum"}, 1, FLOAT32),
    (COUNT, 200, {"reduction": "mean"}, 1, FLOAT32),
    (20, 40, {"ignore_index": 3}, 1, FLOAT32),
    # Far beyond where exp overflows: the largest logit is taken off first, and may be in any tile. Logits are off by 1e-3.
    (20, 200, {}, 1000, 1e-2),
]


@pytest.mark.parametrize(("count", "vocab", "options", "factor", "bar"), CASES)
def test_equals_plain_torch(device, count, vocab, options, factor, bar):
    hidden, weight, targets = make(device, count, vocab)
    inputs = (
        (hidden.detach() * factor).requires_grad_(),
        weight,
        targets.clamp(min=0 if "ignore_index" in options else -100),
    )
    want = exact(*inputs, **options)
    for x, y in zip(results(cross_entropy.linear_cross_entropy, *inputs, **options), want, strict=True):
        assert (x.double() - y).norm() <= bar * y.norm().clamp(min=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(device, dtype):
    """At most twice the error of plain torch in the same dtype, both against float64 from the same numbers."""
    inputs = make(device, COUNT, 200, dtype)
    want = exact(*inputs)
    got = map(relative, results(cross_entropy.linear_cross_entropy, *inputs), want)
    for ours, theirs in zip(got, map(relative, results(plain, *inputs), want), strict=True):
        assert ours <= 2 * theirs + 1e-6


def test_autocast_sums_the_weights_gradient_in_float32(device):
    hidden, weight, targets = make(device, COUNT, 200)
    want = exact(hidden.bfloat16(), weight.bfloat16(), targets)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = results(cross_entropy.linear_cross_entropy, hidden, weight, targets)
        theirs = results(plain, hidden, weight, targets)
    assert [x.dtype for x in got] == [torch.float32] * 3
    for x, y in zip(map(relative, got, want), map(relative, theirs, want), strict=True):
        assert x <= 2 * y + 1e-6


def test_no_target_at_all(device):
    for count in (0, 5):
        hidden, weight, _ = make(device, count, 40)
        targets = torch.full((count,), -100, device=device)
        for reduction in ("mean", "sum"):
            loss, *grads = results(cross_entropy.linear_cross_entropy, hidden, weight, targets, reduction=reduction)
            assert loss.isnan() if reduction == "mean" else loss == 0
            assert all((x == 0).all() for x in grads)


def test_a_target_outside_makes_the_loss_nan(device):
    hidden, weight, targets = make(device, 20, 40)
    for wrong in (-1, 40):
        targets[7] = wrong
        assert cross_entropy.linear_cross_entropy(hidden, weight, targets).isnan()


def test_only_what_is_wanted(device, monkeypatch):
    """A frozen weight has no gradient worked out, and without gradients the loss is the same."""
    hidden, weight, targets = make(device, 20, 40)
    loss, dhidden, _ = results(cross_entropy.linear_cross_entropy, hidden, weight, targets)
    asked = []
    forward = kernels.loss_and_gradients
    monkeypatch.setattr(kernels, "loss_and_gradients", lambda *inputs: asked.append(inputs[-2:]) or forward(*inputs))
    frozen = cross_entropy.linear_cross_entropy(hidden, weight.detach(), targets)
    assert torch.equal(torch.autograd.grad(frozen * 0.7, hidden)[0], dhidden)
    with torch.no_grad():
        assert torch.equal(cross_entropy.linear_cross_entropy(hidden, weight, targets), loss)
    assert asked == [(True, False), (False, False)]


def test_the_same_bits_and_a_second_backward(device):
    inputs = make(device, 35, 70)
    first, second = (results(cross_entropy.linear_cross_entropy, *inputs) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    loss = cross_entropy.linear_cross_entropy(*inputs)
    for _ in range(2):
        again = torch.autograd.grad(loss * 0.7, inputs[:2], retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(again, first[1:], strict=True))
    (once,) = torch.autograd.grad(loss.square(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        once.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at what it traces
def test_compiles_to_one_graph(device, compiled):
    inputs = make(device, 35, 70)
    want = results(cross_entropy.linear_cross_entropy, *inputs)
    function = compiled(cross_entropy.linear_cross_entropy, backend="aot_eager")
    for x, y in zip(results(function, *inputs), want, strict=True):
        assert torch.equal(x, y)
    operator = torch.ops.loglinear.linear_cross_entropy.default
    torch.library.opcheck(
        operator, (*inputs, -100, torch.bfloat16 if device.type == "cuda" else torch.float32, True, True)
    )


@pytest.mark.gpu
def test_no_logits_are_kept(device, monkeypatch):
    """65,536 tokens and a vocabulary of 32,000 in bf16: 4 GB of logits, of which an eighth is ever there."""
    for name, value in BLOCKS.items():
        monkeypatch.setattr(kernels, name, value)
    hidden = torch.randn(65536, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(32000, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(32000, (65536,), device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cross_entropy.linear_cross_entropy(hidden, weight, targets).backward()
    assert torch.cuda.max_memory_allocated() - before < 512 << 20


def test_blocks_hold_as_many_tokens_as_their_memory_takes(monkeypatch):
    for name, value in BLOCKS.items():
        monkeypatch.setattr(kernels, name, value)
    assert kernels.block_rows(65536, 32000 * 2) == 4096
    assert kernels.block_rows(65536, 50272 * 2) == 2560  # 26 blocks: 25 would be of 2,621, and 2,688 are too many
    assert kernels.block_rows(300, 32000 * 2) == 384
    assert kernels.block_rows(65536, 1 << 30) == 128
    assert kernels.block_rows(0, 64) == 128
