"""The kernels of the residual for a Hopper GPU, without one: the interpreter takes what the compiler refuses."""

from typing import Any

import pytest

from compiling import compile_for_hopper, run_alone

pytest.importorskip("triton", minversion="3.6")

DIM, V_DIM, TILE = 64, 32, 64
CONSTANTS = {"D": 40, "DV": 24, "D_PAD": DIM, "DV_PAD": V_DIM, "BLOCK": 64, "TOKENS": 16, "LOG2_BLOCK": 6}
CONSTANTS |= {"TILE": TILE, "TMA": True, "PRECISION": "tf32", "SLOTS": 16}
FOURS, THREES = ("i32",) * 4, ("i32",) * 3
STRIDES = {"k_strides": FOURS, "v_strides": FOURS} | dict.fromkeys(("q_strides", "out_strides"), THREES)
MEANS = {"k": "*bf16", "v": "*bf16", "k_means": "*bf16", "v_means": "*bf16", "block_table": "*i32"}
MARK = dict.fromkeys(("indices", "counts", "kept"), "*i32")
MERGE = {"q": "*bf16", "out": "*bf16", "lse": "*fp32", "counts": "*i32", "kept": "*i32"}
MERGE |= {"k_means": f"tensordesc<bf16[{TILE}, {DIM}]>", "v_means": f"tensordesc<bf16[{TILE}, {V_DIM}]>"}
MERGE |= {"scale_log2": "fp32", "cap_log2": "fp32"}


def compile_kernel(kernel: Any, types: dict[str, Any], **constants: Any) -> None:
    """Compile with those of the constants that the kernel takes."""
    taken = {name: value for name, value in (CONSTANTS | constants).items() if name in kernel.arg_names}
    compile_for_hopper(kernel, STRIDES | types, taken)


def test_kernels_compile_where_keys_and_values_have_unlike_dims() -> None:
    run_alone(__file__)


if __name__ == "__main__":
    from stem_attn.backends.triton.residual_kernel import mark_kernel, means_kernel, merge_kernel

    for page_size in (0, 16):
        compile_kernel(means_kernel, MEANS, PAGE=page_size)
    compile_kernel(mark_kernel, MARK)
    for tanh in ("none", "fast"):
        compile_kernel(merge_kernel, MERGE, TANH=tanh)
