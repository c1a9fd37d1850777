"""The tanh of a softcap, for all kernels, the one in Gluon too."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x, HOW: tl.constexpr):
    """Compute tanh of float32.

    "fast": by NVIDIA's instruction, off by up to 2^-11 of the value. "short": by an exponential, off by up to 2^-22.
    "exact": off by up to 2^-21 of the value, near 0 too.
    """
    if HOW == "fast":
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)
        if HOW == "exact":  # near 0 digits are lost: there the odd polynomial of Cephes' tanhf
            square = x * x
            odd = -5.70498872745e-3 * square + 2.06390887954e-2
            odd = (odd * square - 5.37397155531e-2) * square + 1.33314422036e-1
            odd = (odd * square - 3.33332819422e-1) * square * x + x
            y = tl.where(tl.abs(x) < 0.625, odd, y)
        return y
