"""The search for products that read registers of something else: on loops as the assembler writes them, and on span kernels."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import triton
from astray import assembly, astray
from compilation import build, record
from triton.backends.compiler import GPUTarget

from loglinear.kernels import decay
from loglinear.kernels.decay.span import choice
from loglinear.kernels.tree import launching

LOOP = """
        /*0000*/                   ULDC.64 UR20, c[0x0][0x658] ;
        /*0010*/                   USHF.R.U32.HI UR6, URZ, 0x4, UR5 ;
        /*0020*/               @P1 BRA `(.L_x_1) ;
        /*0030*/                   UMOV UR20, UR6 ;
        /*0040*/                   UMOV UR21, 0x40000040 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR20], RZ, !UPT, gsb0 ;
.L_x_1:
        /*0060*/                   {first} ;
        /*0070*/                   {second} ;
.L_x_2:
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R24, {left}gdesc[UR20], R24, gsb0 ;
        /*0090*/               @P2 BRA `(.L_x_2) ;
        /*00a0*/                   EXIT ;
"""
MADE = {"first": "UMOV UR20, UR6", "second": "UMOV UR21, 0x40000040"}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, 0),
        ({"first": "NOP"}, 1),
        ({"first": "NOP", "second": "NOP"}, 2),
        ({"first": "@P3 UMOV UR20, UR6"}, 1),
        ({"first": "NOP", "second": "NOP", "left": "R60, "}, 0),  # the place of the first operand is not read
    ],
)
def test_a_place_made_in_a_branch_alone(changes, found):
    assert len(astray(LOOP.format(**{"left": ""} | MADE | changes))) == found


@pytest.mark.slow
def test_span_kernels_read_places_alone():
    if triton.__version__ < "3.6":
        pytest.skip(f"Triton {triton.__version__} has no Gluon for Hopper")
    shapes = {"q": (2, 1000, 1, 128), "k": (2, 1000, 1, 128), "v": (2, 1000, 48, 64), "g": (2, 1000, 48)}
    x = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    x["level_scales"] = torch.empty(2, 1000, 48, 12, dtype=torch.bfloat16, device="meta")
    launching.plans_of.cache_clear()
    with mock.patch.object(choice, "why_not_here", return_value=None):
        launches = [*record(decay.forward, **x), *record(decay.backward, x["v"], **x)]
    launching.plans_of.cache_clear()
    kernels = {launch.kernel: launch for launch in launches if launch.kernel.is_gluon()}
    assert len(kernels) == 4
    for launch in kernels.values():
        compiled = build(launch, GPUTarget("cuda", 90, 32))[1]
        assert astray(assembly(compiled.asm["cubin"])) == [], launch.kernel.fn.__name__
