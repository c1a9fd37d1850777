"""Scale an accumulator of the Hopper kernel, in the warps that need it."""

from __future__ import annotations

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@constexpr_function
def _assembly(count: int) -> str:
    """Return PTX that multiplies `count` registers of two rows, four by four two of each, unless all factors are 1."""
    first, second = f"${2 * count}", f"${2 * count + 2}"
    copies = "".join(f"mov.b32 ${i}, ${count + i};\n" for i in range(count))
    products = "".join(f"mul.f32 ${i}, ${i}, {first if i % 4 < 2 else second};\n" for i in range(count))
    return (
        "{\n.reg .pred moved, other;\n" + copies + f"setp.neu.f32 moved, {first}, 0f3F800000;\n"
        f"setp.neu.or.f32 other, {second}, 0f3F800000, moved;\n"
        "vote.sync.any.pred moved, other, 0xffffffff;\n@!moved bra DONE;\n" + products + "DONE:\n}"
    )


@constexpr_function
def _registers(count: int) -> str:
    return ",".join(["=&f"] * count + ["f"] * 2 * count)


@gluon.jit
def rescale(acc, factor):
    """Multiply rows by factors; a warp whose factors are all 1 skips it.

    Args:
        acc: float32 [64, D], the accumulator of one warpgroup.
        factor: float32 [64], in its layout.
    """
    COUNT: gl.constexpr = acc.shape[1] // 2  # numbers a thread
    factor, acc = gl.broadcast(factor[:, None], acc)
    return gl.inline_asm_elementwise(
        _assembly(COUNT), _registers(COUNT), [acc, factor], dtype=gl.float32, is_pure=True, pack=COUNT
    )
