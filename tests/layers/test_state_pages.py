"""States as pages of an engine: requests that start, go on and end side by side have the outputs of each alone."""

import pytest
import torch

from loglinear.layers import MIXERS, RecurrentMixerState
from loglinear.layers.pages import ALIGNMENT, Batch, PageLayout, mix
from loglinear.models import LogLinearConfig

pytestmark = pytest.mark.default_packages

WIDTH, ROOM = 32, 300
SIZES = {
    **dict(
        mamba_head_dim=8, mamba_state_size=8, delta_num_heads=2, kda_num_heads=2, gla_num_heads=2, retnet_num_heads=2
    ),
    **dict(lightning_num_heads=2, num_hidden_layers=1, vocab_size=16, hidden_size=WIDTH, max_position_embeddings=ROOM),
}
RECURRENT = [name for name, kind in MIXERS.items() if kind.recurrent]
# Tokens of requests a, b and c in each call of the engine; a single one is a step, unless the request starts with it.
CALLS = [(5, 0, 0), (60, 64, 1), (1, 0, 1), (1, 1, 1), (1, 70, 0), (0, 1, 130), (1, 1, 1)]
PAGES = (3, 0, 4)


def mixer_of(name: str, device: str = "cpu"):
    with torch.device(device):
        return MIXERS[name].build(LogLinearConfig(mixer=name, **SIZES)).double()


def layout_of(name: str) -> PageLayout:
    return PageLayout.of(mixer_of(name, "meta"), WIDTH, torch.float64, ROOM, torch.float64)


def batch_of(tokens: tuple[int, ...], seen: list[int]) -> tuple[Batch, list[int], list[int]]:
    """The call, and the requests with a single token and with several, in the order of their tokens."""
    steps = [i for i, n in enumerate(tokens) if n == 1 and seen[i]]
    others = [i for i, n in enumerate(tokens) if n and i not in steps]
    offsets = torch.tensor([0, *(tokens[i] for i in others)]).cumsum(0)
    pages, fresh = torch.tensor([PAGES[i] for i in others]).long(), torch.tensor([not seen[i] for i in others]).bool()
    return Batch(torch.tensor([PAGES[i] for i in steps]).long(), pages, fresh, offsets, offsets), steps, others


@pytest.mark.parametrize("name", RECURRENT)
def test_requests_side_by_side_have_the_outputs_of_each_alone(name):
    mixer, layout = mixer_of(name), layout_of(name)
    hidden = [torch.randn(sum(call[i] for call in CALLS), WIDTH).double() for i in range(3)]
    memory = torch.randint(-100, 100, (5, layout.nbytes + 48), dtype=torch.int8)  # the engine may pad pages
    memory[:, -48:] = 7
    state, others = layout.view(memory), memory[[1, 2]].clone()
    seen, got = [0, 0, 0], [[], [], []]
    for call in CALLS:
        batch, steps, longer = batch_of(call, seen)
        order = steps + longer
        given = torch.cat([hidden[i][seen[i] : seen[i] + call[i]] for i in order])
        made = mix(mixer, given, state, batch).split([call[i] for i in order])
        for i, part in zip(order, made):
            got[i].append(part)
            seen[i] += call[i]
    for x, parts in zip(hidden, got):
        torch.testing.assert_close(torch.cat(parts), mixer(x.unsqueeze(0))[0][0], rtol=1e-9, atol=1e-9)
    assert state.position[list(PAGES)].tolist() == seen
    assert torch.equal(memory[[1, 2]], others)
    assert (memory[:, -48:] == 7).all()


@pytest.mark.parametrize("name", RECURRENT)
def test_a_page_is_a_state_for_decoding(name):
    """The same tensors, without a byte but for the alignment of each."""
    _, after = mixer_of(name)(torch.randn(1, 3, WIDTH).double(), output_state=True)
    state = after.for_decoding(ROOM, torch.float64)
    layout = layout_of(name)
    view = layout.view(torch.zeros(1, layout.nbytes, dtype=torch.int8))
    assert isinstance(view, RecurrentMixerState)
    tensors = state._tensors()
    tensors[1] = tensors[1].int()  # the position
    assert [(x.shape, x.dtype) for x in view._tensors()] == [(x.shape, x.dtype) for x in tensors]
    assert 0 <= layout.nbytes - state.nbytes < ALIGNMENT * len(layout.fields)


def test_rows_are_for_steps_alone():
    layout = layout_of("log_linear_mamba2")
    state = layout.view(torch.zeros(4, layout.nbytes, dtype=torch.int8))
    state.rows = torch.tensor([2])
    with torch.no_grad(), pytest.raises(ValueError, match=r"state\.rows must be None in a call that is no step"):
        mixer_of("log_linear_mamba2")(torch.randn(1, 65, WIDTH).double(), state=state)
