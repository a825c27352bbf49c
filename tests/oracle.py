"""The definition once more, by hand, in float64: explicit products of token transitions.

The module imports nothing from the library, and the oracles take no shortcut, not even the formula for the level. Agreement
with them is therefore independent evidence. ``literal`` follows the page of the paper. ``oracle`` is the same, fast enough for
some hundreds of tokens with gradients. ``plain_torch`` is what a narrow dtype costs without a kernel.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Largest relative error in norm, ‖x - expected‖ / ‖expected‖, against the same computation in float64.
TOLERANCES = {
    torch.float64: 1e-10,  # required of every form; measured below 1e-13
    torch.float32: 1e-5,  # required (IEEE float32, not TF32); measured below 1e-6
}
# Below float32 the bar is relative: at most twice the error of the same computation by plain torch at that dtype.
LOW_PRECISION_FACTOR = 2.0
# Two orders of summation of the same float64 numbers (a split pass and a whole one); measured below 1e-14.
SAME_NUMBERS = 1e-12


def levels_seen(t: int) -> list[int]:
    """Levels at which token t sees tokens 0 … t: it spends its powers of two from the largest, then sees itself."""
    row = []
    for bit in reversed(range(t.bit_length())):
        if t & (1 << bit):
            row += [bit + 1] * (1 << bit)
    return [*row, 0]


def transition_matrix(g: Tensor | None, beta: Tensor | None, k: Tensor, s: int) -> Tensor:
    """``[B, H, K, K]``: what token s does to the state before it writes. k ``[B, T, H, K]``; g scalar or diagonal."""
    matrix = torch.eye(k.shape[-1], dtype=k.dtype).expand(*k[:, s].shape, -1)
    if beta is not None:
        matrix = matrix - beta[:, s, :, None, None] * k[:, s, :, :, None] * k[:, s, :, None, :]
    if g is None:
        return matrix
    if g.dim() == k.dim():
        return matrix @ torch.diag_embed(g[:, s].exp())  # the decay first, then the erasure
    return g[:, s, :, None, None].exp() * matrix


def per_value_head(x: Tensor, heads: int) -> Tensor:
    """``[B, T, G, K]`` -> ``[B, T, H, K]``: value head h reads q/k head h // (H // G)."""
    return x[:, :, [head // (heads // x.shape[2]) for head in range(heads)]]


def literal(q, k, v, g=None, beta=None, level_scales=None, scale: float = 1.0) -> Tensor:
    """``o_t = Σ_{s <= t} λ_t[level] · (scale · q_tᵀ Φ(t, s) k̃_s) · v_s``, pair by pair: Φ is multiplied out as matrices.

    Shapes as the public ops (and g ``[B, T, H, K]``, diagonal); λ = 1 when None.
    """
    B, T, H, V = v.shape
    q, k = per_value_head(q, H), per_value_head(k, H)
    out = torch.zeros(B, T, H, V, dtype=v.dtype)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                phi = torch.eye(k.shape[-1], dtype=k.dtype)
                for s, level in reversed(list(enumerate(levels_seen(t)))):
                    weight = scale * (q[b, t, h] @ phi @ k[b, s, h])
                    if beta is not None:
                        weight = weight * beta[b, s, h]
                    if level_scales is not None:
                        weight = weight * level_scales[b, t, h, min(level, level_scales.shape[3] - 1)]
                    out[b, t, h] += weight * v[b, s, h]
                    phi = phi @ transition_matrix(g, beta, k, s)[b, h]
    return out


def oracle(q, k, v, g=None, beta=None, level_scales=None, scale: float = 1.0) -> Tensor:
    """``literal`` for all rows, heads and queries at once, and differentiable: one loop, from the last token to the first.

    It carries ``rows``, the queries of every t >= s multiplied by the transitions of the tokens s+1 … t.
    """
    T, heads = v.shape[1:3]
    q, k = per_value_head(q, heads), per_value_head(k, heads)
    levels = [levels_seen(t) for t in range(T)]
    rows, out = q[:, :0], torch.zeros_like(v)
    for s in reversed(range(T)):
        rows = torch.cat([scale * q[:, s : s + 1], rows], 1)  # [B, T - s, H, K]
        weight = torch.einsum("bthk,bhk->bth", rows, k[:, s])
        if beta is not None:
            weight = weight * beta[:, s, None]
        if level_scales is not None:
            seen = torch.tensor([levels[t][s] for t in range(s, T)]).clamp(max=level_scales.shape[3] - 1)
            weight = weight * level_scales[:, torch.arange(s, T), :, seen].permute(1, 0, 2)
        out = out + torch.nn.functional.pad(weight[..., None] * v[:, s, None], (0, 0, 0, 0, s, 0))
        rows = torch.einsum("bthk,bhkj->bthj", rows, transition_matrix(g, beta, k, s))
    return out


def decay_matrix(g: Tensor) -> Tensor:
    """``exp(g_{s+1} + … + g_t)`` for s <= t, else 0, summed directly: nothing cancels. g ``[..., T]``."""
    size = g.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=g.device).tril(-1)
    sums = torch.where(later, g.unsqueeze(-1), 0.0).cumsum(-2)
    return torch.where(later | torch.eye(size, dtype=torch.bool, device=g.device), sums.exp(), 0.0)


def plain_torch(q, k, v, g=None, beta=None, level_scales=None, scale: float = 1.0) -> Tensor:
    """Masked attention in a few lines, with every product in the dtype of q, k and v, one rounding after each; decays and the
    triangular inverse in at least float32."""
    T, low = v.shape[1], v.dtype
    q, k = (per_value_head(x, v.shape[2]).transpose(1, 2) for x in (q, k))
    position = torch.arange(T, device=v.device)
    level = position[:, None] ^ position[None, :]
    level = sum((level >> bit > 0).long() for bit in range(T.bit_length() + 1)).clamp(max=level_scales.shape[-1] - 1)
    scales = level_scales.transpose(1, 2)
    mask = scales.gather(-1, level.expand(*scales.shape[:2], T, T)).tril()
    wide = torch.promote_types(low, torch.float32)
    decay = torch.ones_like(mask, dtype=wide).tril() if g is None else decay_matrix(g.transpose(1, -1).to(wide))

    def products(rows: Tensor, factor: float = 1.0) -> Tensor:
        if decay.dim() == 4:
            return (rows @ k.mT) * factor * decay
        keys = (k.permute(0, 3, 1, 2)[..., None, :] * decay).to(low)  # [B, K, H, T, T], a decay for each channel
        return torch.einsum("bhtk,bkhts->bhts", rows, keys) * factor

    scores = products(q, scale).to(low)
    if beta is not None:
        strength = beta.transpose(1, 2).to(wide)
        lower = (strength[..., None] * products(k)).tril(-1)
        inverse = torch.linalg.solve_triangular(lower, torch.diag_embed(strength), upper=False, unitriangular=True)
        scores = scores @ inverse.to(low)
    return ((scores * mask).to(low) @ v.transpose(1, 2)).transpose(1, 2)


def oracle_row(t: int, q, k, v, g, level_scales, beta=None) -> np.ndarray:
    """``o_t`` of one sequence alone, ``[H, V]``, in O(t): for lengths no double loop reaches. Inputs without batch axis."""
    heads = v.shape[1]
    q, k = (per_value_head(x[None], heads)[0] for x in (q, k))
    q, k, v, g, level_scales = (x.double().numpy() for x in (q, k, v, g, level_scales))
    rate = np.ones(g.shape) if beta is None else beta.double().numpy()
    out, row = np.zeros(v.shape[1:]), q[t]
    for s, level in reversed(list(enumerate(levels_seen(t)))):
        score = (row * k[s]).sum(-1) * rate[s]
        out += (level_scales[t, :, min(level, level_scales.shape[2] - 1)] * score)[:, None] * v[s]
        if beta is not None:
            row = row - score[:, None] * k[s]
        row = np.exp(g[s])[:, None] * row
    return out


def linear_recurrence(q, k, v, g=None, beta=None, scale: float = 1.0) -> Tensor:
    """The plain linear model, token by token: ``S_t = T_t S_{t-1} + k̃_t v_tᵀ``, ``o_t = scale · q_tᵀ S_t``."""
    heads = v.shape[2]
    q, k = per_value_head(q, heads), per_value_head(k, heads)
    state = torch.zeros(v.shape[0], heads, k.shape[3], v.shape[3], dtype=v.dtype)
    outputs = []
    for t in range(v.shape[1]):
        rate = 1.0 if beta is None else beta[:, t, :, None, None]
        written = rate * k[:, t, :, :, None] * v[:, t, :, None, :]
        state = transition_matrix(g, beta, k, t) @ state + written
        outputs.append(scale * (q[:, t, :, None, :] @ state)[..., 0, :])
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(v)


def make_inputs(
    *, B=2, T=150, H=4, G=2, K=3, V=5, L=9, gate="scalar", dtype=torch.float64, grad=False, seed=0
) -> dict[str, Tensor]:
    """Inputs by argument name; every axis has a size of its own.

    gate: identity, scalar, diagonal, delta (rule, with a scalar gate) or diagonal delta.
    """
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    inputs = {
        "q": normal(B, T, G, K),
        "k": torch.nn.functional.normalize(normal(B, T, G, K), dim=-1),
        "v": normal(B, T, H, V),
        "level_scales": normal(B, T, H, L),
    }
    if gate != "identity":
        inputs["g"] = -0.1 * normal(B, T, H, *([K] if gate.startswith("diagonal") else [])).exp()
    if gate.endswith("delta"):
        inputs["beta"] = 2 * normal(B, T, H).sigmoid()
    return {name: x.to(dtype).requires_grad_(grad) for name, x in inputs.items()}


def fused(x: dict) -> dict:
    """x as slices of one projection, but for λ, and but for gates of another dtype."""
    names = [name for name, y in x.items() if name != "level_scales" and y.dtype == x["v"].dtype]
    sizes = [x[name].flatten(2).shape[2] for name in names]
    parts = torch.cat([x[name].flatten(2) for name in names], 2).split(sizes, 2)
    return x | {name: part.view(x[name].shape) for name, part in zip(names, parts)}


def spoilt(x: dict, name: str, value: float, token: int, head: int, column: int, row: int = 0) -> dict:
    """x with one bad number, in a head (of q or k: in a group) of one row."""
    x = {argument: None if y is None else y.clone() for argument, y in x.items()}
    x[name][(row, token, head, column)[: x[name].dim()]] = value
    return x


def error(x: Tensor, expected: Tensor) -> float:
    """``‖x - expected‖ / ‖expected‖`` in float64 (absolute where nothing is expected); NaN wherever x has one."""
    x, expected = x.detach().double(), expected.detach().double()
    assert x.shape == expected.shape
    norm = expected.norm()
    return ((x - expected).norm() / (norm if norm > 0 else 1.0)).item()


def gradients(outputs, inputs, again: bool = True) -> list[Tensor]:
    """Gradients of a fixed random weighting of ``outputs`` with respect to ``inputs``; zeros where none flows.

    again: whether they may be asked for again. A compiled graph gives some memory away in its first backward pass.
    """
    gen = torch.Generator().manual_seed(1)
    outputs = [o for o in (outputs if isinstance(outputs, (list, tuple)) else [outputs]) if o.requires_grad]
    weights = [torch.randn(o.shape, generator=gen, dtype=torch.float64).to(o) for o in outputs]
    return list(
        torch.autograd.grad(
            outputs, list(inputs), weights, retain_graph=again, allow_unused=True, materialize_grads=True
        )
    )
