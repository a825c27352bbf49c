"""The search for overtaken products, on loops as Triton writes them."""

from __future__ import annotations

import pytest
from overtaking import overtaken

pytestmark = pytest.mark.default_packages

LOOP = """
  %ring = ttg.local_alloc : () -> !ttg.memdesc<{slots}x64x64xbf16, #shared, #smem, mutable>
  %first = ttg.memdesc_index %ring[%c0] : !ttg.memdesc<{slots}x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
  %0 = ttg.async_copy_global_to_local %pointers, %first mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16>
  %sum = scf.for %i = %a to %b step %c1 iter_args(%acc = %zero) -> (tensor<64x64xf32, #mma>) {{
    %tile = ttg.memdesc_index %ring[%slot] : !ttg.memdesc<{slots}x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
    %turned = ttg.memdesc_trans %tile {{order = array<i32: 1, 0>}} : !ttg.memdesc<64x64xbf16> -> !ttg.memdesc<64x64xbf16>
    %1 = ttng.warp_group_dot %left, %turned, %acc {{isAsync = true}} : tensor<64x64xbf16> * !ttg.memdesc<64x64xbf16>
    {wait}
    %next = ttg.memdesc_index %ring[%later] : !ttg.memdesc<{slots}x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
    %2 = ttg.async_copy_global_to_local %more, %next mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16>
    scf.yield %1 : tensor<64x64xf32, #mma>
  }} loc(#loc1)
"""
LEAVES_ONE = "%w:2 = ttng.warp_group_dot_wait %1, %tile {pendings = 1 : i32} : tensor<64x64xf32, #mma>"
LEAVES_NONE = LEAVES_ONE.replace("= 1", "= 0")


@pytest.mark.parametrize(
    ("slots", "wait", "found"),
    [(1, "", ["%1"]), (1, LEAVES_ONE, ["%1"]), (1, LEAVES_NONE, []), (2, LEAVES_ONE, []), (2, "", ["%1"])],
)
def test_a_copy_overtakes_what_nothing_has_waited_for(slots, wait, found):
    assert overtaken(LOOP.format(slots=slots, wait=wait)) == found
