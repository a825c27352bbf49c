"""SPAN LOCAL GRADIENTS: the gradient of the scores inside a chunk, dλ of its levels, and the gains of its tokens.

For Hopper, in the place of ``decay/local_grads.py``, with the same results. A chunk is four blocks of 16 columns. In a warp's
own block pairs have five levels, in the earlier blocks one each: a factor of the row times one of the column. All is laid out
as the tensor cores leave it, so that no number moves. The diagonal is kept out of the gains, as there.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from loglinear.kernels.decay.span.factors import decay
from loglinear.kernels.decay.span.tile import Ring, barriers, emptied, filled, load_part, put
from loglinear.kernels.tree.place import row_of_program

SLOTS = gl.constexpr(4)  # of the ring: dO and V of two heads
ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))  # of 64 rows and 16 columns
NARROW = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))  # of 64 rows and 8 levels
ROW = gl.constexpr(gl.SliceLayout(1, ACC))
COLUMN = gl.constexpr(gl.SliceLayout(0, ACC))


@gluon.jit
def clear_absent(tile, size):
    """Zeros for the rows of a tile ``[64, 64]`` in shared memory where the sequence has no token."""
    BY_ROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    token = gl.arange(0, 64, layout=gl.SliceLayout(1, BY_ROW))
    x = tile.load(BY_ROW)
    tile.store(gl.where((token < size)[:, None], x, 0.0).to(x.dtype))
    fence_async_shared()


@gluon.jit
def pairs(left, right, FIRST: gl.constexpr):
    """``left rightᵀ`` ``[64, 16]`` of 16 rows of right from FIRST on, under way."""
    zero = gl.zeros([64, 16], gl.float32, layout=ACC)
    return warpgroup_mma(left, right.slice(FIRST, 16).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def of_own(x0, x1, x2, x3):
    """The block of each warp ``[64, 16]``: that of its rows."""
    block = gl.arange(0, 64, layout=ROW)[:, None] // 16
    return gl.where(block == 3, x3, gl.where(block == 2, x2, gl.where(block == 1, x1, x0)))


@gluon.jit
def own_scores(own):
    """Scores of blocks 0 to 2 and of the own block of each warp without its diagonal ``[64, 16]``, and that ``[64]``."""
    s0, s1 = pairs(own.index(0), own.index(2), 0), pairs(own.index(0), own.index(2), 16)
    s2, s3 = pairs(own.index(0), own.index(2), 32), pairs(own.index(0), own.index(2), 48)
    keys = own.index(3)
    s0 = warpgroup_mma(own.index(1), keys.slice(0, 16).permute((1, 0)), s0, is_async=True)
    s1 = warpgroup_mma(own.index(1), keys.slice(16, 16).permute((1, 0)), s1, is_async=True)
    s2 = warpgroup_mma(own.index(1), keys.slice(32, 16).permute((1, 0)), s2, is_async=True)
    s3 = warpgroup_mma(own.index(1), keys.slice(48, 16).permute((1, 0)), s3, is_async=True)
    s0, s1, s2, s3 = warpgroup_mma_wait(0, deps=(s0, s1, s2, s3))
    near = of_own(s0, s1, s2, s3)
    diagonal = (gl.arange(0, 64, layout=ROW) % 16)[:, None] == gl.arange(0, 16, layout=COLUMN)[None, :]
    return s0, s1, s2, gl.where(diagonal, 0.0, near), gl.sum(gl.where(diagonal, near, 0.0), axis=1)


@gluon.jit
def near_weights(scales, g, g0, g1, g2, g3):
    """(decay, λ times decay) ``[64, 16]`` of the own block of each warp, zero above the diagonal."""
    r = gl.arange(0, 64, layout=ROW) % 16
    c = gl.arange(0, 16, layout=COLUMN)[None, :]
    apart = r[:, None] ^ c
    since = of_own(g0[None, :], g1[None, :], g2[None, :], g3[None, :])
    decays = gl.where(c <= r[:, None], decay(g[:, None] - since), 0.0)
    l0, l1, l2, l3, l4 = scales
    scale = gl.where(apart == 0, l0[:, None], l1[:, None])
    scale = gl.where(apart >= 2, l2[:, None], scale)
    scale = gl.where(apart >= 4, l3[:, None], scale)
    scale = gl.where(apart >= 8, l4[:, None], scale)
    return decays, scale * decays


@gluon.jit
def sums_of_levels(near):
    """Sums ``[64]`` of levels 1 to 4 over the own block of each warp. From level 2 on a level has columns two by two."""
    r = gl.arange(0, 64, layout=ROW) % 16
    apart = r[:, None] ^ gl.arange(0, 16, layout=COLUMN)[None, :]
    first = gl.sum(gl.where(apart == 1, near, 0.0), axis=1)
    twos = gl.sum(gl.reshape(near, [64, 8, 2]), axis=2)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, twos.type.layout))[:, None] % 16 // 2
    apart = row ^ gl.arange(0, 8, layout=gl.SliceLayout(0, twos.type.layout))[None, :]
    second = gl.convert_layout(gl.sum(gl.where(apart == 1, twos, 0.0), axis=1), ROW)
    third = gl.convert_layout(gl.sum(gl.where((apart == 2) | (apart == 3), twos, 0.0), axis=1), ROW)
    fourth = gl.convert_layout(gl.sum(gl.where(apart >= 4, twos, 0.0), axis=1), ROW)
    return first, second, third, fourth


@gluon.jit
def add_block(grads, dp, scores, column, row, weight, near, BLOCK: gl.constexpr):
    """(gradient of the scores of a block, with that of a head; pairs by row; pairs times weights, with those of its warp)."""
    block = gl.arange(0, 64, layout=ROW)[:, None] // 16
    dp = dp * column[None, :]
    grads += dp * weight[:, None]
    found = dp * scores
    return grads, gl.sum(found, axis=1) * row, found * weight[:, None] + gl.where(block == BLOCK, near, 0.0)


@gluon.jit
def store_levels(dscales, sums, factor, tile, h, L, S: gl.constexpr):
    """dλ of levels 0 to 6. tile: (first token, tokens) of the chunk."""
    LINE: gl.constexpr = gl.SliceLayout(1, NARROW)
    d0, d1, d2, d3, d4, d5, d6 = sums
    origin, size = tile
    t = gl.arange(0, 64, layout=LINE)[:, None]
    level = gl.arange(0, 8, layout=gl.SliceLayout(0, NARROW))[None, :]
    found = gl.where(level == 0, gl.convert_layout(d0, LINE)[:, None], gl.convert_layout(d1, LINE)[:, None])
    found = gl.where(level == 2, gl.convert_layout(d2, LINE)[:, None], found)
    found = gl.where(level == 3, gl.convert_layout(d3, LINE)[:, None], found)
    found = gl.where(level == 4, gl.convert_layout(d4, LINE)[:, None], found)
    found = gl.where(level == 5, gl.convert_layout(d5, LINE)[:, None], found)
    found = gl.where(level == 6, gl.convert_layout(d6, LINE)[:, None], found)
    place = dscales + origin.to(gl.int64) * (S.H * L) + h * L
    value = (found * factor).to(dscales.dtype.element_ty)
    gl.store(place + (t * (S.H * L) + level), value, mask=(t < size) & (level < 7))


@gluon.jit
def load_scale(scales, present, factor, LEVEL: gl.constexpr):
    """λ ``[64]`` of a level, times the factor of o. scales point at level 0."""
    return gl.load(scales + LEVEL, mask=present, other=0.0).to(gl.float32) * factor


@gluon.jit
def load_column(sums, size, FIRST: gl.constexpr):
    """Sums of gates ``[16]`` of a block. sums point at the first block."""
    s = FIRST + gl.arange(0, 16, layout=COLUMN)
    return gl.load(sums + FIRST, mask=s < size, other=0.0)


@gluon.jit
def load_end(sums, size, FIRST: gl.constexpr):
    """The sum of gates at the end of a block."""
    return gl.load(sums + (FIRST + 15), mask=size > FIRST + 15, other=0.0)


@gluon.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "L"])
def span_local_grads_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    x,
    L,
    states,
    score_grads,
    dscales,
    gains,
    table,
    T,
    N,
    NG,
    all_tokens,
    sums_stride,
    S: gl.constexpr,
):
    """dS ``[chunks, H / HEADS, C, C]``, dλ and gains. Grid: H/HEADS x chunks, chunks fastest. float32: all until stored."""
    at, chunk, block, _ = row_of_program(table, T, N, NG, S.H // S.HEADS, S)
    if at.length >= 0:
        local = chunk - at.chunk0
        origin, size, h0 = at.start + local * 64, at.length - local * 64, block * S.HEADS
        own = gl.allocate_shared_memory(v_desc.dtype, [4, 64, 64], v_desc.layout)
        loaded = barriers(1, 1)
        slots = gl.allocate_shared_memory(v_desc.dtype, [SLOTS, 64, 64], v_desc.layout)
        ring = Ring(slots, barriers(SLOTS, 1), barriers(SLOTS, 1))
        fence_async_shared()
        first = h0 // (S.H // S.G) * S.K
        mbarrier.expect(loaded.index(0), 4 * 64 * 64 * 2)
        for half in gl.static_range(2):
            load_part(q_desc, [origin, first + half * 64], loaded.index(0), own.index(half))
            load_part(k_desc, [origin, first + half * 64], loaded.index(0), own.index(2 + half))
        put(do_desc, origin, h0 * S.V, ring, 0, 64, SLOTS)
        put(v_desc, origin, h0 * S.V, ring, 1, 64, SLOTS)
        mbarrier.wait(loaded.index(0), 0)
        if size < 64:
            for part in gl.static_range(4):
                clear_absent(own.index(part), size)
        s0, s1, s2, near_scores, own_score = own_scores(own)

        t = gl.arange(0, 64, layout=ROW)
        mine = t // 16  # the block of a row, and of its warp
        diagonal = (t % 16)[:, None] == gl.arange(0, 16, layout=COLUMN)[None, :]
        zero = gl.zeros([64, 16], gl.float32, layout=ACC)
        grads0, grads1, grads2, near_grads = zero, zero, zero, zero
        present = t < size
        scales = x.scales + origin.to(gl.int64) * x.stride_scales + h0 * L + t * x.stride_scales
        sums = states.sums + h0.to(gl.int64) * sums_stride + origin
        row_sums, column_sums = sums + t, sums + gl.arange(0, 16, layout=COLUMN)
        for i in range(S.HEADS):
            h = h0 + i
            if i + 1 < S.HEADS:
                put(do_desc, origin, (h + 1) * S.V, ring, 2 * i + 2, 64, SLOTS)
                put(v_desc, origin, (h + 1) * S.V, ring, 2 * i + 3, 64, SLOTS)
            l0, l1 = load_scale(scales, present, x.factor, 0), load_scale(scales, present, x.factor, 1)
            l2, l3 = load_scale(scales, present, x.factor, 2), load_scale(scales, present, x.factor, 3)
            l4, l5 = load_scale(scales, present, x.factor, 4), load_scale(scales, present, x.factor, 5)
            l6 = load_scale(scales, present, x.factor, 6)
            scales += L
            g = gl.load(row_sums, mask=present, other=0.0)
            g0, g1 = load_column(column_sums, size, 0), load_column(column_sums, size, 16)
            g2, g3 = load_column(column_sums, size, 32), load_column(column_sums, size, 48)
            end0, end1, end2 = load_end(sums, size, 0), load_end(sums, size, 16), load_end(sums, size, 32)
            sums += sums_stride
            row_sums += sums_stride
            column_sums += sums_stride

            do, v = filled(ring, 2 * i, SLOTS), filled(ring, 2 * i + 1, SLOTS)
            if size < 64:
                clear_absent(do, size)
                clear_absent(v, size)
            dp0, dp1, dp2, dp3 = pairs(do, v, 0), pairs(do, v, 16), pairs(do, v, 32), pairs(do, v, 48)
            near_decay, near = near_weights((l0, l1, l2, l3, l4), g, g0, g1, g2, g3)
            row0 = gl.where(mine > 0, decay(g - end0), 0.0)
            row1 = gl.where(mine > 1, decay(g - end1), 0.0)
            row2 = gl.where(mine > 2, decay(g - end2), 0.0)
            dp0, dp1, dp2, dp3 = warpgroup_mma_wait(0, deps=(dp0, dp1, dp2, dp3))
            emptied(ring, 2 * i, SLOTS)
            emptied(ring, 2 * i + 1, SLOTS)

            near_dp = of_own(dp0, dp1, dp2, dp3)
            near_grads += near_dp * near
            found = near_dp * near_scores
            of_columns = found * near
            weight = row0 * gl.where(mine == 1, l5, l6)
            grads0, far0, c0 = add_block(grads0, dp0, s0, decay(end0 - g0), row0, weight, of_columns, 0)
            grads1, far1, c1 = add_block(grads1, dp1, s1, decay(end1 - g1), row1, row1 * l6, of_columns, 1)
            grads2, far2, c2 = add_block(grads2, dp2, s2, decay(end2 - g2), row2, row2 * l5, of_columns, 2)
            found = found * near_decay
            d0 = own_score * gl.sum(gl.where(diagonal, near_dp, 0.0), axis=1)
            d1, d2, d3, d4 = sums_of_levels(found)
            d5, d6 = gl.where(mine == 1, far0, far2), gl.where(mine > 1, far0 + far1, 0.0)
            store_levels(dscales, (d0, d1, d2, d3, d4, d5, d6), x.factor, (origin, size), h, L, S)
            if x.g is not None:
                place = h.to(gl.int64) * all_tokens + origin
                gain = (l1 * d1 + l2 * d2 + l3 * d3 + l4 * d4) + (l5 * d5 + l6 * d6)
                gl.store(gains.rows + place + t, gain, mask=present)
                c3 = gl.where((mine == 3)[:, None], of_columns, 0.0)
                total = gl.sum(gl.join(gl.join(c0, c1), gl.join(c2, c3)), axis=0)  # [16, 2, 2]
                total = gl.reshape(gl.permute(total, (2, 1, 0)), [64])
                s = gl.arange(0, 64, layout=total.type.layout)
                gl.store(gains.columns + place + s, total, mask=s < size)

        target = score_grads + (chunk.to(gl.int64) * (S.H // S.HEADS) + block) * (64 * 64)
        target += t[:, None] * 64 + gl.arange(0, 16, layout=COLUMN)[None, :]
        own_block = mine[:, None]
        dtype: gl.constexpr = score_grads.dtype.element_ty
        gl.store(target, (grads0 + gl.where(own_block == 0, near_grads, 0.0)).to(dtype))
        gl.store(target + 16, (grads1 + gl.where(own_block == 1, near_grads, 0.0)).to(dtype))
        gl.store(target + 32, (grads2 + gl.where(own_block == 2, near_grads, 0.0)).to(dtype))
        gl.store(target + 48, gl.where(own_block == 3, near_grads, 0.0).to(dtype))
