"""The backward formulas of docs/algorithm.md, written out as on the page and compared with autograd. One head, float64.

They are what a kernel has to compute; here they are plain matrices, so that page and kernel can be checked line by line.
"""

import pytest
import torch

from loglinear import fenwick
from loglinear.reference import DeltaRule, Diagonal, Scalar, dense, level_mask, level_matrix, segment_sum

# Measured: 1e-15 relative at most (x86-64 CPU, torch 2.13); the margin is for other BLAS libraries.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def leaves(length, width_k=4, width_v=3, levels=None):
    """q, k, v, g, beta, λ that require grad; keys of unit length."""
    levels = fenwick.num_levels(length) if levels is None else levels
    k = torch.nn.functional.normalize(normal(length, width_k), dim=-1)
    values = (normal(length, width_k), k, normal(length, width_v), -0.2 * normal(length).abs())
    return [x.requires_grad_() for x in (*values, normal(length).sigmoid(), normal(length, levels).exp())]


def reverse_cumsum(x):
    return x.flip(0).cumsum(0).flip(0)


def by_level(x, levels):
    """``out[t, l] = Σ_s x[t, s]`` over the s <= t at level l (the last level takes all beyond it)."""
    index = level_matrix(x.shape[0]).clamp(max=levels - 1)
    return torch.zeros(x.shape[0], levels, dtype=x.dtype).scatter_add(1, index, x.tril())


@pytest.mark.parametrize("levels", [None, 2])
def test_scalar_gate_backward_token_by_token(levels):
    q, k, v, g, _, scales = leaves(21, levels=levels)
    do = normal(*v.shape)
    o = dense(q, k, v, Scalar(g), scales)
    expected = torch.autograd.grad(o, (q, k, v, g, scales), do)

    decay = segment_sum(g).exp()
    weight = level_mask(scales) * decay  # the mask M
    wanted = do @ v.mT
    dq = (weight * wanted) @ k
    dk = (weight * wanted).mT @ q
    dv = (weight * (q @ k.mT)).mT @ do
    dscales = by_level(decay * (q @ k.mT) * wanted, scales.shape[-1])
    dg = reverse_cumsum((q * dq).sum(-1) - (k * dk).sum(-1))
    for ours, theirs in zip((dq, dk, dv, dg, dscales), expected):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("delta", [False, True])
def test_gate_gradient_is_output_minus_value(delta):
    """``dG_t = do_t·o_t - v_t·dv_t`` for every transition, with the gradient of a final state added at the last token."""
    q, k, v, g, beta, scales = leaves(19)
    transition = DeltaRule(g, beta, k) if delta else Scalar(g)
    o = dense(q, k, v, transition, scales)
    final = transition.span(q, k, v).state
    do, dfinal = normal(*o.shape), normal(*final.shape)
    expected, dv = torch.autograd.grad((o, final), (g, v), (do, dfinal))
    dcumulative = (do * o).sum(-1) - (v * dv).sum(-1)
    dcumulative[-1] += (dfinal * final).sum()
    torch.testing.assert_close(reverse_cumsum(dcumulative), expected, **CLOSE)


def test_diagonal_gate_gradient():
    q, k, v, _, _, scales = leaves(13)
    g = (-0.2 * normal(*q.shape).abs()).requires_grad_()
    o = dense(q, k, v, Diagonal(g), scales)
    expected, dq, dk = torch.autograd.grad(o, (g, q, k), normal(*o.shape))
    torch.testing.assert_close(reverse_cumsum(q * dq - k * dk), expected, **CLOSE)


def test_scalar_gate_backward_by_entries():
    """Entry gradients over ``[e, e + lowbit(e))`` and keys on the update path, against the token form."""
    size, count = 4, 11
    q, k, v, g, _, scales = leaves(size * count)
    do = normal(*v.shape)
    expected = torch.autograd.grad(dense(q, k, v, Scalar(g), scales), (q, k, v, scales), do)

    def chunk(n):
        return slice(n * size, (n + 1) * size)

    total = g.detach().reshape(count, size).sum(-1)  # log decay of each chunk

    def entry(e):  # entry e, seen from its end
        span = slice((e - fenwick.lowbit(e)) * size, e * size)
        return Scalar(g[span]).span(q[span], k[span], v[span]).state

    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dscales, dstates = torch.zeros_like(scales), {e: 0 for e in range(1, count)}
    for n in range(count):
        c = chunk(n)
        weight, wanted = level_mask(scales[c]) * segment_sum(g[c]).exp(), do[c] @ v[c].mT
        dq[c] += (weight * wanted) @ k[c]
        dk[c] += (weight * wanted).mT @ q[c]
        dv[c] += (weight * (q[c] @ k[c].mT)).mT @ do[c]
        dscales[c] += by_level(segment_sum(g[c]).exp() * (q[c] @ k[c].mT) * wanted, scales.shape[-1])
        log = g[c].cumsum(0)
        for e in fenwick.query_path(n):
            level = fenwick.lowbit(e * size).bit_length()
            row = (scales[c, level] * log.exp())[:, None]
            dq[c] += row * (do[c] @ entry(e).mT)
            dscales[c, level] += log.exp() * (q[c] * (do[c] @ entry(e).mT)).sum(-1)
            dstates[e] = dstates[e] + (row * q[c]).mT @ do[c]
            log = log + total[e - fenwick.lowbit(e) : e].sum()
    for n in range(count):
        c = chunk(n)
        log = total[n] - g[c].cumsum(0)
        for e in fenwick.update_path(n, count - 1):
            dk[c] += log.exp()[:, None] * (v[c] @ dstates[e].mT)
            dv[c] += log.exp()[:, None] * (k[c] @ dstates[e])
            log = log + total[e : e + fenwick.lowbit(e)].sum()
    for ours, theirs in zip((dq, dk, dv, dscales), expected):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def delta_chunk(q, k, v, g, beta, mask):
    """The chunk form of the delta rule as the page derives it: output within the chunk, queries, A and S of the chunk."""
    size = k.shape[0]
    decay, from_start, to_end = segment_sum(g).exp(), g.cumsum(0).exp(), (g.sum() - g.cumsum(0)).exp()
    z = ((k @ k.mT) * decay).tril(-1)
    x = torch.linalg.inv(torch.eye(size, dtype=k.dtype) + beta[:, None] * z)
    t = x * beta
    p = (q @ k.mT) * decay
    w, u, k_end = t @ (from_start[:, None] * k), t @ v, to_end[:, None] * k
    out = (mask * (p @ t)) @ v
    query = from_start[:, None] * q - p @ w
    a = from_start[-1] * torch.eye(k.shape[1], dtype=k.dtype) - k_end.mT @ w
    return (out, query, a, k_end.mT @ u), (decay, from_start, to_end, z, x, t, p, w, u, k_end)


def test_delta_chunk_form_is_the_recurrence():
    q, k, v, g, beta, _ = leaves(9)
    before = normal(q.shape[1], v.shape[1])
    (out, query, a, s), _ = delta_chunk(q, k, v, g, beta, torch.ones(9, 9, dtype=torch.float64).tril())
    state, rows = before, []
    for t in range(9):
        key = k[t][:, None]
        state = g[t].exp() * (state - beta[t] * key @ (key.mT @ state)) + beta[t] * key @ v[t][None]
        rows.append(q[t] @ state)
    torch.testing.assert_close(out + query @ before, torch.stack(rows), **CLOSE)
    torch.testing.assert_close(a @ before + s, state, **CLOSE)


def test_inverse_of_the_chunk_form_by_products():
    n = normal(8, 8).tril(-1)
    unit = torch.eye(8, dtype=torch.float64)
    product = (unit - n) @ (unit + n @ n) @ (unit + n @ n @ n @ n)
    torch.testing.assert_close(product @ (unit + n), unit, **CLOSE)


def test_delta_chunk_backward():
    inputs = leaves(8)
    q, k, v, g, beta, scales = inputs
    mask = level_mask(scales)
    outputs, (decay, from_start, to_end, z, x, t, p, w, u, k_end) = delta_chunk(q, k, v, g, beta, mask)
    dout, dquery, da, ds = cotangents = [normal(*out.shape) for out in outputs]
    expected = torch.autograd.grad(outputs, inputs, cotangents)

    r = p @ t
    dr = mask * (dout @ v.mT)
    du = k_end @ ds
    dw = -p.mT @ dquery - k_end @ da
    dp = dr @ t.mT - dquery @ w.mT
    dt = p.mT @ dr + du @ v.mT + dw @ (from_start[:, None] * k).mT
    dv = (mask * r).mT @ dout + t.mT @ du
    dn = -(x.mT @ dt @ t.mT).tril(-1)
    dz = beta[:, None] * dn
    dbeta = (x.mT @ dt).diagonal() + (dn * z).sum(-1)
    dk_start, dk_end = t.mT @ dw, u @ ds.mT - w @ da.mT
    dq = from_start[:, None] * dquery + (dp * decay) @ k
    both = dz * decay
    dk = (dp * decay).mT @ q + (both + both.mT) @ k + from_start[:, None] * dk_start + to_end[:, None] * dk_end

    pairs = dp * p + dz * z
    ends = (k_end * dk_end).sum(-1)
    dcumulative = pairs.sum(1) - pairs.sum(0) - ends
    dcumulative = dcumulative + from_start * ((q * dquery).sum(-1) + (k * dk_start).sum(-1))
    dcumulative[-1] += ends.sum() + from_start[-1] * da.trace()
    dscales = by_level(r * (dout @ v.mT), scales.shape[-1])
    for ours, theirs in zip((dq, dk, dv, reverse_cumsum(dcumulative), dbeta, dscales), expected):
        torch.testing.assert_close(ours, theirs, **CLOSE)

    short = (dout * outputs[0]).sum(-1) + (dquery * outputs[1]).sum(-1) - (v * dv).sum(-1)
    short[-1] += (da * outputs[2]).sum() + (ds * outputs[3]).sum()
    torch.testing.assert_close(reverse_cumsum(short), expected[3], **CLOSE)


def test_dense_transition_backward_through_walk_and_build():
    """The walk of each chunk backwards, then the build backwards, for entries that are pairs of matrices (A, S)."""
    count, size, width_k, width_v = 11, 3, 4, 2
    maps = (0.5 * normal(count, width_k, width_k)).requires_grad_()
    states = normal(count, width_k, width_v).requires_grad_()
    queries = normal(count, size, width_k).requires_grad_()
    scales = normal(count, size, 5)  # one λ per entry level

    built, partial = {}, {}
    for e in range(1, count + 1):
        a, s = maps[e - 1], states[e - 1]
        for earlier in fenwick.merges(e):
            partial[e, earlier] = a, s
            a, s = a @ built[earlier][0], a @ built[earlier][1] + s
        built[e] = a, s
    outputs, walks = [], []
    for n in range(count):
        rows, out, walk = queries[n], torch.zeros(size, width_v, dtype=torch.float64), []
        for e in fenwick.query_path(n):
            scale = scales[n, :, fenwick.lowbit(e).bit_length() - 1, None]
            out = out + scale * (rows @ built[e][1])
            walk.append((e, scale, rows))
            rows = rows @ built[e][0]
        outputs.append(out)
        walks.append(walk)
    o = torch.stack(outputs)
    do = normal(*o.shape)
    expected = torch.autograd.grad(o, (maps, states, queries), do)

    da = {e: torch.zeros(width_k, width_k, dtype=torch.float64) for e in built}
    ds = {e: torch.zeros(width_k, width_v, dtype=torch.float64) for e in built}
    dqueries = []
    for n, walk in enumerate(walks):
        drows = torch.zeros(size, width_k, dtype=torch.float64)
        for e, scale, rows in reversed(walk):
            da[e] += rows.mT @ drows
            ds[e] += rows.mT @ (scale * do[n])
            drows = (scale * do[n]) @ built[e][1].mT + drows @ built[e][0].mT
        dqueries.append(drows)
    for e in sorted(built, key=fenwick.lowbit, reverse=True):
        for earlier in reversed(list(fenwick.merges(e))):
            a, _ = partial[e, earlier]
            a_l, s_l = built[earlier]
            da[earlier] += a.mT @ da[e]
            ds[earlier] += a.mT @ ds[e]
            da[e] = da[e] @ a_l.mT + ds[e] @ s_l.mT
    ours = (torch.stack(list(da.values())), torch.stack(list(ds.values())), torch.stack(dqueries))
    for mine, theirs in zip(ours, expected):
        torch.testing.assert_close(mine, theirs, **CLOSE)
