"""The unified view: each row of the table against its model's own recurrence or convolution, and the masks' structure.

The recurrences below are written out once more, by hand, and share no code with the library. All in float64.
"""

import dataclasses

import pytest
import torch

import loglinear
from loglinear import fenwick
from loglinear.cli import masks as command
from loglinear.cli import masks_figure as drawing
from loglinear.reference import masks

# Measured: 5e-16 relative in norm at most (x86-64 CPU, torch 2.13); the margin is for other BLAS libraries.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def inputs(length: int, levels: int | None = None, seed: int = 0) -> masks.Inputs:
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    batch, heads, width_k, width_v = 2, 3, 4, 5
    levels = fenwick.num_levels(length) if levels is None else levels
    return masks.Inputs(
        q=normal(batch, heads, length, width_k),
        k=torch.nn.functional.normalize(normal(batch, heads, length, width_k), dim=-1),
        v=normal(batch, heads, length, width_v),
        beta=normal(batch, heads, length).sigmoid(),
        g=-0.3 * normal(batch, heads, length).exp(),
        gamma=normal(batch, heads).sigmoid(),
        taps=normal(batch, heads, length),
        level_scales=normal(batch, heads, length, levels).exp(),
        channel_g=-0.3 * normal(batch, heads, length, width_k).exp(),
    )


# ------------------------------------------------------------------------------------------------------- own forms


def softmax_attention(x):
    return torch.nn.functional.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, scale=1.0)


def one_state(x, log_decay, delta=False):
    """Linear attention, RetNet, Mamba-2, GLA (a log decay ``[..., T, K]``) and, with ``delta``, theirs: S of a fixed size."""
    log_decay = log_decay if log_decay.dim() == x.k.dim() else log_decay.unsqueeze(-1)
    state = torch.zeros(*x.q.shape[:-2], x.q.shape[-1], x.v.shape[-1], dtype=x.v.dtype)
    outputs = []
    for t in range(x.q.shape[-2]):
        key, value = x.k[..., t, :, None], x.v[..., t, None, :]
        state = log_decay[..., t, :, None].exp() * state
        if delta:
            state = state + x.beta[..., t, None, None] * key * (value - key.mT @ state)
        else:
            state = state + key * value
        outputs.append((x.q[..., t, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, -2)


def long_convolution(x):
    """Convolve every component of k vᵀ with the filter over time, by FFT, and read it with q."""
    size = x.v.shape[-2]
    written = x.k[..., :, :, None] * x.v[..., :, None, :]  # [..., T, K, V]
    spectrum = torch.fft.rfft(written, n=2 * size, dim=-3) * torch.fft.rfft(x.taps, n=2 * size)[..., None, None]
    state = torch.fft.irfft(spectrum, n=2 * size, dim=-3)[..., :size, :, :]
    return (x.q[..., None, :] @ state).squeeze(-2)


def many_states(x, weight, delta=False):
    """A state per token, weighed by ``weight(t, s)``: the long convolution of the delta rule, which no FFT computes."""
    states, outputs = [], []
    for t in range(x.q.shape[-2]):
        key, value = x.k[..., t, :, None], x.v[..., t, None, :]
        beta = x.beta[..., t, None, None] if delta else 1.0
        states = [state - beta * key * (key.mT @ state) for state in states] if delta else states
        states.append(beta * key * value)
        read = [weight(t, s)[..., None] * (x.q[..., t, None, :] @ state).squeeze(-2) for s, state in enumerate(states)]
        outputs.append(sum(read))
    return torch.stack(outputs, -2)


def binary_counter(x, delta=False, per_channel=False):
    """Log-linear attention: a stack of (size, state); two of the same size become one."""
    gate = x.channel_g if per_channel else x.g.unsqueeze(-1)
    stack, outputs = [], []
    last = x.level_scales.shape[-1] - 1
    for t in range(x.q.shape[-2]):
        key, value, query = x.k[..., t, :, None], x.v[..., t, None, :], x.q[..., t, None, :]
        beta = x.beta[..., t, None, None] if delta else 1.0
        decay = gate[..., t, :, None].exp()
        stack = [(size, decay * state) for size, state in stack]
        if delta:
            stack = [(size, state - beta * key * (key.mT @ state)) for size, state in stack]
        leaf = beta * key * value
        read = [(0, leaf), *((size.bit_length(), state) for size, state in stack)]
        scales = x.level_scales[..., t, :]
        outputs.append(sum(scales[..., min(lev, last), None] * (query @ s).squeeze(-2) for lev, s in read))
        stack.append((1, leaf))
        while len(stack) > 1 and stack[-1][0] == stack[-2][0]:
            (size, later), (_, earlier) = stack.pop(), stack.pop()
            stack.append((2 * size, earlier + later))
    return torch.stack(outputs, -2)


OWN_FORM = {
    "softmax attention": softmax_attention,
    "linear attention": lambda x: one_state(x, torch.zeros_like(x.g)),
    "RetNet": lambda x: one_state(x, x.gamma.log()[..., None].expand_as(x.g)),
    "Mamba-2": lambda x: one_state(x, x.g),
    "long convolution": long_convolution,
    "log-linear": binary_counter,
    "linear attention, delta rule": lambda x: one_state(x, torch.zeros_like(x.g), delta=True),
    "RetNet, delta rule": lambda x: one_state(x, x.gamma.log()[..., None].expand_as(x.g), delta=True),
    "Mamba-2, delta rule": lambda x: one_state(x, x.g, delta=True),
    "long convolution, delta rule": lambda x: many_states(x, lambda t, s: x.taps[..., t - s], delta=True),
    "log-linear, delta rule": lambda x: binary_counter(x, delta=True),
    "GLA": lambda x: one_state(x, x.channel_g),
    "KDA": lambda x: one_state(x, x.channel_g, delta=True),
    "log-linear GLA": lambda x: binary_counter(x, per_channel=True),
    "log-linear KDA": lambda x: binary_counter(x, delta=True, per_channel=True),
}
ROWS = (*masks.TABLE, *(masks.with_delta_rule(row) for row in masks.TABLE[1:]), *masks.CHANNELS)


@pytest.mark.parametrize("length", [1, 2, 7, 32, 45])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_equals_its_own_form(row, length):
    x = inputs(length)
    torch.testing.assert_close(row.output(x), OWN_FORM[row.name](x), **TOLERANCE)


def test_the_table_has_the_six_models_once_each():
    assert [row.name for row in masks.TABLE] == list(OWN_FORM)[:6]
    assert [row.name for row in ROWS] == list(OWN_FORM)


@pytest.mark.parametrize("levels", [1, 3])
def test_fewer_levels_than_needed_share_the_last(levels):
    x = inputs(45, levels=levels)
    torch.testing.assert_close(masks.TABLE[-1].output(x), binary_counter(x), **TOLERANCE)


def test_hard_reset_cuts_the_past_and_nothing_else():
    x = inputs(24)
    x.g[..., 10] = float("-inf")
    for row in ROWS:
        if "Mamba-2" in row.name or "log-linear" in row.name:
            out = row.output(x)
            assert out.isfinite().all()
            torch.testing.assert_close(out, OWN_FORM[row.name](x), **TOLERANCE)
    assert (masks.gate_mask(x)[..., 10:, :10] == 0).all()
    assert (masks.gate_mask(x)[..., 10:, 10:].diagonal(dim1=-2, dim2=-1) == 1).all()


def test_a_reset_of_one_channel_leaves_the_others():
    x = inputs(24)
    x.channel_g[..., 10, 1] = float("-inf")
    for row in masks.CHANNELS:
        torch.testing.assert_close(row.output(x), OWN_FORM[row.name](x), **TOLERANCE)
    with pytest.raises(ValueError, match="channel_g must be a tensor"):
        masks.CHANNELS[0].output(dataclasses.replace(x, channel_g=None))


def test_lambda_one_is_mamba2_and_gate_zero_is_linear_attention():
    x = inputs(40)
    log_linear, mamba2, linear = masks.TABLE[5], masks.TABLE[3], masks.TABLE[1]
    ones = dataclasses.replace(x, level_scales=torch.ones_like(x.level_scales))
    open_gate = dataclasses.replace(ones, g=torch.zeros_like(x.g))
    assert torch.equal(log_linear.mask(ones), mamba2.mask(x))
    assert torch.equal(log_linear.mask(open_gate), linear.mask(x).expand_as(x.g[..., None] * x.g[..., None, :]))


@pytest.mark.parametrize("row", [ROWS[5], ROWS[10], *masks.CHANNELS[2:]], ids=lambda row: row.name)
def test_gradients_of_the_log_linear_rows(row):
    x = inputs(5)
    names = ["q", "k", "v", "beta", "channel_g" if row in masks.CHANNELS else "g", "level_scales"]

    def output(*values):
        return row.output(dataclasses.replace(x, **dict(zip(names, values))))[0, 0]

    assert torch.autograd.gradcheck(output, [getattr(x, name).requires_grad_() for name in names])


def test_softmax_scores_survive_large_products():
    x = inputs(16)
    large = dataclasses.replace(x, q=300 * x.q)
    torch.testing.assert_close(masks.TABLE[0].output(large), softmax_attention(large), **TOLERANCE)


def test_with_delta_rule_refuses_softmax():
    with pytest.raises(ValueError, match=r"row must have dot-product scores.*'softmax attention'"):
        masks.with_delta_rule(masks.TABLE[0])


# ------------------------------------------------------------------------------------------------ dyadic structure


@pytest.mark.parametrize("length", [0, 1, 2, 3, 8, 100, 257])
def test_dyadic_blocks_tile_the_lower_triangle(length):
    seen = {}
    for level, rows, columns in masks.dyadic_blocks(length):
        assert len(columns) == 2 ** (level - 1)
        for t in rows:
            for s in columns:
                assert (t, s) not in seen
                seen[t, s] = level
    assert seen == {(t, s): fenwick.level(t, s) for t in range(length) for s in range(t)}


def rank(block: torch.Tensor) -> int:
    singular = torch.linalg.svdvals(block)
    return int((singular > 1e-13 * singular[0]).sum())


@pytest.mark.parametrize(("length", "levels"), [(64, None), (100, None), (100, 3)])
def test_dyadic_blocks_have_rank_one(length, levels):
    mask = masks.log_linear_mask(inputs(length, levels))[1, 2]
    blocks = list(masks.dyadic_blocks(length))
    assert len(blocks) == length - 1
    for _, rows, columns in blocks:
        assert rank(mask[rows.start : rows.stop, columns.start : columns.stop]) == 1


def test_blocks_side_by_side_have_the_rank_of_their_count():
    """Log-linear attention needs a state per bucket where Mamba-2 needs one: 56 = 32 + 16 + 8 columns, rank 3."""
    x = inputs(64)
    assert rank(masks.log_linear_mask(x)[0, 0, 56:, :56]) == 3
    assert rank(masks.gate_mask(x)[0, 0, 56:, :56]) == 1
    assert rank(masks.toeplitz_mask(x)[0, 0, 56:, :56]) == 8


# ---------------------------------------------------------------------------------------------- the op and the figure


@pytest.mark.parametrize("delta", [False, True])
def test_log_linear_row_equals_the_public_op(delta):
    x = inputs(150)  # more than two chunks
    row = masks.with_delta_rule(masks.TABLE[5]) if delta else masks.TABLE[5]
    q, k, v, g, beta, scales = (y.transpose(1, 2) for y in (x.q, x.k, x.v, x.g, x.beta, x.level_scales))
    if delta:
        o, _ = loglinear.log_linear_delta_rule(q, k, v, g, beta, scales)
    else:
        o, _ = loglinear.log_linear_attention(q, k, v, g, scales)
    torch.testing.assert_close(o.transpose(1, 2), row.output(x), **TOLERANCE)


def test_figure_shows_the_masks_of_the_table():
    x = drawing.example_inputs(24, seed=3)
    panels = drawing.draw_masks(24, seed=3).axes[:6]
    assert [panel.get_title() for panel in panels] == [row.name for row in masks.TABLE]
    for panel, row in zip(panels, masks.TABLE):
        drawn = torch.from_numpy(panel.images[0].get_array().filled(0.0))
        torch.testing.assert_close(drawn, row.mask(x), **TOLERANCE)
        assert drawn.min() >= 0
        assert drawn.max() <= 1  # the colour scale hides nothing


def test_command_writes_the_same_figures_twice(tmp_path):
    first = command.masks(command.MasksArgs(output=tmp_path / "first", tokens=8))
    second = command.masks(command.MasksArgs(output=tmp_path / "second", tokens=8))
    assert [path.name for path in first] == ["masks.png", "masks.svg", "buckets.png", "buckets.svg"]
    for one, other in zip(first, second):
        assert one.read_bytes() == other.read_bytes()
    assert first[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in first[1].read_text()


@pytest.mark.parametrize("wrong", [{"tokens": 1}, {"tokens": 257}, {"query": 0}, {"query": 16}])
def test_command_refuses_what_it_cannot_draw(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be .* got {next(iter(wrong.values()))}"):
        command.MasksArgs(**wrong)
