"""The kernels that deal budgets out, for GPUs that are not here: the interpreter takes what the compiler refuses."""

import sys
from typing import Any

import pytest

from compiling import compile_for, run_alone

pytest.importorskip("triton", minversion="3.6")

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
}
TARGETS |= {"gfx942": ("hip", "gfx942", 64)}
SHARED_BYTES = 48 << 10  # scores stay in registers: sums over heads alone move through shared memory


def compile_kernel(target: tuple[str, Any, int], columns: int) -> Any:
    """Compile for 32 heads."""
    from stem_attn.backends.triton.choose_kernel import choose_kernel

    constants = {"HEADS": 32, "OUTER": columns // 128, "INNER": 128, "INSIDE": True, "NORMALISE": columns == 256}
    constants |= {"CUDA": target[0] == "cuda", "CHAINED": target in (("cuda", 90, 32), ("cuda", 100, 32))}
    types = {"scores": "*fp32"} | dict.fromkeys(("keep", "indices", "counts"), "*i32")
    return compile_for(target, choose_kernel, types, constants, num_warps=32)


def compile_share_kernel(target: tuple[str, Any, int]) -> Any:
    """Compile what takes longer rows, for 32 heads."""
    from stem_attn.backends.triton.share_kernel import share_kernel

    constants = {"HEADS": 32, "CHUNK": 128, "INSIDE": True, "NORMALISE": True}
    types = {"scores": "*fp32", "keep": "*i32", "counts": "*i32"}
    return compile_for(target, share_kernel, types, constants, num_warps=8)


@pytest.mark.parametrize("target", TARGETS)
def test_it_holds_rows_in_registers_and_the_one_for_longer_rows_compiles(target: str) -> None:
    run_alone(__file__, target)


if __name__ == "__main__":
    from stem_attn.backends.triton.pick_launches import CHOOSE_KEYS

    for columns in (256, CHOOSE_KEYS // 32):
        made = compile_kernel(TARGETS[sys.argv[1]], columns)
        assert made.metadata.shared <= SHARED_BYTES, made.metadata.shared
    compile_share_kernel(TARGETS[sys.argv[1]])
