"""Products that are rounded before they are added up."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unfused(product):
    """Return products that are not negative as they are, NaN too, and keep the compiler from fusing them into a sum.

    Threads that hold the same sum add the same two numbers. With the product of its own part fused in, each would round
    another one of them, and hold another last bit of the sum.
    """
    return tl.maximum(product, 0.0, propagate_nan=tl.PropagateNan.ALL)
