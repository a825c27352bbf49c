"""SoftmaxAttention: causal attention with rotary positions, the baseline and the other half of hybrids.

Like the recurrent mixers it keeps a position per row and takes packed sequences. Where it needs rows of one length it pads
them on the *right*. Causality alone hides this padding, so a first pass never builds a mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loglinear.layers.initialization import wide
from loglinear.layers.packing import locate_tokens
from loglinear.layers.state import KVState
from loglinear.ops import checks
from loglinear.state import CHUNK_SIZE


@torch.library.custom_op("loglinear::rotary_table", mutates_args=())
def rotary_table(position: Tensor, half: int, theta: float) -> Tensor:
    """cos and sin of ``position · theta^(-i/half)`` ``[2, B, T, half]``. An operator, or the compiler would put the
    angles into every kernel that turns a head by them, once for each head."""
    frequency = theta ** (-torch.arange(half, device=position.device, dtype=torch.float32) / half)
    angle = position.unsqueeze(-1) * frequency
    return torch.stack([angle.cos(), angle.sin()])


@rotary_table.register_fake
def _(position: Tensor, half: int, theta: float) -> Tensor:
    return position.new_empty((2, *position.shape, half), dtype=torch.float32)


def rotary(position: Tensor, theta: float, *heads: Tensor) -> list[Tensor]:
    """Rotate pairs ``(i, i + W/2)`` of each ``[B, T, heads, W]`` by ``position[b, t] · theta^(-2i/W)`` (Su et al. 2021)."""
    half = heads[0].shape[-1] // 2
    cos, sin = rotary_table(position, half, theta).unsqueeze(-2)  # [B, T, 1, W/2]

    def turned(x: Tensor) -> Tensor:
        left, right = wide(x).split(half, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)

    return [turned(x) for x in heads]


class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention through torch's scaled_dot_product_attention.

    Args:
        hidden_size: width of input and output. num_heads: query heads. head_dim: width of each, even.
        num_kv_heads: key/value heads, a divisor of num_heads; None means num_heads.
        rope_theta: base of the rotary frequencies.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        rope_theta: float = 500_000.0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(num_heads, num_kv_heads) < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a positive multiple of num_kv_heads={num_kv_heads}: got {num_heads}")
        if head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary positions turn pairs): got {head_dim}")
        self.head_dim, self.rope_theta = head_dim, rope_theta
        self.grouped = num_kv_heads != num_heads
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.out_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(
        self,
        hidden: Tensor,
        state: KVState | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
    ) -> tuple[Tensor, KVState | None]:
        """Mix along T. Arguments and results are those of every mixer: see ``loglinear.layers``."""
        q, k, v = (proj(hidden).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        checks.check_packing(hidden, cu_seqlens, cu_seqlens_cpu, "hidden")
        if cu_seqlens is None:
            o, new_state = self._attend_rows(q, k, v, state, output_state, hidden.shape[1])
            return self.out_proj(o.flatten(-2)), new_state
        place = locate_tokens(cu_seqlens, hidden.shape[1])
        if state is None and not output_state and not checks.values_are_known(hidden):
            return self.out_proj(self._attend_unseen(q, k, v, place).flatten(-2)), None
        lengths = checks.sequence_lengths(hidden, cu_seqlens, cu_seqlens_cpu)
        if lengths and state is None and not output_state:
            return self.out_proj(self._attend_packed(q, k, v, place[1], lengths).flatten(-2)), None
        rows = (len(lengths), max(lengths, default=0))
        q, k, v = (x.new_zeros(*rows, *x.shape[2:]).index_put(place, x[0]) for x in (q, k, v))
        o, new_state = self._attend_rows(q, k, v, state, output_state, cu_seqlens.diff())
        return self.out_proj(o[place].unsqueeze(0).flatten(-2)), new_state

    def _attend_packed(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Packed ``[1, T, heads, W]`` from the start of each sequence; one call per sequence costs what each needs."""
        q, k = rotary(position.unsqueeze(0), self.rope_theta, q, k)
        sequences = zip(q.split(lengths, dim=1), k.split(lengths, dim=1), v.split(lengths, dim=1))
        return torch.cat([self._softmax(*sequence, visible=None) for sequence in sequences], dim=1)

    def _attend_unseen(self, q: Tensor, k: Tensor, v: Tensor, place: tuple[Tensor, Tensor]) -> Tensor:
        """The same where no length may be read (``torch.compile``): one call with a mask ``[T, T]``."""
        sequence, position = place
        q, k = rotary(position.unsqueeze(0), self.rope_theta, q, k)
        visible = (sequence.unsqueeze(1) == sequence) & (position.unsqueeze(1) >= position)
        return self._softmax(q, k, v, visible[None, None])

    def _attend_rows(
        self, q: Tensor, k: Tensor, v: Tensor, state: KVState | None, output_state: bool, new_tokens: Tensor | int
    ) -> tuple[Tensor, KVState | None]:
        """Rows ``[n, T, heads, W]``, of which the first ``new_tokens`` (an int or ``[n]``) are real."""
        rows, length = q.shape[:2]
        seen = state.position if state else torch.zeros(rows, dtype=torch.int64, device=q.device)
        place = seen.unsqueeze(-1) + torch.arange(length, device=q.device)  # [n, T], in each row's own count
        q, k = rotary(place, self.rope_theta, q, k)
        if state is not None and state.in_place and not torch.is_grad_enabled():
            return self._attend_in_place(q, k, v, state, place, new_tokens), state if output_state else None
        visible = None
        if state is not None:
            state = state.ordinary()
            row = torch.arange(rows, device=q.device).unsqueeze(-1)
            # Places behind the last token of a sequence are written over here before any query can see them.
            k, v = (
                torch.cat([old.to(new.dtype), torch.zeros_like(new)], dim=1).index_put((row, place), new)
                for old, new in ((state.keys, k), (state.values, v))
            )
            visible = (torch.arange(k.shape[1], device=q.device) <= place.unsqueeze(-1)).unsqueeze(1)  # [n, 1, T, S]
        return self._softmax(q, k, v, visible), KVState(seen + new_tokens, k, v) if output_state else None

    def _attend_in_place(
        self, q: Tensor, k: Tensor, v: Tensor, state: KVState, place: Tensor, new_tokens: Tensor | int
    ) -> Tensor:
        """Rows ``[n, T, heads, W]`` at ``place [n, T]``, written into the buffers of ``state``.

        On CUDA a call of a few tokens waits for nothing and reads the whole buffer. Other calls read the used part.
        """
        (rows, length), keys, values = q.shape[:2], state.keys, state.values
        row = torch.arange(rows, device=q.device).unsqueeze(-1)
        used = keys.shape[1]
        if q.device.type == "cpu" or length > CHUNK_SIZE:
            used = max(state.position.tolist(), default=0) + length
        if used > keys.shape[1]:
            raise ValueError(f"state must hold {used} tokens (grow makes room): got max_context={keys.shape[1]}")
        keys.index_put_((row, place), k.to(keys.dtype))
        values.index_put_((row, place), v.to(values.dtype))
        visible = (torch.arange(used, device=q.device) <= place.unsqueeze(-1)).unsqueeze(1)  # [n, 1, T, S]
        o = self._softmax(q, keys[:, :used].to(q.dtype), values[:, :used].to(q.dtype), visible)
        state.position += new_tokens
        return o

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        """Attention on ``[B, T, heads, W]``; causal unless ``visible [B, 1, T, S]`` says which keys a query sees."""
        return F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=visible,
            is_causal=visible is None,
            enable_gqa=self.grouped,
        ).transpose(1, 2)
