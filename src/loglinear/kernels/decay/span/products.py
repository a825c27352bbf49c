"""PRODUCTS: scores and weights of 64 queries as register operands of the products of Hopper's tensor cores."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def key_scores(
    ring,
    QUERY: gl.constexpr,
    KEYS: gl.constexpr,
    FIRST: gl.constexpr,
    COUNT: gl.constexpr,
    factor,
    S: gl.constexpr,
    A: gl.constexpr,
):
    """``factor · Q Kᵀ`` of 64 queries from QUERY on and COUNT keys from FIRST on; halves of Q in slots 0 …, of K in KEYS …"""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COUNT, 16])
    scores = gl.zeros([64, COUNT], gl.float32, layout=ACC)
    for half in gl.static_range(S.K // 64):
        queries = ring.slots.index(half).slice(QUERY, 64)
        keys = ring.slots.index(KEYS + half).slice(FIRST, COUNT).permute((1, 0))
        scores = warpgroup_mma(queries, keys, scores, use_acc=half > 0, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,)) * factor
    return gl.convert_layout(scores.to(ring.slots.dtype), A)


@gluon.jit
def times(scores, mask):
    """``scores * mask`` in the dtype of scores. In assembly, two at a time: scores stay two in a register over a loop."""
    if scores.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            """{
            .reg .b32 low, high;
            shl.b32 low, $1, 16;
            and.b32 high, $1, 0xffff0000;
            mul.f32 low, low, $2;
            mul.f32 high, high, $3;
            cvt.rn.bf16x2.f32 $0, high, low;
            }""",
            "=r,r,r,r", [scores, mask.to(gl.int32, bitcast=True)], dtype=gl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            """{
            .reg .b16 first, second;
            .reg .f32 low, high, left, right;
            mov.b32 {first, second}, $1;
            cvt.f32.f16 low, first;
            cvt.f32.f16 high, second;
            mov.b32 left, $2;
            mov.b32 right, $3;
            mul.f32 low, low, left;
            mul.f32 high, high, right;
            cvt.rn.f16x2.f32 $0, high, low;
            }""",
            "=r,r,r,r", [scores, mask.to(gl.int32, bitcast=True)], dtype=gl.float16, is_pure=True, pack=2,
        )  # fmt: skip


@gluon.jit
def widened(x, y):
    """``x * y`` in float32 for x of bfloat16, which stays two in a register."""
    product = gl.inline_asm_elementwise(
        """{
        .reg .b32 low, high;
        shl.b32 low, $2, 16;
        and.b32 high, $2, 0xffff0000;
        mul.f32 $0, low, $3;
        mul.f32 $1, high, $4;
        }""",
        "=r,=r,r,r,r", [x, y.to(gl.int32, bitcast=True)], dtype=gl.int32, is_pure=True, pack=2,
    )  # fmt: skip
    return product.to(gl.float32, bitcast=True)


@gluon.jit
def weighted(scores, row, column):
    """``scores`` times a factor of the query and one of the key."""
    return times(scores, row[:, None] * column[None, :])


@gluon.jit
def seen(weights, marks, FIRST: gl.constexpr, A: gl.constexpr):
    """Weights ``[64, 16]`` of a chunk's keys from FIRST on: zero for later keys, NaN for earlier ones without a mark."""
    t = gl.arange(0, 64, layout=gl.SliceLayout(1, A))
    s = FIRST + gl.arange(0, 16, layout=gl.SliceLayout(0, A))
    mark = marks.slice(FIRST, 16).load(gl.SliceLayout(0, A))
    told = gl.where(mark[None, :] == 1.0, weights.to(gl.float32), float("nan"))
    return gl.where(t[:, None] >= s[None, :], told, 0.0).to(weights.dtype)
