"""The kernels of the residual for a Hopper GPU, without one: the interpreter takes what the compiler refuses."""

import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", minversion="3.6")

DIM, V_DIM, TILE = 64, 32, 64
CONSTANTS = {"D": 40, "DV": 24, "D_PAD": DIM, "DV_PAD": V_DIM, "BLOCK": 64, "TOKENS": 16, "LOG2_BLOCK": 6}
CONSTANTS |= {"TILE": TILE, "TMA": True, "PRECISION": "tf32", "SLOTS": 16}
FOURS, THREES = ("i32",) * 4, ("i32",) * 3
STRIDES = {"k_strides": FOURS, "v_strides": FOURS} | dict.fromkeys(
    ("q_strides", "out_strides", "index_strides", "count_strides"), THREES
)
MEANS = {"k": "*bf16", "v": "*bf16", "k_means": "*fp16", "k_powers": "*fp32", "v_means": "*bf16", "block_table": "*i32"}
MARK = dict.fromkeys(("indices", "counts", "kept"), "*i32")
MERGE = {"q": "*bf16", "out": "*bf16", "lse": "*fp32", "counts": "*i32", "kept": "*i32", "k_powers": "*fp32"}
MERGE |= {"k_means": f"tensordesc<fp16[{TILE}, {DIM}]>", "v_means": f"tensordesc<bf16[{TILE}, {V_DIM}]>"}
MERGE |= {"scale_log2": "fp32"}


def compile_kernel(kernel: Any, types: dict[str, Any], **constants: Any) -> None:
    """Compile for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants = {name: value for name, value in (CONSTANTS | constants).items() if name in names}
    types = STRIDES | types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    triton.compile(source, target=GPUTarget("cuda", 90, 32))


def test_kernels_compile_where_keys_and_values_have_unlike_dims() -> None:
    """Compiled in a process of its own, where Triton is not in its interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, __file__], env=env, check=True, timeout=120)


if __name__ == "__main__":
    from stem_attn.backends.triton.residual_kernel import mark_kernel, means_kernel, merge_kernel

    for page_size in (0, 16):
        compile_kernel(means_kernel, MEANS, PAGE=page_size)
    compile_kernel(mark_kernel, MARK)
    compile_kernel(merge_kernel, MERGE)
