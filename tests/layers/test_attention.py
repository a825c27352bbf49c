"""SoftmaxAttention against the textbook form, and against itself split, packed and at different positions per row."""

import pytest
import torch

from loglinear.layers import SoftmaxAttention

HIDDEN = 12


@pytest.fixture(params=[4, 2], ids=["own-keys", "grouped-keys"])
def mixer(request):
    torch.manual_seed(0)
    return SoftmaxAttention(HIDDEN, num_heads=4, head_dim=6, num_kv_heads=request.param, rope_theta=100.0).double()


def oracle(mixer, hidden):
    """One sequence ``[T, hidden]``: rotary positions as multiplications of complex numbers, softmax written out."""
    length = hidden.shape[0]
    frequency = 100.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    turn = torch.exp(1j * torch.arange(length).unsqueeze(-1) * frequency)

    def rotated(x):  # [T, heads, 6]
        pairs = torch.complex(x[..., :3], x[..., 3:]) * turn.unsqueeze(1)
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    q, k, v = (proj(hidden).unflatten(-1, (-1, 6)) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    q, k = rotated(q), rotated(k)
    out = torch.zeros_like(q)
    for head in range(4):
        source = head * k.shape[1] // 4
        for t in range(length):
            weight = torch.softmax(k[: t + 1, source] @ q[t, head] / 6**0.5, dim=0)
            out[t, head] = weight @ v[: t + 1, source]
    return mixer.out_proj(out.flatten(-2))


def test_equals_the_textbook(mixer):
    hidden = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    want = torch.stack([oracle(mixer, row) for row in hidden])
    torch.testing.assert_close(mixer(hidden)[0], want, rtol=0, atol=1e-6)  # angles are float32


def test_packed_equals_each_alone(mixer):
    lengths = [5, 0, 1, 8]
    packed = torch.randn(1, sum(lengths), HIDDEN, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    want = torch.cat([mixer(piece)[0] for piece in packed.split(lengths, dim=1)], dim=1)
    for output_state in (False, True):
        out, state = mixer(packed, output_state=output_state, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    assert state.position.tolist() == lengths


def test_packing_that_does_not_fit_is_named(mixer):
    hidden = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    out, _ = mixer(hidden[:1, :0], cu_seqlens=torch.tensor([0]))
    assert out.shape == (1, 0, HIDDEN)
    for output_state in (False, True):
        with pytest.raises(ValueError, match=r"hidden must have a batch of 1 when cu_seqlens packs sequences: got B=2"):
            mixer(hidden, output_state=output_state, cu_seqlens=torch.tensor([0, 4, 9]))
        with pytest.raises(ValueError, match="cu_seqlens must run from 0 to T=9: got 0 to 4"):
            mixer(hidden[:1], output_state=output_state, cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="cu_seqlens_cpu needs cu_seqlens"):
        mixer(hidden, cu_seqlens_cpu=torch.tensor([0, 4, 9]))


def test_crop_forgets_exactly(mixer):
    hidden = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    _, state = mixer(hidden[:, :7], output_state=True)
    state = state.crop(3)
    assert state.position.tolist() == [4, 4]
    out, _ = mixer(hidden[:, 4:], state)
    torch.testing.assert_close(out, mixer(hidden)[0][:, 4:], rtol=0, atol=1e-12)


@torch.no_grad()
def test_room_that_is_too_small_is_named(mixer):
    hidden = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    want, _ = mixer(hidden)
    _, state = mixer(hidden[:, :7], output_state=True)
    with pytest.raises(ValueError, match="max_context must be at least the state's position, 7: got 5"):
        state.for_decoding(5)
    decoding = state.for_decoding(8)
    with pytest.raises(ValueError, match=r"state must hold 9 tokens \(grow makes room\): got max_context=8"):
        mixer(hidden[:, 7:], decoding)
    torch.testing.assert_close(mixer(hidden[:, 7:], decoding.grow(9))[0], want[:, 7:], rtol=0, atol=1e-12)


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="head_dim must be even"):
        SoftmaxAttention(HIDDEN, num_heads=2, head_dim=5)
    with pytest.raises(ValueError, match="num_heads must be a positive multiple of num_kv_heads=3: got 4"):
        SoftmaxAttention(HIDDEN, num_heads=4, head_dim=6, num_kv_heads=3)
