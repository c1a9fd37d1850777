"""A store of numbers where they are: Triton would first deal them out anew among the threads, through shared memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_in_place(pointers, numbers, mask, CUDA: tl.constexpr):
    """Store 32-bit numbers without moving them between threads first, where the compiler knows PTX."""
    if CUDA:
        tl.inline_asm_elementwise(
            "{ .reg .pred %p; setp.ne.s32 %p, $3, 0; @%p st.global.b32 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r,r",
            [pointers.to(tl.int64), numbers, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(pointers, numbers, mask=mask)
